"""Ways to run the training command, to see that nothing of it is left running, and to compare what it has written."""
import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

import psutil
import pytest

from llb.runs.folder import read_events, RunReader
from llb.runs.processes import Run

ROOT = Path(__file__).parent.parent
TINY = dict(dataset="ImageFolder", backbone="test_vit.r160_in1k", random_backbone=True, image_size=32, num_objects=8,
            num_layers=2, target_layer=3, epochs=3, batch_size=8, lr=1e-3, device="cpu", log_every=1, workers=0,
            name="run", timeout=60)
OPTIONS = dict(augment="randaugment", drop_path=0.2, epochs=3, batch_size=6)   # all that is random; 7 steps an epoch
STEPS = 21   # of such a run
FREE = ("name", "save_dir", "resume", "overwrite", "workers", "save_every", "timeout")   # they change no result


def tiny(**options):
    "A small run with some options changed, without what a backbone's own training has no use for."
    idle = ("num_objects", "num_layers", "target_layer") if options.get("objective") == "visual" else ()
    return {name: value for name, value in (TINY | options).items() if name not in idle}


def flags(**values):
    "Keyword arguments as words of the command line."
    words = []
    for name, value in values.items():
        if isinstance(value, bool): words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple): words += [f"--{name}", *map(str, value)]
        elif value is not None: words += [f"--{name}", str(value)]
    return words


def processes_with(name, value):
    "The ids of all live processes whose environment holds a variable."
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) != value: continue
            if process.status() != psutil.STATUS_ZOMBIE: found.append(process.pid)
        except (psutil.Error, OSError): pass   # it ended meanwhile, or is not ours
    return found


class Command:
    "A program in its own session, whose descendants can be found by a mark in their environment."
    def __init__(self, *words, cwd=ROOT, env=()):
        self.mark = ("LLB_TEST_MARK", uuid.uuid4().hex)
        env = {**os.environ, **dict(env), self.mark[0]: self.mark[1], "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([str(w) for w in words], cwd=cwd, env=env, start_new_session=True, text=True,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finish(self, timeout=60):
        "Wait for it to end."
        try: self.out, self.err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self.out, self.err = self.process.communicate()
            pytest.fail(f"it did not end within {timeout} s:\n{self.out}\n{self.err}")
        self.code = self.process.returncode
        return self

    def alive(self): return processes_with(*self.mark)

    def wait_until_gone(self, timeout=15):
        "Assert that nothing of it is left running."
        until = time.monotonic() + timeout
        while (left := self.alive()) and time.monotonic() < until: time.sleep(.05)
        assert not left, f"still running after {timeout} s: {left}"

    def kill(self):
        for pid in self.alive():
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass


# Starting Python and importing PyTorch takes seconds. Where only the training matters, processes are forked from one
# that has done so.

def _in_fork(env, log, task, args):
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)   # for loader workers, as in a process that was not forked
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in 1, 2: os.dup2(file, stream)
    task(*args)


def environment_of_ranks(processes):
    "The environment of each process of a group, as torchrun would set it; nothing for a single one."
    if processes == 1: return [{}]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


class Forked:
    "Tasks (a function and its arguments), each in a process that is forked, not started, and all of one group."
    def __init__(self, log, *tasks):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["llb.train", "llb.training.finetune", "llb.runs.cost"])
        self.log, self.ranks = Path(log), []
        for env, (task, *args) in zip(environment_of_ranks(len(tasks)), tasks):
            self.ranks.append(context.Process(target=_in_fork, args=(env, str(log), task, args)))
            self.ranks[-1].start()

    def alive(self): return any(process.is_alive() for process in self.ranks)

    def finish(self, timeout=60):
        "Wait for all to end; their exit codes."
        until = time.monotonic() + timeout
        for process in self.ranks: process.join(max(0, until - time.monotonic()))
        late = [p.pid for p in self.ranks if p.is_alive()]
        for pid in late: os.kill(pid, signal.SIGKILL)
        assert not late, f"{len(late)} processes did not end within {timeout} s:\n{self.log.read_text()}"
        self.text = self.log.read_text()
        return [p.exitcode for p in self.ranks]


def _train(argv, patch):
    from llb import train
    if patch: patch[0](*patch[1:])
    train.main(argv)


def forked_training(log, processes=1, patch=None, patch_rank=None, **options):
    """The training command in forked processes.

    `patch`, a function and its arguments, is called first: in all of them, or in that of `patch_rank`.
    """
    argv = flags(**tiny(**options))
    return Forked(log, *[(_train, argv, patch if patch_rank in (None, rank) else None) for rank in range(processes)])


def wait_for_step(folder, step, command, timeout=60):
    "Wait until a run has written the event of a step."
    run, until = RunReader(folder), time.monotonic() + timeout
    while time.monotonic() < until:
        if any(e["step"] >= step for e in run.events("step")): return
        if command.process.poll() is not None: break
        time.sleep(.01)
    pytest.fail(f"step {step} was not reached: {command.finish(5).err}")


# A run that was interrupted is compared with one that was not.

def results(folder):
    "What must not depend on interruptions: parameters, optimizer state, losses and metrics, as bytes."
    newest = sorted((folder / "checkpoints").glob("step-????????"))[-1]
    state = json.loads((newest / "state.json").read_text())
    for epoch in state["history"]:
        for timing in "seconds", "images_per_s", "data_wait", "time": epoch.pop(timing, None)
    state["config"] = {k: v for k, v in state["config"].items() if k not in FREE}
    files = {f: folder / f for f in ("model/model.safetensors", "predictions.safetensors", "metrics.json")}
    files["optimizer"] = newest / "state.safetensors"
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    return {**hashes, "state": state, "step": newest.name}


def options_of(images, folder, processes, **options):
    "Those of the uninterrupted runs, in another folder."
    return dict(data_dir=images, save_dir=folder, **{**OPTIONS, "batch_size": 6 // processes, **options})


# Stopping at random

def stop_somewhen(run, folder, rng):
    "Ask by the stop file, as `Run.stop` does, from a random moment on; whether the run lived then."
    steps = rng.choice([0, *range(1, 21)])
    until = time.monotonic() + (rng.uniform(0, 3) if steps == 0 else 40)
    while time.monotonic() < until and run.alive():
        if steps and any(e["step"] >= steps for e in read_events(folder, "step")): break
        time.sleep(.002)
    time.sleep(rng.uniform(0, .03))
    lived = run.alive()
    while run.alive():
        if folder.is_dir(): (folder / "stop").touch()
        time.sleep(.02)
    return lived


def check_stop_at_random(seed, images, folder, forked, wanted):
    "The state says that it was stopped as asked, and the resumed run ends as the uninterrupted one."
    rng = random.Random(seed)
    processes = rng.choice([1, 2, 2])
    options = options_of(images, folder, processes, name=f"run{seed}")
    run, where = forked(processes, **options), folder / f"run{seed}"
    lived = stop_somewhen(run, where, rng)
    assert run.finish() == [0] * processes, run.text
    state, end = Run(where).state, read_events(where)[-1]
    print(f"seed {seed}: {processes} process(es), asked {'while it ran' if lived else 'too late'}: {state}")
    if end["reason"] == "done": assert end["step"] == STEPS and state.name == "done"
    else:
        assert str(state) == f"stopped: as asked after step {end['step']}; resume goes on from there"
        again = forked(processes, resume=True, **options)
        assert again.finish() == [0] * processes, again.text
    assert results(where) == wanted[processes]
