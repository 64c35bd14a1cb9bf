"""The training command on a folder of small images, from the outside: what it leaves, and what it says to bad input."""
import json
import random
import re
import shutil

import pytest
import torch
from conftest import draw, make_images
from safetensors.torch import load_file

from llb.models.llb import LLB
from llb.runs.folder import read_events

pytestmark = pytest.mark.slow
METRICS = {"top1", "nll", "brier", "ece"}


def parameters(folder): return load_file(folder / "model" / "model.safetensors")


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def checkpoint_names(folder): return sorted(p.name for p in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_whole_run(processes, images, tmp_path, train):
    run = train(processes, data_dir=images, save_dir=tmp_path, save_every=2, local_diversity=False).finish(90)
    assert run.code == 0, run.err
    assert "Traceback" not in run.err and run.out.count("epoch ") + run.err.count("epoch ") >= 3
    run.wait_until_gone()
    folder = tmp_path / "run"
    left = {p.name for p in folder.iterdir()}
    assert left == {"config.json", "events.jsonl", "metrics.json", "predictions.safetensors", "checkpoints", "model",
                    "snapshots"}

    about = json.loads((folder / "config.json").read_text())
    assert about["config"]["num_objects"] == 8
    assert about["processes"] == processes and about["global_batch"] == 8 * processes
    assert torch.__version__.startswith(about["environment"]["torch"])
    assert {"python", "timm", "commit"} <= set(about["environment"])
    assert about["backbone"]["source"] == "random" and len(about["backbone"]["content_hash"]) == 16
    classes = ["circle", "square", "triangle"]
    assert about["classes"] == classes and set(about["splits"]) == {"train", "selection", "val"}

    metrics = json.loads((folder / "metrics.json").read_text())
    for name in "visual", "label", "fused", "alpha_0.5", "alpha_0.8": assert METRICS <= set(metrics[name])
    assert metrics["seen"]["images"] == metrics["seen"]["scored"] == metrics["seen"]["unique"] == 12
    assert metrics["seen"]["fingerprint"] == about["splits"]["val"]["fingerprint"]
    assert "selection split" in metrics["alpha"]["chosen"] and set(metrics["class_top1"]) == set(classes)
    chosen = metrics["chosen_epoch"]
    assert 1 <= chosen["epoch"] <= 3 and chosen["by"] == "lowest fused NLL on the selection split"

    predictions = load_file(folder / "predictions.safetensors")
    assert predictions["index"].tolist() == list(range(12))
    assert {f"{p}_{v}" for p in ("visual", "label", "fused") for v in ("top1", "probability")} <= set(predictions)
    right = predictions["fused_top1"] == predictions["label"]
    assert right.double().mean().item() == pytest.approx(metrics["fused"]["top1"])

    events = read_events(folder)
    per_epoch = 42 // (8 * processes)
    assert events[0]["kind"] == "start" and events[-1]["kind"] == "end" and events[-1]["reason"] == "done"
    assert [e["step"] for e in events if e["kind"] == "step"] == list(range(1, 3 * per_epoch + 1))
    epochs = [e for e in events if e["kind"] == "epoch"]
    assert [e["epoch"] for e in epochs] == [1, 2, 3]
    assert min((e["selection"]["fused"]["nll"], e["step"]) for e in epochs)[1] == chosen["step"]
    for e in epochs:
        assert {"loss", "cross_entropy", "entropy", "patch_entropy"} <= set(e["terms"])
        assert e["lr"] > 0 and e["images_per_s"] > 0 and METRICS <= set(e["selection"]["fused"])
    kept = sorted({chosen["step"], 2 * per_epoch, 3 * per_epoch})
    assert checkpoint_names(folder) == [f"step-{s:08d}" for s in kept]
    model = LLB.from_pretrained(folder / "model")
    assert model.alpha == metrics["alpha"]["value"]
    assert model.backbone.content_hash() == about["backbone"]["content_hash"]


def test_workers_see_the_same_pixels(images, tmp_path, forked):
    options = dict(data_dir=images, save_dir=tmp_path)
    for name, workers in ("none", 0), ("two", 2):
        assert forked(**options, name=name, workers=workers, augment="randaugment").finish() == [0]
    assert equal(parameters(tmp_path / "none"), parameters(tmp_path / "two"))
    assert (tmp_path / "none/metrics.json").read_text() == (tmp_path / "two/metrics.json").read_text()
    assert forked(**options, name="seed", seed=1).finish() == [0]
    assert not equal(parameters(tmp_path / "none"), parameters(tmp_path / "seed"))


def test_cache(images, tmp_path, forked, monkeypatch):
    monkeypatch.setenv("LLB_CACHE", str(tmp_path / "cache"))
    runs = dict(pixels=dict(), cached=dict(cache=True), again=dict(cache=True))
    common = dict(data_dir=images, save_dir=tmp_path, augment="none", opt="SGD", lr=.01)
    for name, options in runs.items():
        run = forked(**common, name=name, patch=(set_cache, str(tmp_path / "cache")), **options)
        assert run.finish() == [0], run.text
        assert ("Building the token cache" in run.text) == (name == "cached")   # the second one finds it
    first, cached, again = (parameters(tmp_path / n) for n in runs)
    assert equal(cached, again) and not equal(first, cached)
    start = max(float(v.abs().max()) for v in first.values())
    assert max(float((first[k] - cached[k]).abs().max()) for k in first) < 2 ** -8 * start   # bf16 has 8 bits
    metrics = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("pixels", "cached")]
    assert metrics[0]["label"]["nll"] == pytest.approx(metrics[1]["label"]["nll"], rel=2 ** -8)
    assert metrics[1]["features"] == "bf16 cache"


def set_cache(path):
    import os
    os.environ["LLB_CACHE"] = path


# Bad input

def one_sentence(text, *words):
    said = [line for line in text.splitlines() if "rror" in line]
    assert len(said) == 1 and said[0].startswith("error: ") and said[0].endswith(".") and "Traceback" not in text, text
    for word in words: assert word in said[0], (word, text)


@pytest.fixture(scope="module")
def bad_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").mkdir()
    make_images(root / "one", 4, ("circle",))
    (root / "file").write_text("")
    return root


BAD = {
    "unknown backbone": (dict(backbone="vit_bas_patch16_224"), "vit_base_patch16_224"),
    "target_layer": (dict(backbone="vit_tiny_patch16_224", target_layer=13), "13", "1 to 12"),
    "target_layer 0": (dict(target_layer=0), "0", "at least 1"),
    "image_size": (dict(image_size=33), "33", "32 x 32"),
    "empty folder": (dict(data_dir="empty"), "0 images"),
    "one class": (dict(data_dir="one"), "at least 2 classes"),
    "no folder": (dict(data_dir="nowhere"), "nowhere", "--data_dir"),
    "class count": (dict(num_classes=4), "3 classes", "4"),
    "unwritable": (dict(save_dir="file"), "cannot be written", "--save_dir"),
    "no run": (dict(resume=True, name="nothing"), "no run to resume", "without --resume"),
    "dataset": (dict(dataset="ImageNot"), "ImageNot"),
    "checkpoint": (dict(checkpoint="nowhere.pth", random_backbone=False), "nowhere.pth"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, images, bad_folders, tmp_path, forked):
    options, *words = BAD[case]
    for name in "data_dir", "save_dir":
        if name in options: options = {**options, name: bad_folders / options[name]}
    run = forked(**{"data_dir": images, "save_dir": tmp_path / "runs", **options})
    assert run.finish(30) == [2], run.text
    one_sentence(run.text, *words)
    assert not (tmp_path / "runs").exists()   # nothing is begun


def test_bad_input_from_a_shell(images, tmp_path, train):
    "As above, but in a process that was started and not forked."
    run = train(data_dir=images, save_dir=tmp_path, alpha=2).finish(30)
    assert run.code == 2 and run.out == ""
    one_sentence(run.err, "alpha")


def test_existing_run(images, tmp_path, forked):
    options = dict(data_dir=images, save_dir=tmp_path, epochs=1)
    assert forked(**options).finish() == [0]
    before = (tmp_path / "run/events.jsonl").read_text()
    run = forked(**options)
    assert run.finish() == [2] and (tmp_path / "run/events.jsonl").read_text() == before
    one_sentence(run.text, "--resume", "--overwrite", "--name")
    run = forked(**options, lr=.5, resume=True)
    assert run.finish() == [2] and "lr 0.001 -> 0.5" in run.text
    assert (tmp_path / "run/events.jsonl").read_text() == before
    assert forked(**options, overwrite=True).finish() == [0]
    assert len((tmp_path / "run/events.jsonl").read_text()) < 1.5 * len(before)
    keep = tmp_path / "papers"
    keep.mkdir()
    (keep / "thesis.tex").write_text("mine")
    run = forked(**{**options, "name": "papers", "overwrite": True})
    assert run.finish() == [2] and (keep / "thesis.tex").exists()
    one_sentence(run.text, "no run")


def test_resume_on_other_images(images, tmp_path, forked):
    data = shutil.copytree(images, tmp_path / "data")
    options = dict(data_dir=data, save_dir=tmp_path)
    assert forked(**options, epochs=1).finish() == [0]
    shutil.copytree(data / "circle", data / "oval")
    run = forked(**options, resume=True)
    assert run.finish() == [2]
    one_sentence(run.text, "3 classes", "4")
    shutil.rmtree(data / "oval")
    for i in range(20, 25): draw("circle", random.Random(i)).save(data / "circle" / f"{i}.png")
    run = forked(**options, resume=True)
    assert run.finish() == [2]
    one_sentence(run.text, "images")


def test_bad_input_under_torchrun(images, tmp_path, train):
    run = train(2, data_dir=images, save_dir=tmp_path, target_layer=13).finish(60)
    assert run.code == 1   # torchrun's own
    sentences = re.findall(r"^.*error: .*$", run.err, re.M)
    wanted = "error: target_layer is 13, but test_vit.r160_in1k has blocks 1 to 6."
    assert sentences and all(s.endswith(wanted) for s in sentences)
    run.wait_until_gone()


# An unreadable image, met when training is under way

def corrupt(data, split):
    "Damage one image of a split; its path, and what mends it."
    from llb.data.splits import load_data
    images = getattr(load_data(data), split)
    path = data / images.files[len(images) // 2]
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    return path, lambda: path.write_bytes(whole)


@pytest.mark.parametrize("split,processes,workers", [
    ("train", 1, 2), ("train", 2, 0), ("selection", 2, 2), ("val", 1, 0)])
def test_a_corrupt_image(split, processes, workers, images, tmp_path, forked):
    data = shutil.copytree(images, tmp_path / "data")
    options = dict(data_dir=data, save_dir=tmp_path, processes=processes, workers=workers)
    assert forked(**{**options, "name": "whole"}).finish() == [0] * processes
    path, mend = corrupt(data, split)
    run = forked(**options)
    assert run.finish(40) == [2] * processes, run.text
    errors = [line for line in run.text.splitlines() if "error" in line]
    assert len(errors) == processes and "Traceback" not in run.text
    assert all(e.startswith(f"error: {path} cannot be decoded (") for e in errors)
    end = read_events(tmp_path / "run")[-1]
    assert end["kind"] == "end" and end["reason"] == "failed" and str(path) in end["error"] and "unsaved" not in end
    if end["step"]: assert checkpoint_names(tmp_path / "run")[-1] == f"step-{end['step']:08d}"   # nothing is lost
    mend()
    run = forked(**options, resume=True)
    assert run.finish() == [0] * processes, run.text
    assert equal(parameters(tmp_path / "run"), parameters(tmp_path / "whole"))   # as if nothing had happened
    assert (tmp_path / "run/metrics.json").read_text() == (tmp_path / "whole/metrics.json").read_text()
    assert len(read_events(tmp_path / "run", "epoch")) == 3


def test_skip_corrupt(images, tmp_path, forked):
    data = shutil.copytree(images, tmp_path / "data")
    paths = [corrupt(data, split)[0] for split in ("train", "val")]
    run = forked(data_dir=data, save_dir=tmp_path, skip_unreadable=True)
    assert run.finish() == [0], run.text
    assert "2 unreadable images" in run.text and all(str(p) in run.text for p in paths)
    about, metrics = (json.loads((tmp_path / "run" / f).read_text()) for f in ("config.json", "metrics.json"))
    assert about["splits"]["train"]["images"] == 41 and metrics["seen"]["scored"] == 11


@pytest.mark.parametrize("processes,log_every", [(1, 1), (1, 5), (2, 1)])
def test_weights_that_are_not_finite(processes, log_every, images, tmp_path, forked):
    "A step that would spoil the model is not taken, however late the host learns of it; all that was good is kept."
    run = forked(processes, data_dir=images, save_dir=tmp_path, log_every=log_every, patch=(spoil_step, 3),
                 patch_rank=processes - 1)
    assert run.finish() == [1] * processes, run.text
    errors = [line for line in run.text.splitlines() if line.startswith("error")]
    assert len(errors) == processes and len(set(errors)) == 1 and "Traceback" not in run.text
    assert "step 4 is not finite" in errors[0]
    assert len(re.findall(r"\d+", errors[0].split("images are")[1])) == 8 * processes   # those of the whole step
    end = read_events(tmp_path / "run")[-1]
    assert end["reason"] == "failed" and end["step"] == 3 and "not finite" in end["error"]
    state = load_file(tmp_path / "run/checkpoints/step-00000003/state.safetensors")
    assert all(v.isfinite().all() for v in state.values())


def spoil_step(number):
    "In the training process: the loss of one step is not a number."
    from llb.training.step import TrainStep
    backward, seen = TrainStep.backward, []
    def spoiled(self, features, label, totals, last):
        if len(seen) == number: features.tokens = features.tokens * float("nan")
        seen.append(None)
        return backward(self, features, label, totals, last)
    TrainStep.backward = spoiled
