"""A run that is killed or stopped, anywhere, and resumed ends as if nothing had happened, bit by bit.

Kills inside the training process are exact (before or after a given step, at a given change of a save, in an
evaluation); those from the outside hit the command as people start it, under torchrun, and leave nothing running.
"""
import hashlib
import json
import os
import random
import signal
import socket
import sys
import time

import pytest
from faults import (at_call, at_change, at_step, print_backbone, see_stop, seen_images, seen_images_and_stop, storm,
                    touch_stop)
from running import check_stop_at_random, flags, options_of, OPTIONS, results, TINY, wait_for_step
from safetensors.torch import load_file

from llb.runs.folder import read_events
from llb.runs.processes import Run

pytestmark = pytest.mark.slow


def random_steps(seed, n):
    "Steps 1..20 and whether before or after them; those around an epoch's end are always among them."
    rng = random.Random(seed)
    return [(rng.choice([6, 7, 13]) if i % 3 == 0 else rng.randrange(1, 21), rng.random() < .5) for i in range(n)]


def interrupted(forked, processes, patch, patch_rank, **options):
    "Run until killed, and resume."
    first = forked(processes, patch=patch, patch_rank=patch_rank, **options)
    codes = first.finish(40)
    assert codes[patch_rank] == -signal.SIGKILL and 0 not in codes, (codes, first.text)
    second = forked(processes, resume=True, **options)
    assert second.finish(40) == [0] * processes, second.text


@pytest.mark.parametrize("processes,workers", [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_kill_at_random_steps(processes, workers, images, tmp_path, forked, wanted):
    for i, (step, after) in enumerate(random_steps(f"{processes} {workers}", 2)):
        options = options_of(images, tmp_path / str(i), processes, workers=workers)
        interrupted(forked, processes, (at_step, step, signal.SIGKILL, after), i % processes, **options)
        assert results(tmp_path / str(i) / "run") == wanted[processes], (step, after)
        events = read_events(tmp_path / str(i) / "run")
        assert [e["step"] for e in events if e["kind"] == "step"] == list(range(1, 22)), "each step is reported once"
        assert len([e for e in events if e["kind"] == "epoch"]) == 3 and events[-1]["reason"] == "done"


SAVING = {
    "second checkpoint half written": (at_change, "state.json", 2, "open"),
    "second checkpoint not yet in place": (at_change, "checkpoints/.step-", 2, "os.rename"),
    "old checkpoint half deleted": (at_change, "checkpoints/step-", 1, "os.rmdir"),
    "metrics not yet in place": (at_change, "metrics.json", 1, "os.rename"),
    "second epoch validated": (at_call, "llb.training.trainer", "score_model", 2),
    "reported split evaluated": (at_call, "llb.training.trainer", "score_model", 4)}


@pytest.mark.parametrize("patch", SAVING.values(), ids=SAVING)
def test_kill_while_saving(patch, images, tmp_path, forked, wanted):
    interrupted(forked, 1, patch, 0, **options_of(images, tmp_path, 1))
    assert results(tmp_path / "run") == wanted[1]
    left = [p.name for p in (tmp_path / "run/checkpoints").iterdir() if len(p.name) != len("step-00000000")]
    assert not left, "what a kill leaves is swept up"


def test_kill_while_saving_with_two_processes(images, tmp_path, forked, wanted):
    patch = SAVING["second checkpoint not yet in place"]
    interrupted(forked, 2, patch, 0, **options_of(images, tmp_path, 2))
    assert results(tmp_path / "run") == wanted[2]


def test_two_kills(images, tmp_path, forked, wanted):
    options = options_of(images, tmp_path, 1)
    assert forked(patch=(at_step, 9, signal.SIGKILL, True), **options).finish() == [-signal.SIGKILL]
    assert forked(patch=(at_step, 10, signal.SIGKILL, True), resume=True, **options).finish() == [-signal.SIGKILL]
    assert forked(resume=True, **options).finish() == [0]
    assert results(tmp_path / "run") == wanted[1]


def test_damaged_newest_checkpoint(images, tmp_path, forked, wanted):
    "An earlier one is taken; what is then saved is kept, though the damaged one had a higher number."
    options = options_of(images, tmp_path, 1, save_every=1)
    assert forked(patch=(at_step, 16, signal.SIGKILL, True), **options).finish() == [-signal.SIGKILL]
    newest = tmp_path / "run/checkpoints/step-00000014/state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    run = forked(resume=True, patch=(at_step, 9, signal.SIGTERM, True), **options)
    assert run.finish() == [0] and "step-00000014 is damaged" in run.text and "Resuming at step 7" in run.text
    run = forked(resume=True, **options)
    assert run.finish() == [0] and "Resuming at step 10" in run.text
    assert results(tmp_path / "run") == wanted[1]


# Stopping

STOPS = {"mid": (1, 0, 3, signal.SIGTERM, True), "epoch-end": (1, 0, 6, signal.SIGINT, True),
         "epoch-start": (1, 0, 7, signal.SIGTERM, False), "two-epoch-end": (2, 1, 6, signal.SIGTERM, True),
         "two-mid": (2, 0, 9, signal.SIGINT, False), "last": (1, 0, 20, signal.SIGTERM, True)}


@pytest.mark.parametrize("processes,rank,number,what,after", STOPS.values(), ids=STOPS)
def test_stop(processes, rank, number, what, after, images, tmp_path, forked, wanted):
    "All processes stop at one step, save and exit 0; also at an epoch's last step, which is still validated."
    options = options_of(images, tmp_path, processes)
    run = forked(processes, patch=(at_step, number, what, after), patch_rank=rank, **options)
    assert run.finish() == [0] * processes, run.text
    end = read_events(tmp_path / "run")[-1]
    if number == 20: assert end["reason"] == "done"    # nothing was left to stop
    else:
        assert (end["reason"], end["by"], end["step"]) == ("stopped", what.name, number + 1)
        assert (tmp_path / f"run/checkpoints/step-{number + 1:08d}").is_dir()
        assert not (tmp_path / "run/metrics.json").exists()
        run = forked(processes, resume=True, **options)
        assert run.finish() == [0] * processes, run.text
    assert results(tmp_path / "run") == wanted[processes]


def test_a_second_signal_does_not_spoil_the_save(images, tmp_path, forked, wanted):
    options = options_of(images, tmp_path, 1)
    run = forked(patch=(storm, 9), **options)
    assert run.finish() == [0], run.text
    assert read_events(tmp_path / "run")[-1]["reason"] == "stopped"
    assert forked(resume=True, **options).finish() == [0]
    assert results(tmp_path / "run") == wanted[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_stop_file(processes, images, tmp_path, forked, wanted):
    options = options_of(images, tmp_path, processes)
    run = forked(processes, patch=(touch_stop, str(tmp_path / "run"), 4), patch_rank=processes - 1, **options)
    assert run.finish() == [0] * processes, run.text
    end = read_events(tmp_path / "run")[-1]
    assert (end["reason"], end["by"], end["step"]) == ("stopped", "stop file", 5)
    assert forked(processes, resume=True, **options).finish() == [0] * processes   # the file is not obeyed twice
    assert results(tmp_path / "run") == wanted[processes]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_sees_the_stop_file_first(rank, images, tmp_path, forked):
    "The reason is that of the one that saw it, whichever that is."
    run = forked(2, patch=(see_stop, 9), patch_rank=rank, **options_of(images, tmp_path, 2))
    assert run.finish() == [0, 0], run.text
    end = read_events(tmp_path / "run")[-1]
    assert (end["reason"], end["by"], end["step"]) == ("stopped", "stop file", 10)
    assert str(Run(tmp_path / "run").state) == "stopped: as asked after step 10; resume goes on from there"


@pytest.mark.parametrize("seed", range(3))
def test_stop_at_random_moments(seed, images, tmp_path, forked, wanted):
    check_stop_at_random(seed, images, tmp_path, forked, wanted)


# From the outside, under torchrun

LONG = {**OPTIONS, "epochs": 400, "batch_size": 3, "workers": 1}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_signal_to_torchrun(name, images, tmp_path, train):
    run = train(2, data_dir=images, save_dir=tmp_path, **LONG)
    wait_for_step(tmp_path / "run", 8, run)
    assert len(run.alive()) >= 5   # torchrun, two ranks, a loader worker each
    os.kill(run.process.pid, getattr(signal, name))
    run.wait_until_gone(20)
    run.finish(10)
    end = read_events(tmp_path / "run")[-1]
    if name == "SIGKILL": assert run.code != 0 and end["kind"] != "end"
    else:
        assert end["kind"] == "end" and end["reason"] == "stopped", run.err   # torchrun itself exits 1 on a signal
        assert (tmp_path / f"run/checkpoints/step-{end['step']:08d}").is_dir()


PROGRAM = """
import sys
from llb import train
from faults import kill_once
kill_once()
train.main(sys.argv[1:])
"""


def test_torchrun_restarts_by_itself(images, tmp_path, start, wanted):
    options = {**TINY, **options_of(images, tmp_path, 2)}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    words = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"
    env = {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])}
    run = start(sys.executable, *words, program, *flags(**options), env=env).finish(90)
    assert run.code == 0, run.err
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert kinds.count("start") == 1 and kinds.count("resume") == 1
    assert results(tmp_path / "run") == wanted[2]
    run.wait_until_gone()


def test_a_process_that_never_joins(images, tmp_path, start):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = flags(**{**TINY, "data_dir": images, "save_dir": tmp_path, "timeout": 3})
    env = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run = start(sys.executable, "-m", "llb.train", *words, env=env).finish(60)
    assert run.code == 2, run.err
    assert [line for line in run.err.splitlines() if line.startswith("error: The 2 processes did not all")]


# Another number of processes

def trained(forked, processes, patch, **options):
    "A run with a global batch of 6."
    run = forked(processes, patch=patch, **{**OPTIONS, "drop_path": 0, "batch_size": 6 // processes, **options})
    assert run.finish() == [0] * processes, run.text


def lines_of(folder): return sorted(line for f in folder.iterdir() for line in f.read_text().splitlines())


@pytest.mark.parametrize("before,after", [(2, 1), (1, 2)])
def test_resume_with_another_number_of_processes(before, after, images, tmp_path, forked):
    "The global batch stays: the same images and pixels in each step; parameters agree up to rounding (measured: 3e-6)."
    options, seen = dict(data_dir=images, save_dir=tmp_path), {n: tmp_path / f"seen-{n}" for n in ("whole", "run")}
    for folder in seen.values(): folder.mkdir()
    trained(forked, before, (seen_images, str(seen["whole"])), name="whole", **options)
    trained(forked, before, (seen_images_and_stop, str(seen["run"]), 9), name="run", **options)
    trained(forked, after, (seen_images, str(seen["run"])), name="run", resume=True, **options)
    whole, run = (lines_of(folder) for folder in seen.values())
    assert whole == run and len(whole) == 3 * 7 * 6
    a, b = (load_file(tmp_path / n / "model/model.safetensors") for n in ("whole", "run"))
    largest = max(float(v.abs().max()) for v in a.values())
    difference = max(float((a[k] - b[k]).abs().max()) for k in a) / largest
    print(f"relative difference {difference:.1e}")
    assert difference < 3e-5
    one, other = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("whole", "run"))
    assert one["seen"] == other["seen"] and one["chosen_epoch"]["step"] == other["chosen_epoch"]["step"]
    assert one["label"]["nll"] == pytest.approx(other["label"]["nll"], rel=1e-4)


def test_other_numbers_of_processes_see_the_same_pixels(images):
    "Batches of 6: one process, two, and three; here of the batches themselves."
    from llb.data.batches import ImageDataset, make_loader, TrainBatches
    from llb.data.splits import load_data
    from llb.models.backbone import load_backbone
    train = load_data(images).train
    dataset = ImageDataset(train, load_backbone("test_vit", pretrained=False, image_size=32).transform(train=True), 5)
    steps = {}
    for size in 1, 2, 3:
        loaders = [make_loader(dataset, TrainBatches(len(train), 6, 5, rank, size)) for rank in range(size)]
        steps[size] = [{int(i): hashlib.sha256(x.numpy().tobytes()).hexdigest()
                        for batch in batches for i, x in zip(batch["index"], batch["image"])}
                       for batches in zip(*loaders)]
    assert steps[1] == steps[2] == steps[3] and len(steps[1]) == 7 and all(len(s) == 6 for s in steps[1])


def test_the_same_backbone_everywhere(images, tmp_path, forked):
    "A random backbone is the same in every process and after a resume."
    options = dict(data_dir=images, save_dir=tmp_path, **{**OPTIONS, "epochs": 1})
    hashes = set()
    for processes, name in (1, "a"), (2, "b"):
        run = forked(processes, patch=(print_backbone,), patch_rank=processes - 1, **{**options, "name": name})
        assert run.finish() == [0] * processes, run.text
        hashes |= {line for line in run.text.splitlines() if line.startswith("BACKBONE ")}
        about = json.loads((tmp_path / name / "config.json").read_text())
        hashes.add("BACKBONE " + about["backbone"]["content_hash"])
    assert len(hashes) == 1
    run = forked(**{**options, "name": "a", "resume": True, "seed": 1})
    assert run.finish() == [2] and "seed 0 -> 1" in run.text


def test_watchdog_ends_a_process_whose_parent_died(start):
    program = ("import os, time; from llb.core.distributed import end_with_parent\n"
               "if os.fork(): time.sleep(.5); os._exit(0)\n"
               "end_with_parent(.05); print('watching', flush=True); time.sleep(60)")
    run = start(sys.executable, "-c", program)
    until = time.monotonic() + 30
    while run.process.poll() is None and time.monotonic() < until: time.sleep(.05)
    assert run.process.returncode == 0
    run.wait_until_gone(5)
    assert run.finish(5).out == "watching\n"
