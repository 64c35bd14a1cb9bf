"""How long a click in the explorer takes: a synthetic index, with the bundled images behind it.

    python benchmarks/explorer.py [--images 50000] [--objects 2048] [--classes 1000] [--clicks 60] [--folder FOLDER]

Prints milliseconds from a click to everything being sent to the page, first for images that were never decoded, then
for those still in memory. The browser's own work is not in it: see tests/test_browser_explorer.py.
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


def random_batch(rng, own, count:int, patches:int, objects:int)->dict[str, np.ndarray]:
    "Images of random classes; 70 % of their patches are objects that the class likes (own [C,12]), the others any."
    classes = len(own)
    label = rng.integers(0, classes, count)
    liked = own[label][np.arange(count)[:, None], rng.integers(0, 12, (count, patches // 4))].repeat(4, 1)
    first = np.where(rng.random((count, patches)) < .7, liked, rng.integers(0, objects, (count, patches)))
    confidence = rng.beta(2, 2, (count, patches)).astype(np.float32)
    logits = {f"{who}_logits": rng.normal(size=(count, classes)) + 4 * np.eye(classes)[label]
              for who in ("visual", "label")}
    return dict(label=label, objects=liked[:, :32:4], fractions=np.full((count, 8), .1), first=first,
                confidence=confidence, **logits)


def add_image(sums:dict[str, np.ndarray], first:np.ndarray, label:int):
    "Count the objects [N] of an image."
    ids, counts = np.unique(first, return_counts=True)
    sums["patches"][ids] += counts
    sums["image_counts"][ids] += 1
    sums["class_patches"][label, ids] += counts
    sums["class_images"][label, ids] += 1
    sums["together"][np.ix_(ids[:20], ids[:20])] += 1
    sums["class_count"][label] += 1


def synthetic_index(folder:Path, images:int=50_000, objects:int=2048, classes:int=1000, grid:tuple[int, int]=(14, 14),
                    dim:int=64, seed:int=0)->ObjectIndex:
    "Write an index whose objects prefer some classes, without any model."
    rng, folder, K, C = np.random.default_rng(seed), Path(folder), objects, classes
    folder.mkdir(parents=True)
    clipart = load_data(Path(__file__).parent.parent / "data/openclipart").val
    own = rng.integers(0, K, (C, 12))
    preprocessing = asdict(Preprocessing((16 * grid[0], 16 * grid[1]), (.5,) * 3, (.5,) * 3))
    info = {"model": f"synthetic{seed}", "settings": {"alpha": .5, "num_objects": K}, "backbone": "none",
            "grid": list(grid), "preprocessing": preprocessing, "classes": [f"class {c}" for c in range(C)],
            "images": images, "fingerprint": "synthetic", "content": "synthetic", "root": str(clipart.root.resolve())}
    shapes = {"patches": (K,), "image_counts": (K,), "patch_entropy": (K,), "class_patches": (C, K),
              "class_images": (C, K), "together": (K, K), "class_count": (C,), "object_visual": (K, dim),
              "object_label": (K, dim), "class_visual": (C, dim), "class_label": (C, dim)}
    sums = {name: np.zeros(shape) for name, shape in shapes.items()}
    rows, sample = new_rows(folder, info), PatchSample(K, 128)
    thousands = np.array_split(np.arange(images), max(1, images // 1000))
    for numbers in thousands:
        batch = random_batch(rng, own, len(numbers), grid[0] * grid[1], K)
        rows.put(numbers, **batch)
        sample.add(numbers, batch["first"], batch["confidence"])
        for first, label in zip(batch["first"], batch["label"]): add_image(sums, first, label)
    files = [clipart.files[i % len(clipart)] for i in range(images)]
    save_index(folder, info, files, {**sums, "mass": sums["patches"].copy()}, sample.exemplars(), sample.exemplars())
    index = open_index(folder)
    effects = new_effects(folder / "effects", index, 8)
    for numbers in thousands:
        values = {name: rng.normal(size=(len(numbers), 8)) for name in ("effect", "random", "predicted_effect")}
        effects.put(numbers, objects=index.rows["objects"][numbers], predicted=index.rows["label"][numbers], **values)
    return index


def timed(what, *args)->float: # milliseconds
    began = time.perf_counter()
    what(*args)
    return 1e3 * (time.perf_counter() - began)


def measure(index:ObjectIndex, clicks:int=60, seed:int=0)->dict[str, np.ndarray]: # milliseconds by action
    "Click patches, first of new images, then of the same ones."
    from llb.apps.explorer import Explorer
    explorers, rng = [], np.random.default_rng(seed)
    found = {"open the explorer": [timed(lambda: explorers.append(Explorer(index)))]}
    explorer, panels = explorers[0], explorers[0].panels
    def set_to(widget, trait, values): return [timed(setattr, widget, trait, value) for value in values]
    patches = index.grid[0] * index.grid[1]
    visits = [(int(rng.integers(len(index))), rng.permutation(patches)[:4].tolist())
              for _ in range(max(1, clicks // 4))]
    for which in "not yet decoded", "in memory":
        moves = found[f"next image, images {which}"] = []
        picks = found[f"click, images {which}"] = []
        for i, chosen in visits:
            moves.append(timed(explorer.show, i))
            picks += set_to(panels["image"].picker, "patch", chosen)
    found["alpha slider"] = set_to(panels["image"].alpha, "value", np.linspace(0, 1, 20))
    found["search"] = set_to(panels["list"].text, "value", ("class 7", "class 12", "19", ""))
    found["sort"] = set_to(panels["list"].order, "value", ("most images", "most of one class", "largest effect"))
    found["class"] = set_to(panels["class"].choice, "value", (3, 5, 8))
    found["branches, first time"] = [timed(panels["branch"].count.click)]
    return {name: np.array(ms) for name, ms in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(images=50_000, objects=2048, classes=1000, clicks=60).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", help="keep the index here, and use it again")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp()) / "index"
    if (folder / "index.json").exists(): index = open_index(folder)
    else: index = synthetic_index(folder, args.images, args.objects, args.classes)
    print(f"{len(index):,} images, K = {len(index.patches):,}, {len(index.classes):,} classes, {index.grid} patches")
    for name, ms in measure(index, args.clicks).items():
        print(f"{name:<36} median {np.median(ms):7.0f} ms   95 % {np.quantile(ms, .95):7.0f} ms   n = {len(ms)}")


if __name__ == "__main__": main()
