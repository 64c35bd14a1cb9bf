"""Saved models: what they carry, and what is said of folders that are damaged, of another version, or none at all."""
import json
import os
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from llb.core.errors import InputError
from llb.models.backbone import load_backbone
from llb.models.heads import HeadModel
from llb.models.llb import LLB
from llb.models.weights import read_state_dict


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A small saved LLB; not to be changed."
    torch.manual_seed(0)
    backbone = load_backbone("test_vit", pretrained=False, image_size=32, num_classes=3)
    model = LLB(backbone, num_objects=8, num_layers=2, target_layer=3)
    model.classes, model.provenance = ["circle", "square", "triangle"], {"dataset": "shapes", "epochs": 2}
    model.metrics = {"fused": {"top1": 2 / 3, "nll": .9}, "seen": {"scored": 9},
                     "alpha": {"value": .4, "chosen": "was given"}}
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    "One that may be damaged."
    return shutil.copytree(saved, tmp_path / "model")


def test_a_saved_model_carries_all_it_takes_to_predict(saved, images):
    model = HeadModel.from_pretrained(saved)
    assert type(model) is LLB and model.classes == ["circle", "square", "triangle"] and not model.training
    assert model.provenance["dataset"] == "shapes" and model.metrics["seen"]["scored"] == 9
    found = model.predict(next(images.rglob("*.png")))
    assert found.classes == model.classes and set(found.probabilities) == {"visual", "label", "fused"}


def test_the_card_is_one_of_the_hub(saved):
    card = ModelCard.load(saved / "README.md")
    header = card.data.to_dict()
    assert header["library_name"] == "llb" and header["pipeline_tag"] == "image-classification"
    assert header["license"] == "unknown", "the backbone is random"
    assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == round(2 / 3, 4)
    for words in "n = 9 images", "alpha 0.4", "| fused | 66.7% | 0.900 |", "shapes", "circle, square", "## Limits":
        assert words in card.text, words


def test_a_model_sees_images_as_in_training_whatever_backbone_is_passed(saved, images):
    model = LLB.from_pretrained(saved)
    other = load_backbone("test_vit", pretrained=False, image_size=32, num_classes=3)
    other.vit.load_state_dict(model.backbone.vit.state_dict())
    other.preprocessing = type(other.preprocessing)((32, 32), (0, 0, 0), (1, 1, 1), crop_pct=.5)
    again = LLB.from_pretrained(saved, backbone=other)
    file = next(images.rglob("*.png"))
    assert torch.equal(again.predict(file).probabilities["fused"], model.predict(file).probabilities["fused"])
    assert other.preprocessing.crop_pct == .5, "what was passed is left as it is"
    large = load_backbone("test_vit", pretrained=False, image_size=64, num_classes=3)
    with pytest.raises(InputError, match="image_size"): LLB.from_pretrained(saved, backbone=large)


def changed(change):
    "Damage that changes config.json."
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
    return damage


def weights(change):
    "Damage that changes all tensors."
    def damage(folder):
        state = load_file(folder / "model.safetensors")
        save_file({name: change(value).contiguous() for name, value in state.items()}, folder / "model.safetensors")
    return damage


def text(content): return lambda folder: (folder / "config.json").write_bytes(content)


DAMAGE = {
    "config.json is missing": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "config.json is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "no config.json"),
    "config.json is empty": (text(b""), "config.json' is damaged"),
    "config.json is cut": (text(b'{"format": 3, "mo'), "config.json' is damaged"),
    "config.json is a list": (text(b"[1, 2]"), "does not describe a model"),
    "config.json is not UTF-8": (text(b'{"format": "\xff"}'), "config.json' is damaged"),
    "config.json is another library's": (text(b'{"architectures": ["ViT"]}'), "does not describe a model"),
    "of 0.1": (changed(lambda c: (c.pop("format"), c.pop("llb"))), "format 1 by llb 0.1; this is llb"),
    "of a later version": (changed(lambda c: c.update(format=9, llb="9.1")), "format 9 by llb 9.1; this is llb"),
    "without classes": (changed(lambda c: c.pop("classes")), "classes missing"),
    "without a backbone's name": (changed(lambda c: c["frozen"].pop("spec")), "frozen.spec missing"),
    "a backbone that is a list": (changed(lambda c: c.update(frozen=[])), "frozen, frozen.spec"),
    "strange preprocessing": (changed(lambda c: c["frozen"]["preprocessing"].update(gamma=2)), "gamma"),
    "an unknown setting": (changed(lambda c: c["model"].update(sparsity=2)), "sparsity"),
    "a setting of another type": (changed(lambda c: c["model"].update(num_objects="many")), "num_objects|does not fit"),
    "another kind": (changed(lambda c: c.update(kind="Oracle")), "of kind Oracle"),
    "another K": (changed(lambda c: c["model"].update(num_objects=9)), "size mismatch"),
    "another layer": (changed(lambda c: c["model"].update(target_layer=99)), "target_layer is 99"),
    "other classes": (changed(lambda c: c["classes"].pop()), "2 class names"),
    "weights are missing": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "weights are cut": (lambda f: os.truncate(f / "model.safetensors", 3000), "does not hold this model's weights"),
    "weights are empty": (lambda f: os.truncate(f / "model.safetensors", 0), "does not hold this model's weights"),
    "int8 weights": (weights(lambda w: w.to(torch.int8)), "is torch.int8"),
    "NaN weights": (weights(lambda w: torch.full_like(w, torch.nan)), "not finite"),
    "infinite weights": (weights(lambda w: w / 0), "not finite"),
    "the backbone is missing": (lambda f: (f / "backbone.safetensors").unlink(), "backbone"),
    "the backbone is empty": (lambda f: os.truncate(f / "backbone.safetensors", 0), "backbone.safetensors"),
    "another backbone": (changed(lambda c: c["frozen"].update(content_hash="0" * 16)), "0000000000000000"),
    "an unknown backbone": (changed(lambda c: c["frozen"]["spec"].update(name="vit_nope")), "Unknown backbone"),
    "a backbone's option from elsewhere": (changed(lambda c: c["frozen"]["spec"].update(colour=1)), "colour"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_a_sentence(how, copy):
    damage, words = DAMAGE[how]
    damage(copy)
    with pytest.raises(InputError, match=words) as error: LLB.from_pretrained(copy)
    assert len(str(error.value)) < 800 and "Traceback" not in str(error.value)


def test_models_in_lower_precision_are_read(copy):
    weights(lambda w: w.bfloat16())(copy)
    assert LLB.from_pretrained(copy).branch.dtype == torch.bfloat16


def test_what_is_nowhere_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "gone")
    for source in "/typo", "typo", "somebody/llb-model", "no such/name/at all", dangling:
        with pytest.raises(InputError, match="There is no folder"): LLB.from_pretrained(source)


def test_an_empty_checkpoint_is_a_sentence(tmp_path):
    for suffix in ".pth", ".safetensors", ".npz":
        (tmp_path / f"empty{suffix}").touch()
        with pytest.raises(InputError, match="cannot be read as weights"): read_state_dict(tmp_path / f"empty{suffix}")
