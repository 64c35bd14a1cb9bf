"""Backbones, files of weights, checkpoints and saved models that are missing, damaged, or another's."""

import json
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llb.models.backbone import load_backbone
from llb.models.llb import LLB
from llb import load_reference_checkpoint, to_reference_state_dict
from llb.runs.checkpoints import load_checkpoint, load_newest
from llb.runs.folder import RunReader


def named(name, **options):
    return lambda s: load_backbone(name, pretrained=False, image_size=32, **options)


def from_file(content, name="w.pth"):
    "A backbone from a file of one's own; `content(shop)` gives bytes, or what is saved."

    def act(shop):
        path, found = shop.here / name, content(shop)
        if isinstance(found, bytes):
            path.write_bytes(found)
        elif name.endswith("npz"):
            np.savez(path, **found)
        elif name.endswith("safetensors"):
            save_file(found, path)
        else:
            torch.save(found, path)
        return load_backbone("test_vit.r160_in1k", checkpoint=str(path), image_size=32)

    return act


def state(shop):
    return shop.backbone().vit.state_dict()


def without(shop, name):
    return {k: v for k, v in state(shop).items() if k != name}


def saved(spoil, **options):
    "Spoil the folder of a saved model, then load it."

    def act(shop):
        spoil(shop.model)
        return LLB.from_pretrained(shop.model, **options)

    return act


def config(**change):
    "Change config.json of a saved model; None takes a name out."

    def spoil(folder):
        path = folder / "config.json"
        found = {k: v for k, v in {**json.loads(path.read_text()), **change}.items() if v is not None}
        path.write_text(json.dumps(found))

    return spoil


def frozen(**change):
    def spoil(folder):
        found = json.loads((folder / "config.json").read_text())["frozen"]
        config(frozen={**found, **change})(folder)

    return spoil


def setting(**change):
    def spoil(folder):
        found = json.loads((folder / "config.json").read_text())["model"]
        config(model={**found, **change})(folder)

    return spoil


def tensors(change):
    "Change the weights of a saved model."

    def spoil(folder):
        found = load_file(folder / "model.safetensors")
        save_file(change(found), folder / "model.safetensors")

    return spoil


def put(name, content=b""):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-99])


def gone(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def to_int8(found):
    return {k: v.to(torch.int8) for k, v in found.items()}


def nan_head(found):
    return {**found, "classifier.weight": found["classifier.weight"] * float("nan")}


def fewer_objects(found):
    return {k: v[:5].clone() if v.shape[:1] == (8,) and "objects" in k else v for k, v in found.items()}


def other_backbone(shop):
    return LLB.from_pretrained(shop.shared.run / "model", backbone=shop.backbone(seed=9, num_classes=3))


def checkpoint(spoil):
    "Spoil the newest checkpoint of a run, then read it."

    def act(shop):
        newest = sorted((shop.run / "checkpoints").glob("step-*"))[-1]
        spoil(newest)
        return str(len(load_checkpoint(newest)))

    return act


def all_damaged(shop):
    for folder in (shop.run / "checkpoints").glob("step-*"):
        cut("state.safetensors")(folder)
    return str(load_newest(shop.run / "checkpoints"))


def released(content, **options):
    "A checkpoint of the release."

    def act(shop):
        torch.save(content(shop), shop.here / "x.pth")
        return load_reference_checkpoint(
            shop.here / "x.pth", **{"num_heads": 4, "target_layer": 3, "alpha": 0.5, **options}
        )

    return act


def in_release_form(shop):
    return to_reference_state_dict(LLB.from_pretrained(shop.shared.run / "model"), "vit")


def weights_of_another(shop):
    other = shop.backbone(seed=5, num_classes=3)
    save_file(other.vit.state_dict(), shop.here / "other.safetensors")
    return shop.train(
        nv_weights=shop.shared.run / "model", checkpoint=shop.here / "other.safetensors", random_backbone=False
    )


BACKBONES = {
    "a name of nothing": (named("vitt_base_patch16"), "vitt_base_patch16.*ear"),
    "an empty name": (named(""), "''|must name"),
    "a convolutional network": (named("resnet18"), "resnet18"),
    "a hybrid without patches": (named("swin_tiny_patch4_window7_224"), "swin"),
    "a name with a tag that is not there": (
        lambda s: load_backbone("vit_tiny_patch16_224.nobody", image_size=32),
        "nobody",
    ),
    "image_size 0": (lambda s: load_backbone("test_vit", pretrained=False, image_size=0), "image_size|0"),
    "image_size -32": (lambda s: load_backbone("test_vit", pretrained=False, image_size=-32), "-32"),
    "image_size 33": (lambda s: load_backbone("test_vit", pretrained=False, image_size=33), "33"),
    "image_size too large for memory": (
        lambda s: load_backbone("test_vit", pretrained=False, image_size=10**7),
        "image_size|10000000|memory",
    ),
    "-1 classes": (named("test_vit", num_classes=-1), "num_classes"),
    "a layer that is not there": (lambda s: s.train(target_layer=99), "99"),
    "patches larger than the image": (lambda s: s.train(image_size=8), "8"),
    "a method's name misspelt": (
        lambda s: s.train("--method", "mae_in1k_ft_in2k", backbone=None, random_backbone=None),
        "mae_in1k_ft_in2k",
    ),
    "a size the method does not have": (
        lambda s: s.train("--method", "mae_in1k_ft_in1k", "--vit_size", "Tiny", backbone=None),
        "[Tt]iny",
    ),
}

FILES = {
    "no such file": (lambda s: load_backbone("test_vit", checkpoint="/nope.pth", image_size=32), "/nope.pth"),
    "a folder": (lambda s: load_backbone("test_vit", checkpoint=str(s.here), image_size=32), "file"),
    "an empty .pth": (from_file(lambda s: b""), "w.pth"),
    "an empty .safetensors": (from_file(lambda s: b"", "w.safetensors"), "w.safetensors"),
    "an empty .npz": (from_file(lambda s: b"", "w.npz"), "w.npz"),
    "text": (from_file(lambda s: b"<html>404</html>"), "w.pth"),
    "a pickle that runs code": (from_file(lambda s: b"cos\nsystem\n(S'true'\ntR."), "w.pth"),
    "an array of objects": (from_file(lambda s: {"a": np.array([{}], dtype=object)}, "w.npz"), "w.npz"),
    "no tensors": (from_file(lambda s: {"epoch": 3}), "w.pth|tensor|keys"),
    "a list": (from_file(lambda s: [1, 2]), "w.pth"),
    "one tensor": (from_file(lambda s: torch.zeros(3)), "w.pth"),
    "a key too few": (from_file(lambda s: without(s, "norm.weight")), r"norm\.weight"),
    "a key too many": (from_file(lambda s: {**state(s), "strange": torch.zeros(2)}), "strange"),
    "another width": (
        from_file(lambda s: {k: v[..., :-1] if v.ndim > 1 else v for k, v in state(s).items()}),
        "w.pth|shape|size",
    ),
    "whole numbers": (from_file(lambda s: to_int8(state(s))), "w.pth|int8|floating"),
    "numbers that are none": (
        from_file(lambda s: {**state(s), "norm.weight": state(s)["norm.weight"] * float("nan")}),
        r"finite|NaN|nan",
    ),
    "another architecture": (from_file(lambda s: {"conv1.weight": torch.zeros(64, 3, 7, 7)}), "w.pth|conv1"),
    "wrapped and prefixed": (
        from_file(lambda s: {"state_dict": {f"module.{k}": v for k, v in state(s).items()}}),
        None,
    ),
    "without the endings' truth": (from_file(lambda s: b"PK\3\4", "w.safetensors"), "w.safetensors"),
}

SAVED = {
    "no such folder or repository": (lambda s: LLB.from_pretrained("/nope"), "/nope"),
    "an empty folder": (lambda s: LLB.from_pretrained(s.here), "config.json"),
    "a file": (lambda s: LLB.from_pretrained(s.write("model.pth", "x")), "model.pth"),
    "a run instead of its model": (lambda s: LLB.from_pretrained(s.shared.run), "model.safetensors|model"),
    "no config.json": (saved(gone("config.json")), "config.json"),
    "an empty config.json": (saved(put("config.json")), "config.json"),
    "a cut off config.json": (saved(cut("config.json")), "config.json"),
    "config.json is a list": (saved(put("config.json", b"[]")), "config.json"),
    "config.json is binary": (saved(put("config.json", b"\xff\xfe\0")), "config.json"),
    "config.json without model": (saved(config(model=None)), "config.json"),
    "config.json without frozen": (saved(config(frozen=None)), "config.json"),
    "config.json without kind": (saved(config(kind=None)), "config.json|kind"),
    "config.json without parts": (saved(config(parts=None)), "config.json|parts"),
    "frozen without spec": (saved(config(frozen={})), "config.json|frozen"),
    "frozen of a strange spec": (
        saved(config(frozen={"spec": {"colour": 3}, "source": "", "content_hash": ""})),
        "config.json|frozen|colour",
    ),
    "model is a list": (saved(config(model=[1])), "config.json|model"),
    "a strange setting": (saved(setting(colour=3)), "colour"),
    "a setting of the wrong type": (saved(setting(num_objects="8")), "num_objects"),
    "a negative setting": (saved(setting(num_layers=-2)), "num_layers"),
    "another number of objects": (saved(setting(num_objects=9)), "model.safetensors"),
    "another number of classes": (saved(setting(num_classes=4)), "model.safetensors|classes"),
    "a layer that is not there": (saved(setting(target_layer=99)), "99"),
    "another format": (saved(config(format=1)), "format 1"),
    "another kind": (saved(config(kind="Cathedral")), "Cathedral"),
    "a part nobody has": (saved(config(parts={"assigner": "nobody:Nothing"})), "nobody:Nothing"),
    "too few class names": (saved(config(classes=["a"])), "class"),
    "class names are a number": (saved(config(classes=3)), "class"),
    "no weights": (saved(gone("model.safetensors")), "model.safetensors"),
    "empty weights": (saved(put("model.safetensors")), "model.safetensors"),
    "cut off weights": (saved(cut("model.safetensors")), "model.safetensors"),
    "weights of whole numbers": (saved(tensors(to_int8)), "model.safetensors"),
    "weights that are none": (saved(tensors(nan_head)), "finite|NaN|nan"),
    "weights of fewer objects": (saved(tensors(fewer_objects)), "model.safetensors"),
    "weights without a tensor": (
        saved(tensors(lambda t: {k: v for k, v in t.items() if k != "cls_token"})),
        "cls_token",
    ),
    "another backbone's content": (saved(frozen(content_hash="0" * 16)), "0000"),
    "backbone= another": (other_backbone, "backbone"),
    "backbone= a name": (lambda s: LLB.from_pretrained(s.shared.run / "model", backbone="test_vit"), "backbone"),
}

CHECKPOINTS = {
    "no manifest": (checkpoint(gone("manifest.json")), "damaged"),
    "an empty manifest": (checkpoint(put("manifest.json")), "damaged"),
    "a manifest that is a list": (checkpoint(put("manifest.json", b"[]")), "damaged"),
    "a cut off state": (checkpoint(cut("state.safetensors")), "state.safetensors"),
    "a changed state": (checkpoint(put("state.json", b"{}")), "state.json"),
    "no state": (checkpoint(gone("state.json")), "state.json"),
    "no such checkpoint": (lambda s: str(load_checkpoint(s.here / "step-1")), "step-1"),
    "all damaged": (all_damaged, "damaged"),
    "--nv_weights of nothing": (lambda s: s.train(nv_weights="/typo"), "/typo"),
    "--nv_weights missing.pth": (lambda s: s.train(nv_weights="missing.pth"), "missing.pth"),
    "--nv_weights empty": (lambda s: s.train(nv_weights=s.write("x.pth", b"")), "x.pth"),
    "--nv_weights a run": (lambda s: s.train(nv_weights=s.shared.run), "model.safetensors|model"),
    "--nv_weights of other settings": (lambda s: s.train(nv_weights=s.shared.run / "model", num_objects=9), "9"),
    "--nv_weights of another backbone": (weights_of_another, "backbone"),
    "release: no tensors": (released(lambda s: {"epoch": 1}), "x.pth|tensor|checkpoint"),
    "release: a backbone's weights": (released(lambda s: state(s)), "x.pth|checkpoint|keys"),
    "release: num_heads 0": (released(in_release_form, num_heads=0), "num_heads"),
    "release: another target_layer": (released(in_release_form, target_layer=99), "99"),
    "checkpoint of a run that is not there": (
        lambda s: RunReader(s.shared.run).load_model() and load_checkpoint(s.shared.run / "checkpoints" / "best"),
        "best",
    ),
}

CASES = {
    **{f"backbone {n}": c for n, c in BACKBONES.items()},
    **{f"file: {n}": c for n, c in FILES.items()},
    **{f"saved: {n}": c for n, c in SAVED.items()},
    **{f"checkpoint: {n}": c for n, c in CHECKPOINTS.items()},
}
