"""What the tests share: a folder of small images, and ways to run the training command and to see that nothing of it is left."""
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import uuid
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before anything imports torch, here and in what is started

import pytest  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

pytest.register_assert_rewrite("browser")
from browser import chromium, lab  # noqa: E402, F401  (fixtures of the browser tests)

ROOT = Path(__file__).parent.parent
TINY = dict(dataset="ImageFolder", backbone="test_vit.r160_in1k", random_backbone=True, image_size=32, num_objects=8, num_layers=2, target_layer=3,
            epochs=3, batch_size=8, lr=1e-3, device="cpu", log_every=1, workers=0, name="run", timeout=60)


def draw(shape, rng, size=40):
    "An image of a circle, square or triangle in random colours."
    colour = lambda: tuple(rng.randrange(256) for _ in range(3))
    image = Image.new("RGB", (size, size), colour())
    pen, fill = ImageDraw.Draw(image), colour()
    x, y = rng.randrange(2, size // 2 - 2), rng.randrange(2, size // 2 - 2)
    box = [x, y, x + size // 2, y + size // 2]
    if shape == "circle": pen.ellipse(box, fill=fill)
    if shape == "square": pen.rectangle(box, fill=fill)
    if shape == "triangle": pen.polygon([(x, y + size // 2), (x + size // 2, y + size // 2), (x + size // 4, y)], fill=fill)
    return image


def make_images(root, per_class=20, classes=("circle", "square", "triangle")):
    "A folder of class folders; the same bytes each time."
    rng = random.Random(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class): draw(name, rng).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    "60 small images in 3 class folders; not to be changed."
    return make_images(tmp_path_factory.mktemp("images") / "shapes")


NASTY = "<img src=x onerror=alert(1)>", "$a$ & \"b\"", "c" * 200, "d\u0000e"   # class names from anyone


@pytest.fixture(scope="session")
def small_llb():
    "An untrained LLB of 12 objects on 3 x 5 patches."
    import torch

    from llb.models.backbone import load_backbone
    from llb.models.llb import LLB
    torch.manual_seed(0)
    backbone = load_backbone("vit_tiny_patch16_224", pretrained=False, image_size=(48, 80), num_classes=0)
    return LLB(backbone, num_objects=12, num_layers=2, target_layer=3, num_classes=4).eval()


@pytest.fixture(scope="session")
def nasty_index(small_llb, tmp_path_factory):
    "Its index of 60 drawings whose four classes have nasty names, with effects beside it."
    from dataclasses import replace

    import torch

    from llb.analysis.effects import build_effects
    from llb.analysis.index import build_index
    from llb.core.distributed import Runtime
    from llb.data.splits import load_data
    from llb.training.inputs import scoring_loader
    runtime = Runtime(torch.device("cpu"))
    few = load_data(ROOT / "data/openclipart").val.take(range(0, 600, 10))
    few = replace(few, labels=tuple(i % 4 for i in range(len(few))), classes=NASTY)
    loader = scoring_loader(small_llb, few, batch_size=16)
    index = build_index(small_llb, loader, tmp_path_factory.mktemp("run") / "objects" / "val", runtime)
    build_effects(small_llb, loader, index, runtime, 3)
    return index


def flags(**values):
    "Keyword arguments as words of the command line."
    words = []
    for name, value in values.items():
        if isinstance(value, bool): words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None: words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def processes_with(mark):
    "The ids of all live processes whose environment holds a mark."
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes() and b"\nState:\tZ" not in (entry / "status").read_bytes():
                found.append(int(entry.name))
        except OSError: pass   # it ended meanwhile, or is not ours
    return found


class Command:
    "A program in its own session, whose descendants can be found by a mark in their environment."
    def __init__(self, *words, cwd=ROOT, env=()):
        self.mark = f"LLB_TEST_MARK={uuid.uuid4().hex}".encode()
        name, value = self.mark.decode().split("=")
        self.process = subprocess.Popen([str(w) for w in words], cwd=cwd, env={**os.environ, **dict(env), name: value, "OMP_NUM_THREADS": "1"},
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def finish(self, timeout=60):
        "Wait for it to end."
        try: self.out, self.err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self.out, self.err = self.process.communicate()
            pytest.fail(f"it did not end within {timeout} s:\n{self.out}\n{self.err}")
        self.code = self.process.returncode
        return self

    def alive(self): return processes_with(self.mark)

    def wait_until_gone(self, timeout=15):
        "Assert that nothing of it is left running."
        until = time.monotonic() + timeout
        while (left := self.alive()) and time.monotonic() < until: time.sleep(.05)
        assert not left, f"still running after {timeout} s: {left}"

    def kill(self):
        for pid in self.alive():
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass


@pytest.fixture
def start():
    "Start a program; what is left of it after the test is killed."
    commands = []
    def make(*words, **kwargs):
        commands.append(Command(*words, **kwargs))
        return commands[-1]
    yield make
    for command in commands: command.kill()


@pytest.fixture
def train(start):
    "Start `python -m llb.train`, or torchrun with several processes."
    def make(processes=1, torchrun=(), env=(), **options):
        launcher = [sys.executable] if processes == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
        return start(*launcher, "-m", "llb.train", *flags(**{**TINY, **options}), env=env)
    return make


# Starting Python and importing PyTorch takes seconds. Where only the training matters, processes are forked from one that has done so.

def _train_here(argv, env, log, patch):
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)   # for loader workers, as in a process that was not forked
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in 1, 2: os.dup2(file, stream)
    from llb import train
    if patch: patch[0](*patch[1:])
    train.main(argv)


class Forked:
    "The training command in one or several processes that are forked, not started; `patch` (a function and its arguments) is called in one or all first."
    def __init__(self, log, processes=1, patch=None, patch_rank=None, **options):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["llb.train"])
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.log, self.mark = Path(log), f"LLB_TEST_MARK={uuid.uuid4().hex}".encode()
        argv, self.ranks = flags(**{**TINY, **options}), []
        for rank in range(processes):
            env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port) if processes > 1 else {}
            process = context.Process(target=_train_here, args=(argv, {k: str(v) for k, v in env.items()}, str(log),
                                                                patch if patch_rank in (None, rank) else None))
            process.start()
            self.ranks.append(process)

    def finish(self, timeout=60):
        "Wait for all to end; their exit codes."
        until = time.monotonic() + timeout
        for process in self.ranks: process.join(max(0, until - time.monotonic()))
        late = [p.pid for p in self.ranks if p.is_alive()]
        for pid in late: os.kill(pid, signal.SIGKILL)
        assert not late, f"{len(late)} processes did not end within {timeout} s:\n{self.log.read_text()}"
        self.text = self.log.read_text()
        return [p.exitcode for p in self.ranks]


@pytest.fixture
def forked(tmp_path):
    "Run the training command in forked processes."
    runs = []
    def make(processes=1, **options):
        runs.append(Forked(tmp_path / f"log{len(runs)}.txt", processes, **options))
        return runs[-1]
    yield make
    for run in runs:
        for process in run.ranks:
            if process.is_alive(): process.kill()


def wait_for_step(folder, step, command, timeout=60):
    "Wait until a run has written the event of a step."
    path, until = Path(folder) / "events.jsonl", time.monotonic() + timeout
    while time.monotonic() < until:
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            try: event = json.loads(line)
            except json.JSONDecodeError: continue
            if event["kind"] == "step" and event["step"] >= step: return
        if command.process.poll() is not None: break
        time.sleep(.01)
    pytest.fail(f"step {step} was not reached: {command.finish(5).err}")


def peak_memory(task):
    "The most MB of Python objects while a task runs, and of this process so far."
    tracemalloc.start()
    task()
    most = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return most, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# A run that was interrupted is compared with one that was not.

OPTIONS = dict(augment="randaugment", drop_path=0.2, epochs=3, batch_size=6)   # everything random that there is; 7 steps an epoch


FREE = ("name", "save_dir", "resume", "overwrite", "workers", "save_every", "timeout")   # options that change no result


def results(folder):
    "What must not depend on interruptions: parameters, optimizer state, losses and metrics, as bytes."
    newest = sorted((folder / "checkpoints").glob("step-????????"))[-1]
    state = json.loads((newest / "state.json").read_text())
    for epoch in state["history"]:
        for timing in "seconds", "images_per_s", "data_wait", "time": epoch.pop(timing, None)
    state["config"] = {k: v for k, v in state["config"].items() if k not in FREE}
    hashes = {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in ("model/model.safetensors", "predictions.safetensors", "metrics.json")}
    return {**hashes, "optimizer": hashlib.sha256((newest / "state.safetensors").read_bytes()).hexdigest(), "state": state, "step": newest.name}


@pytest.fixture(scope="session")
def wanted(tmp_path_factory, images):
    "The results of uninterrupted runs of 1 and 2 processes."
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for processes in 1, 2:
        run = Forked(folder / "log.txt", processes, data_dir=images, save_dir=folder, name=str(processes), **OPTIONS | {"batch_size": 6 // processes})
        assert run.finish() == [0] * processes, run.text
        found[processes] = results(folder / str(processes))
    return found
