"""What tests do to a training process from within: kills and signals at exact moments.

The functions are called in that process, before it trains.
"""
import hashlib
import os
import signal
import sys
from pathlib import Path


def kill_now(): os.kill(os.getpid(), signal.SIGKILL)


def _around_steps(before=None, after=None):
    "Call `before(batch, n)` and `after(batch, n)` around each optimizer step n."
    from llb.training.step import TrainStep
    call = TrainStep.__call__

    def step(self, batch, n, epoch):
        if before: before(batch, n)
        terms = call(self, batch, n, epoch)
        if after: after(batch, n)
        return terms
    TrainStep.__call__ = step


def at_step(number, what, after):
    "Kill, or send a signal, before or after a step."
    def strike(batch, n):
        if n == number: os.kill(os.getpid(), what)
    _around_steps(None if after else strike, strike if after else None)


def at_nth_step(count, what, after):
    "The same, before or after the n-th step that this process takes, in whichever phase of a run."
    taken = []
    def strike(batch, n):
        taken.append(n)
        if len(taken) == count: os.kill(os.getpid(), what)
    _around_steps(None if after else strike, strike if after else None)


def at_call(module, name, count):
    "Kill at the n-th call of a function of the package, before it does anything."
    target = sys.modules[module]
    call, calls = getattr(target, name), []

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) == count: kill_now()
        return call(*args, **kwargs)
    setattr(target, name, dying)


CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # what Python announces before it changes a disk


def at_change(part, count, event=None):
    "Kill just before the n-th change (of a kind, see CHANGES, or of any) to files whose path contains a word."
    seen = []

    def hook(name, args):
        if name not in CHANGES or name != (event or name): return
        if not isinstance(args[0], (str, bytes, os.PathLike)) or part not in os.fsdecode(args[0]): return
        if name == "open" and not _writes(*args[1:]): return
        seen.append(name)
        if len(seen) == count: kill_now()
    sys.addaudithook(hook)


def _writes(mode, flags):
    "Whether an announced `open` may change the file: by its mode, or by the flags of os.open."
    return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


def storm(number):
    "Many signals at once, also while it saves."
    from llb.runs import folder
    at_step(number, signal.SIGTERM, True)
    save = folder.save_checkpoint

    def noisy(*args):
        for what in signal.SIGINT, signal.SIGTERM: os.kill(os.getpid(), what)
        return save(*args)
    folder.save_checkpoint = noisy


def touch_stop(folder, number):
    "Ask by the stop file, in the middle of a step."
    _around_steps(lambda batch, n: Path(folder, "stop").touch() if n == number else None)


def see_stop(number):
    "Take the stop file as seen after a step, though it is not there: on one process this is what a race looks like."
    from llb.core.distributed import StopFlag
    seen = []
    _around_steps(after=lambda batch, n: seen.append(n) if n == number else None)
    look = StopFlag.__bool__

    def early(self):
        if seen: self.reason = self.reason or "stop file"
        return look(self)
    StopFlag.__bool__ = early


def kill_once():
    "For `torchrun --max-restarts`: the second process dies in its first life."
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0": at_step(9, signal.SIGKILL, True)


def die_once():
    "On the machine that is to die, agent and process go at once, in step 9."
    def strike(batch, n):
        if n == 9:
            for pid in os.getppid(), os.getpid(): os.kill(pid, signal.SIGKILL)
    if "LLB_TEST_DIES" in os.environ: _around_steps(strike)


def seen_images(folder):
    "Write which images each step sees."
    def note(batch, n):
        with open(Path(folder) / f"seen.{os.environ.get('RANK', 0)}.{os.getpid()}", "a") as f:
            for index, image in zip(batch["index"].tolist(), batch["image"]):
                f.write(f"{n} {index} {hashlib.sha256(image.numpy().tobytes()).hexdigest()}\n")
    _around_steps(note)


def seen_images_and_stop(folder, number):
    seen_images(folder)
    at_step(number, signal.SIGTERM, True)


def print_backbone():
    "Print the content of the backbone that is trained on."
    from llb.training.trainer import Trainer
    fit = Trainer.fit

    def wrapped(self):
        print("BACKBONE", self.model.backbone.content_hash(), flush=True)
        return fit(self)
    Trainer.fit = wrapped


def checkpoint_state(step):
    "What a checkpoint may hold, different for each step."
    import torch
    head = {"w": torch.full((50,), float(step)), "b": torch.arange(step)}
    return {"step": step, "head": head, "lr": 0.1 * step, "note": [None, True]}
