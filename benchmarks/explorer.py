"""How long a click in the explorer takes: a synthetic index of 50,000 images, 2,048 objects and 1,000 classes, with the bundled images behind it.

    python benchmarks/explorer.py [--images 50000] [--objects 2048] [--classes 1000] [--clicks 60] [--folder FOLDER]

Prints milliseconds from a click to everything being sent to the page, first for images that were never decoded, then for those still in memory.
The browser's own part is not in it: see tests/test_browser_explorer.py.
"""
import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from llb.analysis.effects import new_effects
from llb.analysis.exemplars import PatchSample
from llb.analysis.index import new_rows, ObjectIndex, open_index, save_index
from llb.data.preprocessing import Preprocessing
from llb.data.splits import load_data


def synthetic_index(folder:Path, images:int=50_000, objects:int=2048, classes:int=1000, grid=(14, 14), dim:int=64, seed:int=0)->ObjectIndex:
    "Write an index whose objects prefer some classes, without any model."
    rng, N, folder = np.random.default_rng(seed), grid[0] * grid[1], Path(folder)
    folder.mkdir(parents=True)
    clipart = load_data(Path(__file__).parent.parent / "data/openclipart").val
    files = [clipart.files[i % len(clipart)] for i in range(images)]
    own = rng.integers(0, objects, (classes, 12))                                   # the objects a class likes
    K, C, top = objects, classes, PatchSample(objects, 128)
    preprocessing = asdict(Preprocessing((16 * grid[0], 16 * grid[1]), (.5,) * 3, (.5,) * 3))
    info = {"model": f"synthetic{seed}", "settings": {"alpha": .5, "num_objects": K}, "backbone": "none", "grid": list(grid),
            "preprocessing": preprocessing, "classes": [f"class {c}" for c in range(C)], "images": images, "fingerprint": "synthetic", "content": "synthetic",
            "root": str(clipart.root.resolve())}
    rows = new_rows(folder, info)
    shapes = {"patches": (K,), "image_counts": (K,), "patch_entropy": (K,), "class_patches": (C, K), "class_images": (C, K), "together": (K, K),
              "class_count": (C,), "object_visual": (K, dim), "object_label": (K, dim), "class_visual": (C, dim), "class_label": (C, dim)}
    sums = {name: np.zeros(shape) for name, shape in shapes.items()}
    for part in np.array_split(np.arange(images), max(1, images // 1000)):
        label = rng.integers(0, classes, len(part))
        region = own[label][np.arange(len(part))[:, None], rng.integers(0, 12, (len(part), N // 4))].repeat(4, 1)
        first = np.where(rng.random((len(part), N)) < .7, region, rng.integers(0, objects, (len(part), N)))
        p = rng.beta(2, 2, (len(part), N)).astype(np.float32)
        logits = {f"{who}_logits": rng.normal(size=(len(part), C)) + 4 * np.eye(C)[label] for who in ("visual", "label")}
        rows.put(part, label=label, objects=region[:, :32:4], fractions=np.full((len(part), 8), .1), first=first, confidence=p, **logits)
        top.add(part, first, p)
        for f, y in zip(first, label):
            ids, counts = np.unique(f, return_counts=True)
            sums["patches"][ids] += counts
            sums["image_counts"][ids] += 1
            sums["class_patches"][y, ids] += counts
            sums["class_images"][y, ids] += 1
            sums["together"][np.ix_(ids[:20], ids[:20])] += 1
            sums["class_count"][y] += 1
    save_index(folder, info, files, {**sums, "mass": sums["patches"].copy()}, top.exemplars(), top.exemplars())
    index = open_index(folder)
    effects = new_effects(folder / "effects", index, 8)
    for part in np.array_split(np.arange(images), max(1, images // 1000)):
        values = {name: rng.normal(size=(len(part), 8)) for name in ("effect", "random", "predicted_effect")}
        effects.put(part, objects=index.rows["objects"][part], predicted=index.rows["label"][part], **values)
    return index


def timed(what, *args)->float: # milliseconds
    began = time.perf_counter()
    what(*args)
    return 1e3 * (time.perf_counter() - began)


def measure(index:ObjectIndex, clicks:int=60, seed:int=0)->dict[str, np.ndarray]: # milliseconds by action
    "Click patches, first of new images, then of the same ones."
    from llb.apps.explorer import Explorer
    made = []
    found, rng = {"open the explorer": [timed(lambda: made.append(Explorer(index)))]}, np.random.default_rng(seed)
    explorer = made[0]
    set_to = lambda widget, trait, values: [timed(setattr, widget, trait, v) for v in values]
    places = [(int(rng.integers(len(index))), rng.permutation(index.grid[0] * index.grid[1])[:4].tolist()) for _ in range(max(1, clicks // 4))]
    for which in "not yet decoded", "in memory":
        moves, picks = found[f"next image, images {which}"], found[f"click, images {which}"] = [], []
        for i, patches in places:
            moves.append(timed(explorer.show, i))
            picks += set_to(explorer.image_part.picker, "patch", patches)
    found["alpha slider"] = set_to(explorer.image_part.alpha, "value", np.linspace(0, 1, 20))
    found["search"] = set_to(explorer.list_part.text, "value", ("class 7", "class 12", "19", ""))
    found["sort"] = set_to(explorer.list_part.order, "value", ("most images", "most of one class", "largest effect"))
    found["class"] = set_to(explorer.class_part.choice, "value", (3, 5, 8))
    found["branches, first time"] = [timed(explorer.branch_part.forward_with_tokens.click)]
    return {k: np.array(v) for k, v in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(images=50_000, objects=2048, classes=1000, clicks=60).items(): parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", help="keep the index here, and use it again")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp()) / "index"
    index = open_index(folder) if (folder / "index.json").exists() else synthetic_index(folder, args.images, args.objects, args.classes)
    print(f"{len(index):,} images, K = {len(index.patches):,}, {len(index.classes):,} classes, {index.grid} patches")
    for name, ms in measure(index, args.clicks).items(): print(f"{name:<36} median {np.median(ms):7.0f} ms   95 % {np.quantile(ms, .95):7.0f} ms   n = {len(ms)}")
