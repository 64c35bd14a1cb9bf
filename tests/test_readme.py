"""The README's blocks of code run, with a small random backbone where a model hub would be asked."""
import re
from pathlib import Path

import pytest
import torch

import llb

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch, images):
    "A folder with what the README takes for granted: one image, a finished run, no model hub."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/dog.jpg").write_bytes(next(images.rglob("*.png")).read_bytes())
    small = llb.load_backbone("test_vit", pretrained=False, num_classes=5, image_size=160)
    monkeypatch.setattr("llb.models.backbone.load_backbone", lambda name: small)
    return tmp_path


def test_the_block_on_models_runs(place):
    block, = (b for b in BLOCKS if "load_backbone" in b)
    block = block.replace("target_layer=11", "target_layer=4").replace("num_objects=2048", "num_objects=16")
    known = {"images": torch.randn(2, 3, 160, 160), "labels": torch.tensor([0, 3])}
    exec(compile(block, "README.md", "exec"), known)
    assert known["out"].label_logits.shape == (2, 5) and known["terms"]["loss"].isfinite()
