"""Whatever happens to a checkpoint or to the disk, a wrong state is never loaded and a whole one is never lost."""
import errno
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from faults import checkpoint_state as state
from running import flags

from llb.core.errors import InputError
from llb.runs import checkpoints
from llb.runs.checkpoints import load_checkpoint, load_newest, prune_checkpoints, save_checkpoint

FILES = ("state.safetensors", "state.json", "manifest.json")


def same(a, b):
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list): return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def folder(tmp_path):
    "Checkpoints of steps 10, 20 and 30."
    for step in 10, 20, 30: save_checkpoint(tmp_path, step, state(step))
    return tmp_path


def test_round_trip(folder):
    assert same(load_newest(folder), state(30))
    numbers = {"nan": float("nan"), "inf": float("inf"), "tiny": 5e-324, "third": 1 / 3}
    special = {**numbers, "t": torch.tensor([float("nan"), -0.0]), "bf16": torch.ones(3, dtype=torch.bfloat16),
               "flag": torch.tensor(True), "empty": torch.zeros(0, 4)}
    again = load_checkpoint(save_checkpoint(folder, 40, special))
    assert again["nan"] != again["nan"] and all(again[k] == numbers[k] for k in ("inf", "tiny", "third"))
    assert again["t"].view(torch.int32).tolist() == special["t"].view(torch.int32).tolist()
    assert all(same(again[k], special[k]) for k in ("bf16", "flag", "empty"))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("fraction", [0, .3, .99])
def test_truncated(file, fraction, folder, capsys):
    path = folder / "step-00000030" / file
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * fraction)])
    with pytest.raises(InputError, match="step-00000030 is damaged"): load_checkpoint(path.parent)
    assert same(load_newest(folder), state(20))
    captured = capsys.readouterr()
    assert "step-00000030 is damaged" in captured.out + captured.err


@pytest.mark.parametrize("file", FILES)
def test_bit_flips(file, folder):
    path, rng = folder / "step-00000030" / file, random.Random(file)
    data, refused = path.read_bytes(), 0
    for _ in range(60):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try: assert same(load_checkpoint(path.parent), state(30))   # a manifest has bytes that decide nothing
        except InputError: refused += 1
    assert refused == 60 if file != "manifest.json" else refused > 40
    path.write_bytes(data)
    assert same(load_checkpoint(path.parent), state(30))


@pytest.mark.parametrize("file", FILES)
def test_missing_file(file, folder):
    (folder / "step-00000030" / file).unlink()
    assert same(load_newest(folder), state(20))


def test_all_damaged(folder):
    for path in folder.glob("step-*/manifest.json"): path.unlink()
    with pytest.raises(InputError, match="All 3 checkpoints .* are damaged"): load_newest(folder)


def test_swapped_files(folder):
    "Files of two checkpoints, each whole, are not a checkpoint."
    shutil.copy(folder / "step-00000020/state.json", folder / "step-00000030/state.json")
    assert same(load_newest(folder), state(20))


# A kill before every change of a file that a save makes: run in a process that dies there, then look.

KILLED = """
import os, sys
from pathlib import Path
from faults import at_change, checkpoint_state
from llb.runs import checkpoints
folder, step = Path(sys.argv[1]), int(sys.argv[2])
for at in range(1, 60):
    if not (child := os.fork()):
        at_change(str(folder), at)
        checkpoints.save_checkpoint(folder, step, {**checkpoint_state(step), "again": True})
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = checkpoints.load_newest(folder)
    print(at, code, found["step"], found.get("again", False), flush=True)
    if code == 0: break
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", [40, 30], ids=["new", "replacing"])
def test_kill_during_the_write(step, folder):
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", KILLED, folder, str(step)], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) > 4 and [int(r[1]) for r in rows] == [-signal.SIGKILL] * (len(rows) - 1) + [0]
    assert all(int(r[2]) in (30, step) for r in rows)          # never less than what there was
    assert rows[0][3] == "False" and rows[-1][3] == "True" and int(rows[-1][2]) == step
    prune_checkpoints(folder, keep={10, step})
    left = sorted(p.name for p in folder.iterdir())
    assert left == ["step-00000010", f"step-{step:08d}"], "nothing half-written stays"


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 200 kB."
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_full_disk(small_disk):
    save_checkpoint(small_disk, 1, state(1))
    with pytest.raises(InputError, match="step 2 cannot be written .*No space left") as refused:
        save_checkpoint(small_disk, 2, {**state(2), "big": torch.zeros(100_000)})
    assert "\n" not in str(refused.value)
    assert same(load_newest(small_disk), state(1)) and [p.name for p in small_disk.iterdir()] == ["step-00000001"]
    save_checkpoint(small_disk, 3, state(3))   # the room is free again
    assert same(load_newest(small_disk), state(3))


def failing(number):
    "A stand-in that raises what a disk would."
    def fail(*_): raise OSError(number, os.strerror(number))
    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_write_errors_simulated(number, folder, monkeypatch):
    "SIMULATED: the error is raised by a stand-in for fsync, no disk was full."
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(InputError, match="cannot be written"): save_checkpoint(folder, 40, state(40))
    monkeypatch.undo()
    assert same(load_newest(folder), state(30)) and len(list(folder.iterdir())) == 3


def test_a_checkpoint_that_cannot_be_replaced_stays_simulated(folder, monkeypatch):
    "SIMULATED: the new one, written in full, cannot take the place of the old one of the same step."
    replace = os.replace

    def fail(source, target):
        if str(source).endswith(".tmp"): raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="cannot be written"):
        save_checkpoint(folder, 30, {**state(30), "again": True})
    monkeypatch.undo()
    assert same(load_newest(folder), state(30)) and len(list(folder.iterdir())) == 3


def test_a_disk_that_loses_bits_simulated(folder, monkeypatch):
    "SIMULATED: what is read back differs from what was written."
    write = checkpoints.Path.write_bytes

    def lossy(path, data): write(path, data[:-1] + bytes([data[-1] ^ 1]))
    monkeypatch.setattr(checkpoints.Path, "write_bytes", lossy)
    with pytest.raises(InputError, match="reads back differently"): save_checkpoint(folder, 40, state(40))
    monkeypatch.undo()
    assert same(load_newest(folder), state(30))


# Files that would run code

class Malicious:
    def __init__(self, target): self.target = target
    def __reduce__(self): return (os.system, (f"touch {self.target}",))


def write_pickle(path, target): path.write_bytes(pickle.dumps({"state_dict": Malicious(target)}))
def write_torch(path, target): torch.save({"model": Malicious(target)}, path)
def write_old_torch(path, target): torch.save({"model": Malicious(target)}, path, _use_new_zipfile_serialization=False)
def write_module(path, target): torch.save(torch.nn.Linear(2, 2), path)


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_pickle, write_torch, write_old_torch, write_module])
@pytest.mark.parametrize("name", ["backbone.pth", "backbone.bin", "backbone.safetensors"])
def test_no_code_is_run_from_a_file(write, name, tmp_path):
    from llb.models.backbone import load_backbone
    target = tmp_path / "it_ran"
    write(tmp_path / name, target)
    with pytest.raises(InputError) as refused:
        load_backbone("test_vit", checkpoint=tmp_path / name, image_size=32, num_classes=3)
    assert not target.exists() and "\n" not in str(refused.value) and name in str(refused.value)


@pytest.mark.slow
def test_no_code_is_run_by_the_command(images, tmp_path, start):
    target = tmp_path / "it_ran"
    write_torch(tmp_path / "backbone.pth", target)
    words = flags(dataset="ImageFolder", data_dir=images, backbone="test_vit", image_size=32, save_dir=tmp_path,
                  checkpoint=tmp_path / "backbone.pth")
    run = start(sys.executable, "-m", "llb.train", *words).finish()
    assert run.code == 2 and run.err.startswith("error: ") and run.err.count("\n") == 1 and not target.exists()


@pytest.mark.parametrize("file", FILES)
def test_a_pickle_in_place_of_a_checkpoint_file(file, folder):
    target = folder.parent / "it_ran"
    (folder / "step-00000030" / file).write_bytes(pickle.dumps(Malicious(target)))
    assert same(load_newest(folder), state(20)) and not target.exists()
