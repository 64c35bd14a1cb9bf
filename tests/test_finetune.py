"""`--objective visual`: a backbone fine-tuned, stopped and resumed, and LLB trained on the file it writes."""
import json

import pytest
import torch
from safetensors.torch import load_file

from llb.models.backbone import load_backbone
from llb.models.llb import LLB
from llb.runs.folder import read_events

VISUAL = dict(objective="visual", epochs=2, lr=3e-3, warmup_epochs=0.5, weight_decay=0.05)


def backbone_of(folder): return folder / "run" / "backbone.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_backbone_is_fine_tuned_and_llb_trained_on_it(forked, images, tmp_path, processes):
    run = forked(processes, **VISUAL, data_dir=images, save_dir=tmp_path / "v")
    assert set(run.finish()) == {0}, run.text
    folder = tmp_path / "v" / "run"
    left = {p.name for p in folder.iterdir()}
    assert left == {"config.json", "events.jsonl", "metrics.json", "checkpoints", "backbone.safetensors"}
    metrics, about = (json.loads((folder / name).read_text()) for name in ("metrics.json", "config.json"))
    assert metrics["objective"] == "visual" and metrics["seen"]["unique"] == metrics["seen"]["images"] == 12
    assert about["processes"] == processes and about["backbone"]["source"] == "random"
    assert about["config"]["layer_decay"] == .75
    epochs = read_events(folder, "epoch")
    assert len(epochs) == 2 and set(epochs[0]["terms"]) == {"loss"} and read_events(folder)[-1]["reason"] == "done"
    backbone = load_backbone("test_vit.r160_in1k", checkpoint=backbone_of(tmp_path / "v"), num_classes=3)
    assert backbone.num_classes == 3 and backbone.image_size == (32, 32)
    started = load_backbone("test_vit.r160_in1k", pretrained=False, image_size=32).vit.state_dict()
    state = backbone.vit.state_dict()
    assert all(torch.isfinite(v).all() for v in state.values()) and set(started) == set(state)

    llb = forked(1, data_dir=images, save_dir=tmp_path / "l", random_backbone=False, epochs=1,
                 encoder_weight=backbone_of(tmp_path / "v"))
    assert llb.finish() == [0], llb.text
    model = LLB.from_pretrained(tmp_path / "l" / "run" / "model")
    assert model.backbone.content_hash() == backbone.content_hash() and model.branch.visual_head is None
    fused = json.loads((tmp_path / "l" / "run" / "metrics.json").read_text())
    for name in "top1", "nll": assert fused["visual"][name] == pytest.approx(metrics["visual"][name], abs=1e-5)


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_writes_the_same_backbone(forked, images, tmp_path):
    flags = dict(**VISUAL, data_dir=images, micro_batches=2)
    for name, options in dict(whole=flags, part={**flags, "epochs": 1}).items():
        run = forked(2, **options, lr_scheduler="none", save_dir=tmp_path / name)
        assert set(run.finish()) == {0}, run.text
    backbone_of(tmp_path / "part").unlink()
    run = forked(2, **flags, lr_scheduler="none", save_dir=tmp_path / "part", resume=True)
    assert set(run.finish()) == {0}, run.text
    assert "Resuming at step" in run.text
    whole, part = (load_file(backbone_of(tmp_path / name)) for name in ("whole", "part"))
    assert all(torch.equal(whole[k], part[k]) for k in whole)
