"""What each process of a group does for test_distributed.py: gradients of a fixed global batch, and an evaluation."""
import json
from dataclasses import fields
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import llb.data.unreadable
from llb.core.distributed import start_runtime
from llb.data.batches import EvalBatches
from llb.data.images import decode
from llb.models.backbone import load_backbone
from llb.models.llb import LLB
from llb.models.loss import batch_totals, LLBLoss
from llb.runs.config import Config
from llb.training.evaluate import score_model
from llb.training.metrics import measure, Scores
from llb.training.step import TrainStep

B, C, N = 12, 3, 11


def make_model():
    torch.manual_seed(0)
    backbone = load_backbone("test_vit", pretrained=False, image_size=32, num_classes=7)   # a visual head is trained
    model = LLB(backbone, num_objects=6, num_layers=2, target_layer=3, num_classes=C, temperature=.5).double()
    torch.nn.init.normal_(model.branch.visual_head.weight, std=.1)
    images = torch.randn(max(B, N), 3, 32, 32, dtype=torch.float64)
    return model, images, torch.arange(max(B, N)) % C


class Recorded(TrainStep):
    "The product's step, which keeps the gradients it changes parameters by."
    def update(self, index, number, epoch, terms):
        self.gradients = {n: p.grad.tolist() for n, p in self.trained.named_parameters()}
        return super().update(index, number, epoch, terms)


# (processes, uneven) -> who has which images
CUTS = {(1, 0): [0, B], (1, 1): [0, B], (2, 0): [0, 6, B], (2, 1): [0, 3, B],
        (3, 0): [0, 4, 8, B], (3, 1): [0, 2, 7, B]}


def gradients(runtime, uneven, micro, local):
    model, images, labels = make_model()
    first, end = CUTS[runtime.world_size, uneven][runtime.rank:][:2]
    mine = {"image": images[first:end], "label": labels[first:end], "index": torch.arange(first, end)}
    config = Config.of(micro_batches=micro, local_diversity=bool(local), clip_grad=None)
    step = Recorded(model.train(), config, runtime)
    features = model.features(mine["image"])
    own = LLBLoss(local_diversity=True)(model.branch(features), mine["label"], batch_totals([torch.ones(1, 6)]))
    terms = step(mine, number=0, epoch=0.)
    terms = {name: float(value) for name, value in terms.items()}
    return {"gradients": step.gradients, "terms": terms, "own_entropy": float(own["entropy"])}


class Fixed(Dataset):
    "Eleven images of noise."
    def __init__(self, images, labels): self.images, self.labels = images, labels

    def __len__(self): return N

    def __getitem__(self, key):
        i = key[1]
        return {"index": i, "label": int(self.labels[i]), "image": self.images[i]}


def evaluation(runtime):
    model, images, labels = make_model()
    batches = EvalBatches(N, 3, runtime.rank, runtime.world_size)
    scores, usage = score_model(model, DataLoader(Fixed(images, labels), batch_sampler=batches), runtime)
    return {"scores": {f.name: getattr(scores, f.name).tolist() for f in fields(Scores)}, "usage": usage,
            "metrics": {str(a): measure(scores, a) for a in (0, .5, .8, 1)}}


def corrupt(folder):
    "Which of eleven files cannot be read, and how many of them this process read."
    read = []
    llb.data.unreadable.decode = lambda path: read.append(path) or decode(path)
    found = llb.data.unreadable.find_unreadable([Path(folder, f"{i}.png") for i in range(N)])
    return {"found": sorted(Path(path).name for path in found), "read": len(read)}


def main(folder):
    "Write what this process finds into a file of its own."
    with start_runtime("cpu", timeout_s=60) as runtime:
        cases = {f"{uneven}-{micro}-{local}": gradients(runtime, uneven, micro, local)
                 for uneven in (0, 1) for micro, local in ((1, 0), (2, 0), (1, 1))}
        result = {"gradients": cases, "evaluation": evaluation(runtime), "corrupt": corrupt(folder)}
        Path(folder, f"{runtime.world_size}-{runtime.rank}.json").write_text(json.dumps(result))
