"""Damaged and foreign run folders for whatever reads them, the commands that launch runs, and calls from Python."""

import json
import os
import shutil
from unittest.mock import patch

import numpy as np
import torch
from markupsafe import Markup

from llb.analysis.build import index_run, load_run
from llb.analysis.catalog import Catalog, find_objects, predictions
from llb.analysis.effects import mean_embedding
from llb.analysis.index import open_index
from llb.analysis.masks import contingency, pnmi
from llb.analysis.scenes import make_scenes
from llb.analysis.similarity import similarity
from llb.analysis.usage import association, exemplars
from llb.apps.explorer import Explorer
from llb.apps.monitor import RunMonitor, run_html
from llb.data.datasets import load_dataset
from llb.data.splits import load_data, sample_images
from llb.models.llb import LLB
from llb.models.loss import LLBLoss
from llb.plots.charts import plot_agreement_table, plot_alpha_curve, plot_training_curves, plot_usage
from llb.plots.galleries import sheet, tile
from llb.plots.maps import plot_assignment_map, plot_soft_map
from llb.runs.config import Config
from llb.runs.folder import RunReader
from llb.runs.processes import attach, start
from llb.study.statistics import mcnemar, paired_difference
from llb.training.evaluate import evaluate
from llb.training.trainer import Trainer

from .weights import cut, gone, put

DAMAGES = {
    "gone": gone,
    "empty": put,
    "cut off": cut,
    "binary": lambda name: put(name, b"\xff\xfe\0\x01"),
    "a list": lambda name: put(name, b"[]"),
    "{}": lambda name: put(name, b"{}"),
    "a folder": lambda name: lambda run: (gone(name)(run), (run / name).mkdir()),
}


def report(spoil, *words):
    def act(shop):
        spoil(shop.run)
        shop.llb("report", shop.run, *words)
        page = (shop.run / "report.html").read_text() if not words else ""
        return page[:200]

    return act


def explored(spoil, split="val"):
    def act(shop):
        spoil(shop.run)
        return repr(Explorer(shop.run, split, device="cpu").catalog.index)

    return act


def watched(spoil):
    "A run is listed, and has a state and a page, however damaged it is; figures are made, but not turned into pixels."

    def act(shop):
        spoil(shop.run)
        listed, state = shop.llb("launch runs", shop.run.parent), RunMonitor(shop.run).refresh()
        assert "run" in listed, listed
        with patch("llb.apps.monitor.figure_html", lambda figure, text: Markup(text)):
            page = run_html(attach(shop.run))
        return f"{listed}{state}\n{page}"

    return act


def change(name, **values):
    "Change a JSON file of a run."

    def spoil(run):
        found = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps({k: v for k, v in {**found, **values}.items() if v is not None}))

    return spoil


def events(*lines):
    return put("events.jsonl", "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines).encode() + b"\n")


def unfinished(run):
    for name in "metrics.json", "predictions.safetensors":
        (run / name).unlink()
    shutil.rmtree(run / "model")


def other_images(shop):
    "The run's folder of images, with other images of the same names of classes in it."
    from conftest import make_images

    data = shop.copy(shop.images, "data")
    shop.train(data_dir=data, save_dir=shop.here, name="mine")
    shutil.rmtree(data)
    make_images(data, 9)
    return shop.here / "mine"


def index_file(name):
    return f"objects/val/{name}"


def truncate_rows(run):
    for path in (run / "objects/val/rows").rglob("*"):
        if path.is_file() and path.name != "about.json":
            os.truncate(path, path.stat().st_size // 2)


PROC = "launch/001/proc.json"
# which files a report needs as they are; others are made again, or not read
REPORTS = {
    **{f"metrics.json {how}": (report(damage("metrics.json")), "metrics.json") for how, damage in DAMAGES.items()},
    **{f"config.json {how}": (report(damage("config.json")), "config.json") for how, damage in DAMAGES.items()},
    "events.jsonl gone": (report(gone("events.jsonl")), "events.jsonl|epoch|curve"),
    "events.jsonl binary": (report(put("events.jsonl", b"\xff\0")), "events.jsonl|epoch|curve"),
    "events.jsonl a folder": (report(DAMAGES["a folder"]("events.jsonl")), "events.jsonl|epoch|curve"),
    **{
        f"predictions {how}": (report(DAMAGES[how]("predictions.safetensors")), "predictions.safetensors")
        for how in ("gone", "cut off", "a folder")
    },
    "model gone": (report(gone("model")), "model"),
    "model cut off": (report(cut("model/model.safetensors")), "model.safetensors"),
    "model/config.json broken": (report(put("model/config.json", b"{")), "config.json"),
    "metrics.json without alpha": (report(change("metrics.json", alpha=None)), "metrics.json|alpha"),
    "metrics.json of words": (report(change("metrics.json", label="good")), "metrics.json"),
    "not finished": (report(unfinished), "finish"),
    "no such run": (lambda s: s.llb("report /nope"), "/nope"),
    "a folder of other things": (lambda s: s.llb("report", s.images), "shapes"),
    "no run": (lambda s: s.llb("report"), "RUN"),
    "two words": (lambda s: s.llb("report", s.shared.run, "twice"), "twice"),
    "other images than the run's": (lambda s: s.llb("report", other_images(s)), "fingerprint|images are not those"),
    "a finished run": (report(lambda run: None), None),
    "the figures alone": (report(lambda run: None, "--figures"), None),
}

EXPLORED = {
    **{
        f"objects.safetensors {how}": (explored(damage(index_file("objects.safetensors"))), None)
        for how, damage in DAMAGES.items()
        if how != "a folder"
    },
    "index.json gone": (explored(gone(index_file("index.json"))), None),
    "index.json broken": (explored(put(index_file("index.json"), b"{")), None),
    "index.json a list": (explored(put(index_file("index.json"), b"[]")), None),
    "index.json without model": (explored(change(index_file("index.json"), model=None)), None),
    "files.json broken": (explored(put(index_file("files.json"), b"[")), None),
    "files.json of fewer": (explored(put(index_file("files.json"), b'["a.png"]')), None),
    "rows cut off": (explored(truncate_rows), None),
    "rows gone": (explored(gone(index_file("rows"))), None),
    "effects gone": (explored(gone(index_file("effects"))), None),
    "notes broken": (explored(lambda r: [p.write_text("{") for p in (r / "objects").glob("*.json")] and None), None),
    "an index of another model": (explored(change(index_file("index.json"), model="0" * 16)), None),
    "open_index of a cut off one": (
        lambda s: truncate_rows(s.run) or repr(open_index(s.run / "objects/val")),
        "damaged",
    ),
    "open_index of a list": (
        lambda s: (put(index_file("index.json"), b"[]")(s.run), repr(open_index(s.run / "objects/val")))[1],
        "damaged",
    ),
    "open_index of fewer files": (
        lambda s: (put(index_file("files.json"), b'["a"]')(s.run), repr(open_index(s.run / "objects/val")))[1],
        "damaged",
    ),
    "open_index of nothing": (lambda s: repr(open_index(s.here)), "index"),
    "an unknown split": (explored(lambda r: None, "best"), "best"),
    "no such run": (lambda s: repr(Explorer("/nope")), "/nope"),
    "a run without model": (explored(gone("model")), "model"),
    "other images than the run's": (lambda s: repr(Explorer(other_images(s))), "images are not those|fingerprint"),
    "a model without images": (lambda s: repr(Explorer(LLB.from_pretrained(s.shared.run / "model"))), "images"),
    "a number": (lambda s: repr(Explorer(3)), TypeError),
}


def explorer(act):
    def tried(shop):
        found = Explorer(shop.shared.run, device="cpu")
        return repr(act(found))

    return tried


EXPLORER = {
    "image -1": (explorer(lambda e: e.show(-1)), "-1"),
    "image 999": (explorer(lambda e: e.show(999)), "999"),
    "patch 999": (explorer(lambda e: e.show(0, 999)), "999"),
    "object 999": (explorer(lambda e: e.open(999)), "999"),
    "object -1": (explorer(lambda e: e.open(-1)), "-1"),
    "a link of another run": (explorer(lambda e: e.open("other:object:1")), "other"),
    "a link of nothing": (explorer(lambda e: e.open("x")), "'x'"),
    "alpha 2": (explorer(lambda e: e.fuse(2)), "alpha"),
    "alpha NaN": (explorer(lambda e: e.fuse(float("nan"))), "alpha"),
    "a kind of nothing": (explorer(lambda e: e.search(kind="odd")), "odd"),
    "an order of nothing": (explorer(lambda e: e.search(order="odd")), "odd"),
    "class 99": (explorer(lambda e: e.choose_class(99)), "99"),
    "a cell of nothing": (explorer(lambda e: e.choose_cell("odd")), "odd"),
    "a view of nothing": (explorer(lambda e: e.figure("odd")), "odd"),
    "a gallery as png": (explorer(lambda e: e.export("gallery", "png")), "gallery"),
    "export as bmp": (explorer(lambda e: e.export("image", "bmp")), "bmp"),
}

WATCHED = {
    **{
        f"{name} {how}": (watched(damage(name)), None)
        for name in ("config.json", "metrics.json", "events.jsonl", PROC)
        for how, damage in DAMAGES.items()
    },
    "metrics.json of words": (watched(change("metrics.json", label="good")), None),
    "metrics.json without label": (watched(change("metrics.json", label=None, visual=None, fused=None)), None),
    "proc.json of a strange launcher": (watched(change(PROC, launcher="postman")), None),
    "proc.json without began": (watched(change(PROC, began=None)), None),
    "proc.json began in words": (watched(change(PROC, began="yesterday")), None),
    "proc.json with an option for a job": (watched(change(PROC, launcher="slurm", job="--user=me")), None),
    "a snapshot cut off": (
        watched(lambda r: [cut(p.name)(p.parent) for p in (r / "snapshots").glob("epoch-*")] and None),
        None,
    ),
    "a snapshot of a strange name": (watched(put("snapshots/epoch-best.safetensors")), None),
    "snapshots gone": (watched(gone("snapshots")), None),
    "events of epochs without numbers": (
        watched(
            events(
                {"kind": "start", "time": 1, "step": 0, "per_epoch": 3, "epochs": 2},
                {"kind": "epoch", "time": 2, "step": 3},
            )
        ),
        None,
    ),
    "events of text for numbers": (
        watched(
            events(
                {"kind": "start", "time": 1, "step": 0, "per_epoch": "3", "epochs": "2"},
                {"kind": "epoch", "time": 2, "step": 3, "epoch": "x", "terms": 3},
            )
        ),
        None,
    ),
    "events of 0 steps": (watched(events({"kind": "start", "time": 1, "step": 0, "per_epoch": 0, "epochs": 0})), None),
    "events of a strange end": (watched(events({"kind": "end", "time": 1, "step": 0, "reason": ["x"]})), None),
    "a stop nobody asked for": (watched(put("launch/001/stop.json", b"[]")), None),
    "a launch folder of words": (watched(lambda r: (r / "launch" / "new").mkdir()), None),
}

LAUNCH = {
    "runs of nothing": (lambda s: s.llb("launch runs /nope"), "/nope"),
    "runs of a file": (lambda s: s.llb("launch runs", s.write("x")), "x"),
    "runs of an empty folder": (lambda s: s.llb("launch runs", s.here), None),
    "status of nothing": (lambda s: s.llb("launch status /nope"), "/nope"),
    "status of a finished run": (lambda s: s.llb("launch status", s.shared.run), None),
    "stop of nothing": (lambda s: s.llb("launch stop /nope"), "/nope"),
    "stop with a word": (lambda s: s.llb("launch stop --grace soon", s.shared.run), "grace"),
    "an unknown word": (lambda s: s.llb("launch begin"), "begin"),
    "no word": (lambda s: s.llb("launch"), "required|command"),
    "start without folder": (lambda s: s.llb("launch start -- --save_dir /proc/nope"), "/proc/nope"),
    "start with bad flags": (lambda s: s.llb("launch start -- --lr nan"), "lr"),
    "sbatch: time tomorrow": (lambda s: s.llb("launch sbatch --time tomorrow -- --save_dir", s.here), "tomorrow"),
    "sbatch: time with a line": (
        lambda s: s.llb("launch sbatch --time", "1\ntouch PWNED", "--", "--save_dir", s.here),
        "time",
    ),
    "sbatch: time negative": (lambda s: s.llb("launch sbatch --time=-5 -- --save_dir", s.here), "time"),
    "sbatch: a line with a break": (
        lambda s: s.llb("launch sbatch --line", "--x\ntouch PWNED", "--", "--save_dir", s.here),
        "line",
    ),
    "sbatch: an empty line": (lambda s: s.llb("launch sbatch --line", "", "--", "--save_dir", s.here), "line"),
    "sbatch: a line that is no option": (lambda s: s.llb("launch sbatch --line=touch -- --save_dir", s.here), "line"),
    "sbatch: gpus of words": (lambda s: s.llb("launch sbatch --gpus many -- --save_dir", s.here), "gpus"),
    "sbatch: a name with a break": (
        lambda s: s.llb("launch sbatch --", "--name", "a\ntouch PWNED\n#", "--save_dir", s.here),
        "name",
    ),
    "sbatch: a folder with a quote": (
        lambda s: s.llb("launch sbatch --", "--save_dir", s.here / 'a"b'),
        "folder|save_dir",
    ),
    "sbatch: a folder with a dollar": (
        lambda s: s.llb("launch sbatch --", "--save_dir", s.here / "$(touch PWNED)"),
        None,
    ),
    "sbatch as it should be": (
        lambda s: s.llb("launch sbatch --nodes 2 --gpus 4 --time 2-12:00:00 -- --save_dir", s.here),
        None,
    ),
    "attach to nothing": (lambda s: str(attach("/nope")), "/nope"),
    "start with 0 processes": (lambda s: str(start(Config.of(save_dir=s.here), nproc=0)), "nproc"),
    "start with 1.5 processes": (lambda s: str(start(Config.of(save_dir=s.here), nproc=1.5)), "nproc"),
    "monitor of nothing": (lambda s: str(RunMonitor("/nope")), "/nope"),
    "monitor every 0 s": (lambda s: str(RunMonitor(s.shared.run, every_s=0)), "every_s"),
    "monitor every -1 s": (lambda s: str(RunMonitor(s.shared.run, every_s=-1)), "every_s"),
}


def loaded(act):
    return lambda s: str(act(load_data(s.images)))


def an_index(act):
    return lambda s: str(act(open_index(s.shared.run / "objects/val")))


def a_model(act):
    return lambda s: str(act(LLB.from_pretrained(s.shared.run / "model")))


def made(**options):
    return lambda s: str(
        LLB(s.backbone(), **{"num_objects": 8, "num_layers": 2, "target_layer": 3, "num_classes": 3, **options})
    )


A = np.random.default_rng(0).random((4, 9, 5)).astype(np.float32)
A /= A.sum(-1, keepdims=True)
PICTURE = np.zeros((30, 30, 3), np.float32)

PYTHON = {
    "load_data of nothing": (lambda s: load_data("/nope"), "/nope"),
    "load_data of a number": (lambda s: load_data(3), TypeError),
    "load_data with fraction 2": (lambda s: load_data(s.images, 2), "selection_fraction"),
    "load_data with fraction NaN": (lambda s: load_data(s.images, float("nan")), "selection_fraction"),
    "load_dataset of nothing": (lambda s: load_dataset("Atlantis"), "Atlantis"),
    "LLB without a backbone": (lambda s: LLB("vit"), "backbone"),
    "LLB of 1 object": (made(num_objects=1), "num_objects"),
    "LLB of -1 objects": (made(num_objects=-1), "num_objects"),
    "LLB of 1 layer": (made(num_layers=1), "num_layers"),
    "LLB of layer 0": (made(target_layer=0), "target_layer"),
    "LLB of layer 99": (made(target_layer=99), "target_layer"),
    "LLB of -1 classes": (made(num_classes=-1), "num_classes"),
    "LLB of 0 classes": (made(num_classes=0), "num_classes"),
    "LLB with alpha 2": (made(alpha=2), "alpha"),
    "LLB with alpha NaN": (made(alpha=float("nan")), "alpha"),
    "LLB with temperature 0": (made(temperature=0), "temperature"),
    "LLB with temperature NaN": (made(temperature=float("nan")), "temperature"),
    "LLB with temperature inf": (made(temperature=float("inf")), "temperature"),
    "LLB with drop_path 2": (made(drop_path=2), "drop_path"),
    "LLB with drop_path -1": (made(drop_path=-1), "drop_path"),
    "LLB of 1.5 objects": (made(num_objects=1.5), TypeError),
    "LLB of '8' objects": (made(num_objects="8"), TypeError),
    "alpha 2 of a model": (a_model(lambda m: setattr(m, "alpha", 2)), "alpha"),
    "images of another size": (a_model(lambda m: m(torch.zeros(1, 3, 64, 64))), "64"),
    "one image without a batch": (a_model(lambda m: m(torch.zeros(3, 32, 32))), "B,3|batch|shape"),
    "grey images": (a_model(lambda m: m(torch.zeros(1, 1, 32, 32))), "B,3|channel|shape"),
    "predict a number": (a_model(lambda m: m.predict(3)), TypeError),
    "predict nothing": (a_model(lambda m: m.predict([])), "image"),
    "predict of nothing": (a_model(lambda m: m.predict("/nope.png")), "/nope.png"),
    "predict with alpha 2": (lambda s: a_model(lambda m: m.predict(s.images / "circle/00.png", alpha=2))(s), "alpha"),
    "predict with batch_size 0": (
        lambda s: a_model(lambda m: m.predict(s.images / "circle/00.png", batch_size=0))(s),
        "batch_size",
    ),
    "probabilities with alpha -1": (a_model(lambda m: m(torch.zeros(1, 3, 32, 32)).probabilities(alpha=-1)), "alpha"),
    "loss with a NaN weight": (lambda s: str(LLBLoss(diversity_weight=float("nan"))), "diversity_weight"),
    "loss with a weight in words": (lambda s: str(LLBLoss(diversity_weight="much")), TypeError),
    "evaluate a string": (lambda s: evaluate("model", load_data(s.images)), "model"),
    "evaluate on a string": (a_model(lambda m: evaluate(m, "images")), "images"),
    "Trainer without data": (a_model(lambda m: Trainer(m, None)), TypeError),
    "Trainer with a folder": (lambda s: a_model(lambda m: Trainer(m, s.images))(s), "load_data"),
    "Trainer with a dictionary": (
        lambda s: a_model(lambda m: Trainer(m, load_data(s.images), {"lr": 3}))(s),
        TypeError,
    ),
    "sample of -1 images": (loaded(lambda d: len(sample_images(d.val, -1))), "count"),
    "load_run of an unknown split": (lambda s: str(load_run(s.shared.run, "best")), "best"),
    "load_run of an unknown checkpoint": (lambda s: str(load_run(s.shared.run, checkpoint="step-9")), "step-9"),
    "load_run on an unknown device": (lambda s: str(load_run(s.shared.run, device="banana")), "banana"),
    "load_run with batch_size 0": (lambda s: str(load_run(s.shared.run, batch_size=0)), "batch_size"),
    "object 999": (an_index(lambda i: exemplars(i, 999)), "999"),
    "object -1": (an_index(lambda i: exemplars(i, -1)), "-1"),
    "an unknown measure": (an_index(lambda i: association(i, "joy")), "joy"),
    "an unknown unit": (an_index(lambda i: association(i, "lift", "cows")), "cows"),
    "similarity of nothing": (an_index(lambda i: similarity(i, "cows")), "cows"),
    "an unknown kind": (an_index(lambda i: find_objects(Catalog(i), kind="odd")), "odd"),
    "alpha 2 of predictions": (an_index(lambda i: predictions(Catalog(i), 0, 2)), "alpha"),
    "mean of no use": (a_model(lambda m: mean_embedding(m.branch, torch.zeros(8))), "use"),
    "mean of other uses": (a_model(lambda m: mean_embedding(m.branch, torch.ones(3))), "use"),
    "paired of other lengths": (lambda s: paired_difference(np.ones(3, bool), np.ones(4, bool)), "3.*4"),
    "paired of nothing": (lambda s: paired_difference(np.ones(0, bool), np.ones(0, bool)), "0|empty|at least"),
    "mcnemar of -1": (lambda s: mcnemar(-1, 3), "-1"),
    "pnmi of other shapes": (lambda s: pnmi(np.zeros((2, 9), int), np.zeros((2, 8), int)), "shape|9|8"),
    "contingency of reals": (lambda s: contingency(np.zeros(3), np.zeros(4)), "shape|3|4"),
    "scenes of a kind of nothing": (loaded(lambda d: make_scenes(d.val, 2, 64, "moon")), "moon"),
    "scenes of -1": (loaded(lambda d: make_scenes(d.val, -1, 64)), "count"),
    "a map of another grid": (lambda s: plot_assignment_map(PICTURE, A[0], (2, 3)), "2 x 3|grid|9"),
    "a map of NaNs": (lambda s: plot_assignment_map(PICTURE, A[0] * np.nan, (3, 3)), "NaN|finite"),
    "a map of words": (lambda s: plot_assignment_map("cat.jpg", A[0], (3, 3)), "image"),
    "a soft map of another size": (lambda s: plot_soft_map(PICTURE, A[0, :4, 0], (3, 3)), "grid|9|4"),
    "curves of nothing": (lambda s: plot_training_curves([]), "epoch"),
    "usage of NaNs": (lambda s: plot_usage(np.full(4, np.nan)), "NaN|finite"),
    "usage of nothing": (lambda s: plot_usage(np.zeros(0)), "usage|empty|patches"),
    "an agreement of -1": (lambda s: plot_agreement_table(-1, 2, 3, 4), "-1"),
    "an agreement of nothing": (lambda s: plot_agreement_table(0, 0, 0, 0), "image|0"),
    "an alpha curve of other lengths": (
        lambda s: plot_alpha_curve([0, 1], [0.5], [1.0], 0.5, 9),
        "alpha|length|shape|2|1",
    ),
    "a sheet of nothing": (lambda s: sheet([]), "tile"),
    "a sheet of no columns": (lambda s: sheet([np.zeros((4, 4, 3), np.uint8)], 0), "columns"),
    "a tile of patch 99": (lambda s: tile(np.zeros((30, 30, 3), np.uint8), 99, (3, 3)), "99"),
    "config.but of nothing": (lambda s: str(Config().but(colour=3)), "colour"),
    "Config with positions": (lambda s: str(Config(3)), TypeError),
    "RunReader of nothing": (lambda s: str(RunReader("/nope").config), "/nope"),
    "index of a folder of other things": (lambda s: str(index_run(s.images)), "shapes|config.json"),
}

CASES = {
    **{f"report: {n}": c for n, c in REPORTS.items()},
    **{f"explorer of: {n}": c for n, c in EXPLORED.items()},
    **{f"explorer: {n}": c for n, c in EXPLORER.items()},
    **{f"watched: {n}": c for n, c in WATCHED.items()},
    **{f"launch: {n}": c for n, c in LAUNCH.items()},
    **{f"Python: {n}": c for n, c in PYTHON.items()},
}
