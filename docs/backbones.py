"""Write docs/backbones.md: every architecture that timm lists, whether it can be a backbone, and why not.

    python docs/backbones.py

Everything is built on the meta device, without memory for weights, in a few minutes.
"""
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import timm
import torch

from llb.core.errors import InputError
from llb.models.backbone import _check_vit, _default_size, _preprocessing, _probe, _projects, Backbone, load_backbone

PAGE = Path(__file__).with_suffix(".md")
SKELETON = Path(__file__).with_name("backbones.in.md")


def module_of(name):
    "The file of timm that defines an architecture."
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def facts(backbone, depth=None, classes=None):
    "What the table says of a backbone."
    sizes = f"{backbone.image_size[0]} x {backbone.image_size[1]}"
    depth, classes = depth or backbone.depth, backbone.num_classes if classes is None else classes
    return f"{sizes} | {backbone.patch_size} | {backbone.dim} | {depth} | {backbone.num_prefix} | {classes or 'none'}"


@contextmanager
def shapes_only():
    "Models on the meta device whose parameters are not drawn at random: without numbers that takes most of the time."
    names = [n for n in dir(torch.nn.init) if n.endswith("_") and not n.startswith("_")]
    with (torch.device("meta"), patch.multiple(torch.nn.init, **dict.fromkeys(names, lambda tensor, *_, **__: tensor)),
          patch("timm.layers.weight_init._trunc_normal_", lambda tensor, *_: tensor)):
        yield


def two_blocks(name):
    "The facts of an architecture. Only two of its blocks are run, for all are alike."
    with shapes_only():
        vit = timm.create_model(name)
    _check_vit(vit, name)
    depth, classes = len(vit.blocks), 0 if _projects(name, vit.num_classes) else vit.num_classes
    vit.blocks = vit.blocks[:2]
    preprocessing = _preprocessing("timm", _default_size(vit), vit.pretrained_cfg)
    backbone = Backbone(vit, dict(name=name, pretrained=False), "random", preprocessing)
    _probe(backbone)
    return facts(backbone, depth, classes)


def verdict(name):
    "Facts and no reason, or no facts and why it is refused."
    try:
        return two_blocks(name), ""
    except Exception:   # or two blocks are not enough for it
        pass
    try:
        with shapes_only():
            return facts(load_backbone(name, pretrained=False)), ""
    except InputError as e:
        reason = str(e).removeprefix(f"{name} ")
        return "", reason[reason.find("(") + 1:reason.rfind(")")] if "(" in reason else reason


def survey():
    "Of all that timm lists: module -> name -> facts, reason."
    names, found = timm.list_models(), defaultdict(dict)
    with ProcessPoolExecutor(2) as pool:
        for name, said in zip(names, pool.map(verdict, names, chunksize=20), strict=True):
            found[module_of(name)][name] = said
    return found


def page(found):
    "The page, with its tables filled in."
    runs, refused = [], []
    for module in sorted(found):
        rows = [f"| `{name}` | {row} |" for name, (row, _) in found[module].items() if row]
        if rows:
            runs += [f"\n### {module} ({len(rows)})\n", "| name | image | patch | width | blocks | prefix | classes |",
                     "|---|---|---|---|---|---|---|", *rows]
        reasons = defaultdict(list)
        for name, (row, reason) in found[module].items():
            if not row: reasons[reason].append(f"`{name}`")
        for reason, names in reasons.items():
            refused += [f"\n**{module}** ({len(names)}): {reason}\n", "<details><summary>names</summary>\n",
                        " ".join(names), "\n</details>"]
    total = sum(map(len, found.values()))
    count = sum(bool(row) for names in found.values() for row, _ in names.values())
    return SKELETON.read_text(encoding="utf-8").format(
        version=timm.__version__, total=f"{total:,}", runs=count, refused=f"{total - count:,}",
        table_of_runs="\n".join(runs).strip(), table_of_refused="\n".join(refused).strip())


if __name__ == "__main__":
    PAGE.write_text(page(survey()), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8").partition("## ")[0])
