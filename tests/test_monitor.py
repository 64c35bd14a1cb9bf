"""What is shown of a run whatever its folder holds: a sentence for what is missing or damaged, never a traceback."""
import json
import shutil

import pytest

from llb.apps.monitor import run_html, RunMonitor
from llb.core.errors import InputError
from llb.runs.folder import RunReader
from llb.runs.processes import attach, runs

pytestmark = pytest.mark.slow


def test_a_run_that_trained_a_backbone(visual_run):
    "It has epochs and a table, but no latent objects."
    run = attach(visual_run)
    page = run_html(run)
    assert "done; 2 epochs" in page and page.count("<img alt=") == 1 and "Curves of loss" in page
    assert "damaged" not in page and page.count("<tr>") == 2, "a header and the visual prediction"
    assert f"{run.metrics['visual']['top1']:.1%}" in page
    with pytest.raises(InputError, match="no latent objects"): run.load_model()


def test_a_run_of_llb(whole):
    page = run_html(attach(whole / "1"))
    assert "done; 3 epochs" in page and page.count("<img alt=") == 3 and page.count("<tr>") == 6
    monitor = RunMonitor(whole / "1")
    assert "done" in monitor.shown.status.value and all(button.disabled for button in monitor.buttons.values())


@pytest.fixture
def copy(whole, tmp_path):
    "A run whose folder may be damaged, as it was started from a notebook."
    folder = shutil.copytree(whole / "1", tmp_path / "copy")
    launch = folder / "launch/001"
    launch.mkdir(parents=True)
    info = {"launcher": "torchrun", "mark": "none", "nproc": 1, "agent": 1, "host": "here", "began": 0}
    (launch / "proc.json").write_text(json.dumps(info))
    return folder


DAMAGES = "", "[1, 2]", '{"config": {"lr": 0.1, ', '{"config": 3, "splits": [], "stage": {}, "kind": 3}'
FILES = ("config.json", "metrics.json", "events.jsonl", "launch/001/proc.json", "launch/001/stop.json",
         "launch/001/ranks/x/attempt_0/0/error.json", "snapshots/images.safetensors",
         "snapshots/epoch-0002.safetensors", "model/model.safetensors", "predictions.safetensors")


def read_all(run):
    "Whatever can be asked of a run is answered, or refused with a sentence."
    for name in "about", "config", "metrics", "classes", "load_model":
        try: callable(found := getattr(run, name)) and found()
        except InputError as e: assert "\n" not in str(e)


@pytest.mark.parametrize("file", FILES)
def test_damaged_files_are_sentences_or_left_out(file, copy):
    path = copy / file
    path.parent.mkdir(parents=True, exist_ok=True)
    for damage in DAMAGES:
        path.write_text(damage)
        run = attach(copy)
        assert run.state.name in ("done", "failed", "stopped") and [r.state for r in runs(copy.parent)] == [run.state]
        assert run.progress() is None or run.progress().steps == 21
        read_all(run)
    assert "Traceback" not in run_html(run)
    path.unlink()
    path.mkdir()   # a folder in the place of a file
    assert attach(copy).state.name and RunMonitor(copy).refresh() == attach(copy).state
    read_all(attach(copy))


def test_events_of_other_kinds_are_left_out(copy):
    events = copy / "events.jsonl"
    whole = RunReader(copy).events()
    strange = ["[]", "3", "{", '{"kind": "end"}', '{"kind": 3, "time": 1, "step": 1}',
               '{"kind": "step", "time": "x", "step": 1}']
    events.write_text("\n".join(strange) + "\n" + events.read_text() + "\n".join(strange) + "\n")
    assert RunReader(copy).events() == whole and attach(copy).state.name == "done"
