"""Run by test_analysis.py, in a process of its own: how much memory an index and its effects need, by number of images.

    python memory.py FOLDER

Prints a JSON object for the code as it is ("right"), and with a fault that keeps "arrays" or "tensors" of every image:
for each size the most MB of Python objects (arrays of NumPy among them) meanwhile, and the most MB of this process that
belong to no file, as seen from within the data set.
"""
import json
import sys
import tempfile
import tracemalloc
from pathlib import Path

import torch
from torch.utils.data import Dataset

from llb.analysis import build
from llb.analysis.effects import build_effects
from llb.core.distributed import Runtime
from llb.data.batches import EvalBatches, make_loader
from llb.data.images import ImageList
from llb.models.backbone import load_backbone
from llb.models.llb import LLB

SIZES = 300, 600, 900, 1200
CLASSES, OBJECTS = 500, 64            # 4 KB of logits an image, and 4 KB of assignments
KEPT = []


def anonymous_memory():
    "MB of this process that belong to no file."
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


class RandomTokens(Dataset):
    "Tokens of no image, and a look at the memory now and then."
    def __init__(self, images, backbone):
        self.images, self.backbone, self.most = images, backbone, 0

    def __len__(self): return len(self.images)

    def __getitem__(self, key):
        i = key[1]
        if i % 100 == 0: self.most = max(self.most, anonymous_memory())
        N = self.backbone.grid[0] * self.backbone.grid[1] + self.backbone.num_prefix
        tokens = torch.randn(N, self.backbone.dim, generator=torch.Generator().manual_seed(i))
        return {"index": i, "label": self.images.labels[i], "tokens": tokens, "visual_features": tokens[0]}


ADD = build.IndexSums.add


def keep(kind):
    "Put a fault in: the assignments of every batch are kept for ever."
    def faulty(self, label, assignments, *others):
        found = ADD(self, label, assignments, *others)
        KEPT.append(assignments.numpy().copy() if kind == "arrays" else assignments.clone())
        return found
    build.IndexSums.add = faulty


def measure(model, root, images):
    "Build an index of so many images, and its effects."
    files = tuple(f"{i % 100}.png" for i in range(images))
    listed = ImageList(root, files, tuple(i % CLASSES for i in range(images)), tuple(map(str, range(CLASSES))), files)
    dataset, runtime = RandomTokens(listed, model.backbone), Runtime(torch.device("cpu"))
    loader = make_loader(dataset, EvalBatches(images, 50))
    tracemalloc.start()
    with tempfile.TemporaryDirectory(dir=root) as folder:
        index = build.build_index(model, loader, Path(folder) / "val", runtime, gallery=2, sample=2)
        build_effects(model, loader, index, runtime, count=1)
    most = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return most, dataset.most


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for i in range(100): (folder / f"{i}.png").touch()
    torch.manual_seed(0)
    backbone = load_backbone("test_vit", pretrained=False, image_size=64, num_classes=0)
    model = LLB(backbone, num_objects=OBJECTS, num_layers=2, target_layer=1, num_classes=CLASSES).eval()
    measure(model, folder, SIZES[-1])   # what grows once has grown then
    found = {}
    for kind in "right", "arrays", "tensors":
        if kind != "right": keep(kind)
        found[kind] = [measure(model, folder, images) for images in SIZES]
    print(json.dumps({"images": SIZES, **found}))
