"""A run that is killed or stopped, anywhere, and resumed ends as if nothing had happened, bit by bit; and nothing is left running.

Kills inside the training process are exact (before or after a given step, at a given system call of a save, in an evaluation); those from the outside
hit the command as people start it, under torchrun.
"""
import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from conftest import OPTIONS, TINY, flags, results, wait_for_step
from safetensors.torch import load_file

from llb.runs.folder import read_events

pytestmark = pytest.mark.slow
# What is done to a training process from within

def kill_now(): os.kill(os.getpid(), signal.SIGKILL)


def at_step(number, what, after):
    "Kill, or send a signal, before or after a step."
    from llb.training.step import TrainStep
    call = TrainStep.__call__
    def step(self, batch, n, epoch):
        if n == number and not after: os.kill(os.getpid(), what)
        terms = call(self, batch, n, epoch)
        if n == number and after: os.kill(os.getpid(), what)
        return terms
    TrainStep.__call__ = step


def at_call(owner, name, count):
    "Kill at the n-th call of a function, half of it done in the case of writing."
    import importlib
    module, _, attribute = owner.partition(":")
    target = importlib.import_module(module)
    for part in attribute.split(".") if attribute else []: target = getattr(target, part)
    call, calls = getattr(target, name), [0]
    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            if name == "write_bytes": call(args[0], args[1][:len(args[1]) // 2])
            kill_now()
        return call(*args, **kwargs)
    setattr(target, name, dying)


def random_places(seed, n):
    "Steps 1..20 and whether before or after them; the first steps and those around an epoch's end are always among them."
    rng = random.Random(seed)
    return [(rng.choice([6, 7, 13]) if i % 3 == 0 else rng.randrange(1, 21), rng.random() < .5) for i in range(n)]


def interrupted(forked, images, folder, processes, workers, patch, patch_rank, **options):
    "Run until killed, and resume."
    options = dict(data_dir=images, save_dir=folder, workers=workers, **{**OPTIONS, "batch_size": 6 // processes, **options})
    first = forked(processes, patch=patch, patch_rank=patch_rank, **options)
    codes = first.finish(40)
    assert codes[patch_rank] == -signal.SIGKILL and 0 not in codes, (codes, first.text)
    second = forked(processes, resume=True, **options)
    assert second.finish(40) == [0] * processes, second.text
    return second


@pytest.mark.parametrize("processes,workers", [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_kill_at_random_steps(processes, workers, images, tmp_path, forked, wanted):
    for i, (step, after) in enumerate(random_places(f"{processes} {workers}", 3 if workers == 0 else 2)):
        interrupted(forked, images, tmp_path / str(i), processes, workers, (at_step, step, signal.SIGKILL, after), patch_rank=i % processes)
        assert results(tmp_path / str(i) / "run") == wanted[processes], (step, after)
        events = read_events(tmp_path / str(i) / "run")
        assert [e["step"] for e in events if e["kind"] == "step"] == list(range(1, 22)), "each step is reported once"
        assert len([e for e in events if e["kind"] == "epoch"]) == 3 and events[-1]["reason"] == "done"


SAVING = [("pathlib:Path", "write_bytes", 4), ("os", "fsync", 5), ("pathlib:Path", "rename", 2), ("llb.training.trainer", "prune_checkpoints", 2),
          ("llb.training.trainer", "save_predictions", 1), ("llb.training.trainer", "evaluate", 2), ("llb.training.trainer", "evaluate", 4)]


@pytest.mark.parametrize("owner,name,count", SAVING, ids=[f"{n}-{c}" for _, n, c in SAVING])
def test_kill_while_saving(owner, name, count, images, tmp_path, forked, wanted):
    interrupted(forked, images, tmp_path, 1, 0, (at_call, owner, name, count), patch_rank=0)
    assert results(tmp_path / "run") == wanted[1]
    assert not [p for p in (tmp_path / "run/checkpoints").iterdir() if len(p.name) != len("step-00000000")], "a kill's leavings are swept up"


def test_kill_while_saving_with_two_processes(images, tmp_path, forked, wanted):
    interrupted(forked, images, tmp_path, 2, 0, (at_call, "pathlib:Path", "rename", 2), patch_rank=0)
    assert results(tmp_path / "run") == wanted[2]


def test_two_kills(images, tmp_path, forked, wanted):
    options = dict(data_dir=images, save_dir=tmp_path, **OPTIONS)
    assert forked(patch=(at_step, 9, signal.SIGKILL, True), **options).finish() == [-signal.SIGKILL]
    assert forked(patch=(at_step, 10, signal.SIGKILL, True), resume=True, **options).finish() == [-signal.SIGKILL]
    assert forked(resume=True, **options).finish() == [0]
    assert results(tmp_path / "run") == wanted[1]


def test_damaged_newest_checkpoint(images, tmp_path, forked, wanted):
    options = dict(data_dir=images, save_dir=tmp_path, save_every=1, **OPTIONS)
    assert forked(patch=(at_step, 16, signal.SIGKILL, True), **options).finish() == [-signal.SIGKILL]
    newest = tmp_path / "run/checkpoints/step-00000014/state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    run = forked(resume=True, **options)
    assert run.finish() == [0] and "step-00000014 is damaged" in run.text and "Resuming at step 7" in run.text
    assert results(tmp_path / "run") == wanted[1]


# Stopping

@pytest.mark.parametrize("processes,rank,number,what,after", [
    (1, 0, 3, signal.SIGTERM, True), (1, 0, 6, signal.SIGINT, True), (1, 0, 7, signal.SIGTERM, False), (2, 1, 6, signal.SIGTERM, True),
    (2, 0, 9, signal.SIGINT, False), (1, 0, 20, signal.SIGTERM, True)], ids=["mid", "epoch-end", "epoch-start", "two-epoch-end", "two-mid", "last"])
def test_stop(processes, rank, number, what, after, images, tmp_path, forked, wanted):
    "All processes stop at one step, save and exit 0; also at the last step of an epoch, whose evaluation is then still made."
    options = dict(data_dir=images, save_dir=tmp_path, **{**OPTIONS, "batch_size": 6 // processes})
    run = forked(processes, patch=(at_step, number, what, after), patch_rank=rank, **options)
    assert run.finish() == [0] * processes, run.text
    end = read_events(tmp_path / "run")[-1]
    if number == 20: assert end["reason"] == "done"    # nothing was left to stop
    else:
        assert end["reason"] == "stopped" and end["by"] == what.name and end["step"] == number + 1
        assert (tmp_path / f"run/checkpoints/step-{number + 1:08d}").is_dir() and not (tmp_path / "run/metrics.json").exists()
        run = forked(processes, resume=True, **options)
        assert run.finish() == [0] * processes, run.text
    assert results(tmp_path / "run") == wanted[processes]


def storm(number):
    "Many signals at once, also while it saves."
    at_step(number, signal.SIGTERM, True)
    from llb.runs import checkpoints
    flush = checkpoints._flush
    def noisy(path):
        for s in signal.SIGINT, signal.SIGTERM: os.kill(os.getpid(), s)
        return flush(path)
    checkpoints._flush = noisy


def test_a_second_signal_does_not_spoil_the_save(images, tmp_path, forked, wanted):
    options = dict(data_dir=images, save_dir=tmp_path, **OPTIONS)
    run = forked(patch=(storm, 9), **options)
    assert run.finish() == [0], run.text
    assert read_events(tmp_path / "run")[-1]["reason"] == "stopped"
    assert forked(resume=True, **options).finish() == [0]
    assert results(tmp_path / "run") == wanted[1]


def touch_stop(folder, number):
    from llb.training.step import TrainStep
    call = TrainStep.__call__
    def step(self, batch, n, epoch):
        if n == number: Path(folder, "stop").touch()
        return call(self, batch, n, epoch)
    TrainStep.__call__ = step


@pytest.mark.parametrize("processes", [1, 2])
def test_stop_file(processes, images, tmp_path, forked, wanted):
    options = dict(data_dir=images, save_dir=tmp_path, **{**OPTIONS, "batch_size": 6 // processes})
    run = forked(processes, patch=(touch_stop, str(tmp_path / "run"), 4), **options)
    assert run.finish() == [0] * processes, run.text
    end = read_events(tmp_path / "run")[-1]
    assert end["reason"] == "stopped" and end["by"] == "stop file" and end["step"] == 5
    assert forked(processes, resume=True, **options).finish() == [0] * processes   # the file is not obeyed twice
    assert results(tmp_path / "run") == wanted[processes]


# From the outside, under torchrun

LONG = dict(epochs=400, **{k: v for k, v in OPTIONS.items() if k not in ("epochs", "batch_size")}, batch_size=3)


@pytest.mark.parametrize("how", ["SIGTERM to torchrun", "SIGINT to torchrun", "kill -9 of a worker", "kill -9 of torchrun"])
def test_torchrun(how, images, tmp_path, train):
    options = dict(data_dir=images, save_dir=tmp_path, **{**LONG, "workers": 1})
    run = train(2, **options)
    wait_for_step(tmp_path / "run", 8, run)
    agent = run.process.pid
    ranks = [int(p) for p in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    assert len(run.alive()) >= 5   # torchrun, two ranks, a loader worker each
    name, _, whom = how.partition(" to ") if " to " in how else ("SIGKILL", "", "")
    os.kill(ranks[-1] if "worker" in how else agent, getattr(signal, name))
    run.wait_until_gone(20)
    run.finish(10)
    end = read_events(tmp_path / "run")[-1]
    if name != "SIGKILL":
        assert end["kind"] == "end" and end["reason"] == "stopped", run.err   # torchrun itself exits 1 on a signal
        assert (tmp_path / f"run/checkpoints/step-{end['step']:08d}").is_dir()
    else: assert run.code != 0 and end["kind"] != "end"


def kill_once(folder):
    "For `torchrun --max-restarts`: the second process dies in its first life."
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0": at_step(9, signal.SIGKILL, True)


def test_torchrun_restarts_by_itself(images, tmp_path, start, wanted):
    options = {**TINY, **OPTIONS, "batch_size": 3, "data_dir": images, "save_dir": tmp_path}
    program = tmp_path / "program.py"
    program.write_text("import sys\nfrom llb import train\nfrom test_resume import kill_once\nkill_once(None)\ntrain.main(sys.argv[1:])\n")
    run = start(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1", program, *flags(**options),
                env={"PYTHONPATH": os.path.dirname(__file__)}).finish(90)
    assert run.code == 0, run.err
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert kinds.count("start") == 1 and kinds.count("resume") == 1
    assert results(tmp_path / "run") == wanted[2]
    run.wait_until_gone()


def test_a_process_that_never_joins(images, tmp_path, start):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    run = start(sys.executable, "-m", "llb.train", *flags(**{**TINY, "data_dir": images, "save_dir": tmp_path, "timeout": 3}),
                env=dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))).finish(60)
    assert run.code == 2 and [line for line in run.err.splitlines() if line.startswith("error: The 2 processes did not all meet within 3 s")], run.err


# Another number of processes

def seen_images(folder):
    "In the training process: write which images each step sees."
    from llb.training.step import TrainStep
    call = TrainStep.__call__
    def step(self, batch, n, epoch):
        with open(Path(folder) / f"seen.{os.environ.get('RANK', 0)}.{os.getpid()}", "a") as f:
            for index, image in zip(batch["index"].tolist(), batch["image"]): f.write(f"{n} {index} {hashlib.sha256(image.numpy().tobytes()).hexdigest()}\n")
        return call(self, batch, n, epoch)
    TrainStep.__call__ = step


@pytest.mark.parametrize("before,after", [(2, 1), (1, 2)])
def test_resume_with_another_number_of_processes(before, after, images, tmp_path, forked, wanted):
    "The global batch stays: the same images and pixels in each step; parameters agree up to rounding (measured: 3e-6)."
    options = dict(data_dir=images, save_dir=tmp_path, **{**OPTIONS, "drop_path": 0})
    for name, first, second in ("whole", before, None), ("run", before, after):
        (tmp_path / f"seen-{name}").mkdir()
        patch = (both, str(tmp_path / f"seen-{name}"), 9 if second else None)
        run = forked(first, patch=patch, **{**options, "name": name, "batch_size": 6 // first})
        assert run.finish() == [0] * first, run.text
        if second:
            run = forked(second, patch=(seen_images, str(tmp_path / f"seen-{name}")), **{**options, "name": name, "batch_size": 6 // first, "resume": True})
            assert run.finish() == [0] * second, run.text
    seen = {n: sorted(line for f in (tmp_path / f"seen-{n}").iterdir() for line in f.read_text().splitlines()) for n in ("whole", "run")}
    assert seen["whole"] == seen["run"] and len(seen["whole"]) == 3 * 7 * 6
    a, b = (load_file(tmp_path / n / "model/model.safetensors") for n in ("whole", "run"))
    largest = max(float(v.abs().max()) for v in a.values())
    difference = max(float((a[k] - b[k]).abs().max()) for k in a) / largest
    print(f"relative difference {difference:.1e}")
    assert difference < 3e-5
    one, other = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("whole", "run"))
    assert one["seen"] == other["seen"] and one["chosen_epoch"]["step"] == other["chosen_epoch"]["step"]
    assert one["label"]["nll"] == pytest.approx(other["label"]["nll"], rel=1e-4)


def both(folder, stop_after):
    seen_images(folder)
    if stop_after: at_step(stop_after, signal.SIGTERM, True)


def test_other_numbers_of_processes_see_the_same_pixels(images, tmp_path, forked):
    "Batches of 6: one process, two, and three; here of the batches themselves."
    from llb.models.backbone import load_backbone
    from llb.data.batches import ImageDataset, TrainBatches, make_loader; from llb.data.splits import load_data
    train, transform = load_data(images).train, load_backbone("test_vit", pretrained=False, image_size=32).transform(train=True)
    steps = {}
    for size in 1, 2, 3:
        batches = [TrainBatches(len(train), 6, 5, rank, size) for rank in range(size)]
        shares = [list(make_loader(ImageDataset(train, transform, 5), b)) for b in batches]
        steps[size] = [{int(i): hashlib.sha256(x.numpy().tobytes()).hexdigest() for s in step for i, x in zip(s["index"], s["image"])} for step in zip(*shares)]
    assert steps[1] == steps[2] == steps[3] and len(steps[1]) == 7 and all(len(s) == 6 for s in steps[1])


def test_the_same_backbone_everywhere(images, tmp_path, forked):
    "A random backbone is the same in every process and after a resume."
    options = dict(data_dir=images, save_dir=tmp_path, **{**OPTIONS, "epochs": 1})
    hashes = set()
    for processes, name in (1, "a"), (2, "b"):
        run = forked(processes, patch=(say_backbone,), patch_rank=processes - 1, **{**options, "name": name})
        assert run.finish() == [0] * processes, run.text
        hashes |= {line for line in run.text.splitlines() if line.startswith("BACKBONE ")}
        hashes.add("BACKBONE " + json.loads((tmp_path / name / "config.json").read_text())["backbone"]["content_hash"])
    assert len(hashes) == 1
    run = forked(**{**options, "name": "a", "resume": True, "seed": 1})
    assert run.finish() == [2] and "seed 0 -> 1" in run.text


def say_backbone():
    from llb.training.trainer import Trainer
    fit = Trainer.fit
    def wrapped(self):
        print("BACKBONE", self.model.backbone.content_hash(), flush=True)
        return fit(self)
    Trainer.fit = wrapped


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
