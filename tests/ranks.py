"""Run under torchrun by test_distributed.py: gradients of a fixed global batch, or an evaluation, written to a file by each process.

    torchrun --nproc_per_node=N ranks.py gradients|evaluate FOLDER
"""
import json
import sys
from dataclasses import fields
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import llb.data.unreadable
from llb.core.distributed import start_runtime
from llb.data.batches import EvalBatches
from llb.data.images import decode
from llb.models.backbone import load_backbone
from llb.models.llb import LLB
from llb.models.loss import batch_totals, LLBLoss
from llb.training.evaluate import score_model
from llb.training.metrics import measure, Scores

B, C, N = 12, 3, 11


def make_model():
    torch.manual_seed(0)
    backbone = load_backbone("test_vit", pretrained=False, image_size=32, num_classes=7)   # another number: a visual head is trained too
    model = LLB(backbone, num_objects=6, num_layers=2, target_layer=3, num_classes=C, temperature=.5).double()
    torch.nn.init.normal_(model.branch.visual_head.weight, std=.1)
    images = torch.randn(max(B, N), 3, 32, 32, dtype=torch.float64)
    return model, images, torch.arange(max(B, N)) % C


def gradients(runtime, uneven, micro, local):
    model, images, labels = make_model()
    model.train()
    cuts = [0, *((2, 7, B) if uneven else (4, 8, B))] if runtime.world_size == 3 else [0, 3 if uneven else 6, B] if runtime.world_size == 2 else [0, B]
    mine = torch.arange(B)[cuts[runtime.rank]:cuts[runtime.rank + 1]]
    head = DistributedDataParallel(model.branch) if runtime.world_size > 1 else model.branch
    loss, parts = LLBLoss(local_diversity=local), mine.chunk(micro)
    features = [model.features(images[p]) for p in parts]
    totals = batch_totals([head(f).means for f in features]) if micro > 1 else None
    for i, (f, p) in enumerate(zip(features, parts)):
        if runtime.world_size > 1: head.require_backward_grad_sync = i == len(parts) - 1
        terms = loss(head(f), labels[p], totals)
        terms["loss"].backward()
    own = LLBLoss(local_diversity=True)(model.branch(model.features(images[mine])), labels[mine], batch_totals([torch.ones(1, 6)]))["entropy"]
    return {"gradients": {n: p.grad.tolist() for n, p in model.branch.named_parameters()}, "share": len(mine),
            "terms": {k: float(v) for k, v in terms.items()}, "own_entropy": float(own)}


class Fixed(Dataset):
    "Eleven images of noise."
    def __init__(self, images, labels): self.images, self.labels = images, labels
    def __getitem__(self, key): return {"index": key[1], "label": int(self.labels[key[1]]), "image": self.images[key[1]]}
    def __len__(self): return N


def evaluation(runtime):
    model, images, labels = make_model()
    scores, usage = score_model(model, DataLoader(Fixed(images, labels), batch_sampler=EvalBatches(N, 3, runtime.rank, runtime.world_size)), runtime)
    return {"scores": {f.name: getattr(scores, f.name).tolist() for f in fields(Scores)}, "usage": usage,
            "metrics": {str(a): measure(scores, a) for a in (0, .5, .8, 1)}}


def corrupt(folder):
    "Which of eleven files cannot be read, and how many of them this process read."
    read = []
    llb.data.unreadable.decode = lambda path: read.append(path) or decode(path)
    found = llb.data.unreadable.find_unreadable([Path(folder, f"{i}.png") for i in range(N)])
    return {"found": sorted(Path(path).name for path in found), "read": len(read)}


if __name__ == "__main__":
    with start_runtime("cpu", timeout_s=60) as runtime:
        cases = {f"{u}-{m}-{loc}": gradients(runtime, u, m, loc) for u in (0, 1) for m, loc in ((1, 0), (2, 0), (1, 1))}
        result = {"gradients": cases, "evaluation": evaluation(runtime), "corrupt": corrupt(sys.argv[1])}
        Path(sys.argv[1], f"{runtime.world_size}-{runtime.rank}.json").write_text(json.dumps(result))
