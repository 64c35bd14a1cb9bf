"""Training on all of the training data: nothing is chosen, or what was chosen is trained again on everything.

Seven steps an epoch with 6 of 48 training images held out, eight without; three epochs before the refit.
"""
import json
import signal

import pytest
from faults import at_nth_step
from running import options_of, results
from safetensors.torch import load_file

from llb.apps.report import write_report
from llb.runs.folder import read_events, RunReader
from llb.runs.processes import Run

pytestmark = pytest.mark.slow

SETTLED = dict(selection_fraction=0.0, alpha=.3, last_epoch=True)


def numbers(folder): return json.loads((folder / "metrics.json").read_text())


def run_all(forked, processes, **options):
    run = forked(processes, **options)
    assert run.finish(120) == [0] * processes, run.text
    return run.text


def test_where_nothing_is_chosen_no_image_is_held_out(images, tmp_path, forked):
    text = run_all(forked, 1, **options_of(images, tmp_path, 1, epochs=2), **SETTLED)
    assert "no training image is held out" in text and "selection top-1" not in text
    metrics, events = numbers(tmp_path / "run"), read_events(tmp_path / "run", "epoch")
    assert metrics["chosen_epoch"] == {"step": 16, "epoch": 2, "alpha": .3, "by": "the last one"}
    assert metrics["alpha"] == {"value": .3, "chosen": "was given"}
    assert metrics["trained_on"] == {"images": 48, "held_out": 0, "refit": False}
    assert metrics["seen"]["unique"] == 12 and not any("selection" in e for e in events)
    assert (tmp_path / "run/snapshots/epoch-0002.safetensors").is_file()
    page = write_report(RunReader(tmp_path / "run")).read_text()
    assert "48 training and 12 validation images" in page and "selection split" not in page
    assert Run(tmp_path / "run").progress().steps == 16


def test_the_last_epoch_can_be_kept_and_alpha_chosen(images, tmp_path, forked):
    run_all(forked, 1, **options_of(images, tmp_path, 1), last_epoch=True)
    metrics, last = numbers(tmp_path / "run"), read_events(tmp_path / "run", "epoch")[-1]
    assert metrics["chosen_epoch"] == {"step": 21, "epoch": 3, "alpha": last["alpha"], "by": "the last one"}
    assert metrics["trained_on"]["held_out"] == 6 and "selection split" in metrics["alpha"]["chosen"]


@pytest.fixture(scope="module")
def refits(tmp_path_factory, images):
    "A folder of uninterrupted refits, named 1 and 2 by their number of processes; not to be changed."
    from running import forked_training
    folder = tmp_path_factory.mktemp("refits")
    for processes in 1, 2:
        options = {**options_of(images, folder, processes), "name": str(processes), "refit": True}
        run = forked_training(folder / "log.txt", processes, **options)
        assert run.finish(120) == [0] * processes, run.text
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_a_refit_is_a_run_on_all_images_with_what_was_chosen(processes, refits, images, tmp_path, forked):
    "Bit by bit, with the schedule of the first phase."
    folder, metrics = refits / str(processes), numbers(refits / str(processes))
    chosen = metrics["chosen_epoch"]
    assert "lowest fused NLL" in chosen["by"] and metrics["trained_on"] == {"images": 48, "held_out": 0, "refit": True}
    settled = dict(SETTLED, alpha=chosen["alpha"], epochs=chosen["epoch"], t_max=3.0)
    run_all(forked, processes, **{**options_of(images, tmp_path, processes), **settled})
    for name in "model/model.safetensors", "predictions.safetensors":
        one, other = load_file(folder / name), load_file(tmp_path / "run" / name)
        assert all((one[k] == other[k]).all() for k in one)
    begun, = read_events(folder, "refit")
    assert (begun["step"], begun["per_epoch"], begun["epochs"], begun["choice"]) == (21, 8, chosen["epoch"], chosen)
    epochs = read_events(folder, "epoch")
    assert [e["phase"] for e in epochs] == ["choice"] * 3 + ["refit"] * chosen["epoch"]
    assert ["selection" in e for e in epochs] == [True] * 3 + [False] * chosen["epoch"]


KILLS = {"last step of the choice": (1, 21, True), "first step of the refit": (1, 22, True),
         "middle of the refit": (1, 26, False), "two processes": (2, 25, True), "end of its first epoch": (1, 29, True)}


@pytest.mark.parametrize("processes,count,after", KILLS.values(), ids=KILLS)
def test_a_refit_that_was_killed_ends_as_one_left_alone(processes, count, after, refits, images, tmp_path, forked):
    options = {**options_of(images, tmp_path, processes), "refit": True}
    run = forked(processes, patch=(at_nth_step, count, signal.SIGKILL, after), patch_rank=0, **options)
    assert -signal.SIGKILL in run.finish(60), run.text
    run_all(forked, processes, resume=True, **options)
    assert results(tmp_path / "run") == results(refits / str(processes))
    events = read_events(tmp_path / "run")
    steps = [e["step"] for e in events if e["kind"] == "step"]
    assert steps == list(range(1, steps[-1] + 1)) and len([e for e in events if e["kind"] == "refit"]) == 1


def test_progress_and_report_know_both_phases(refits):
    run = RunReader(refits / "1")
    assert "epoch" in str(Run(run.folder).progress()) and "of the refit" in str(Run(run.folder).progress())
    page = write_report(run).read_text()
    assert "trained again on all 48" in page
