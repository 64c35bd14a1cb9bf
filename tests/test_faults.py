"""The long campaign (`make test-long`): runs interrupted in random ways end as if nothing had been.

Each case is drawn from its number, so a failure can be repeated: `pytest -m long -k "case[17]"`. LLB_FAULTS says how
many cases there are.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict

import psutil
import pytest
from running import check_stop_at_random, flags, options_of, OPTIONS, results, STEPS, TINY

from llb.runs.folder import read_events, tail_events

pytestmark = pytest.mark.long
CASES = int(os.environ.get("LLB_FAULTS", 40))
FAULTS = ("kill -9 of one process", "kill -9 of all", "kill -9 of all, newest checkpoint damaged", "SIGTERM", "SIGINT",
          "stop file", "disk full")


@pytest.fixture(scope="module")
def table():
    "What was done, printed when all is over."
    rows = defaultdict(Counter)
    yield rows
    print(f"\n{'what was done':<44}{'times':>6}{'while running':>15}{'resumed':>9}{'steps done twice':>18}")
    for name, row in rows.items():
        twice = row["repeated"] / max(row["running"], 1)
        print(f"{name:<44}{row['times']:>6}{row['running']:>15}{row['resumed']:>9}{twice:>18.1f}")
    print("Steps done twice: per interruption, those since the last checkpoint, written after each epoch of 7 steps.")


@pytest.fixture
def disk(tmp_path):
    "A file system of 30 MB, or just a folder where mounting is not allowed."
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", folder]
    mounted = shutil.which("mount") and not subprocess.run(words, capture_output=True).returncode
    yield folder if mounted else tmp_path
    if mounted: subprocess.run(["umount", "--lazy", folder], check=True)


def steps_reported(folder):
    "Steps in the order they were done, over all lives of the run."
    path = folder / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [e["step"] for e in events if e["kind"] == "step"]


def family(ranks):
    "The processes of a forked run: each rank has a session of its own, with its loader workers in it."
    leaders, found = {p.pid for p in ranks}, []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) in leaders: found.append(pid)
        except ProcessLookupError: pass
    return found


def send(pids, number):
    for pid in pids:
        try: os.kill(pid, number)
        except ProcessLookupError: pass


def damage(folder, rng):
    """Flip a bit or cut off the end, in a random file of the newest checkpoint.

    Not of the only one, without which a run rightly refuses to go on.
    """
    newest = sorted((folder / "checkpoints").glob("step-????????"))[1:][-1:]
    for path in [rng.choice(sorted(n.iterdir())) for n in newest]:
        data = bytearray(path.read_bytes())
        if rng.random() < .5: data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else: del data[rng.randrange(len(data)):]
        path.write_bytes(data)


def fill(disk):
    with open(disk / "filler", "wb") as f:
        try:
            while f.write(bytes(1 << 16)): f.flush()
        except OSError: pass


def strike(fault, run, folder, disk, rng):
    "Do it."
    if fault == "stop file" and folder.is_dir(): (folder / "stop").touch()
    elif fault == "stop file": return
    elif fault == "disk full": fill(disk)
    elif fault == "kill -9 of one process": send([rng.choice(family(run.ranks) or [2**22 + 1])], signal.SIGKILL)
    elif fault.startswith("kill -9 of all"): send(family(run.ranks), signal.SIGKILL)
    else: send([rng.choice(run.ranks).pid], getattr(signal, fault))


def wait_for_moment(run, folder, before, rng):
    "Until the run has done a random number of further steps, or a random time of its start."
    wanted = rng.choice([0, *range(1, STEPS)])
    until = time.monotonic() + (rng.uniform(0, 2) if wanted == 0 else 40)
    while time.monotonic() < until and any(p.is_alive() for p in run.ranks):
        if wanted and len(steps_reported(folder)) - before >= wanted: break
        time.sleep(.005)
    time.sleep(rng.uniform(0, .08))


def life(forked, processes, folder, **options):
    "Start the run, or go on with it."
    begun = (folder / "events.jsonl").exists()
    options = {**OPTIONS, "batch_size": 6 // processes, "timeout": 10, **options}
    return forked(processes, save_dir=folder.parent, resume=begun, overwrite=not begun, **options)


def undone(folder, position):
    "The step at which the life began whose events follow a position in the file; None when it did not get so far."
    events = tail_events(folder, position)[0]
    return next((e["step"] for e in events if e["kind"] in ("start", "resume")), None)


@pytest.mark.parametrize("number", range(CASES))
def test_case(number, images, disk, forked, wanted, table):
    rng, folder = random.Random(number), disk / "run"
    processes, options = rng.choice([1, 2]), dict(data_dir=images, workers=rng.choice([0, 2]), save_every=1)
    open_faults = []   # what was done since the last life that got to its first step, and the step it was at
    for _ in range(rng.randint(1, 3)):
        fault = rng.choice([f for f in FAULTS if f != "disk full" or disk.name == "disk"])
        position, before = tail_events(folder)[1], len(steps_reported(folder))
        run = life(forked, processes, folder, **options)
        wait_for_moment(run, folder, before, rng)
        running = all(p.is_alive() for p in run.ranks)
        strike(fault, run, folder, disk, rng)
        run.finish(40)
        wait_until_gone(run)
        count_repeated(open_faults, undone(folder, position), table)
        open_faults.append((fault, max(steps_reported(folder)[before:], default=0)))
        table[fault].update(times=1, running=running)
        if fault.endswith("damaged"): damage(folder, rng)
        (disk / "filler").unlink(missing_ok=True)
    position = tail_events(folder)[1]
    last = life(forked, processes, folder, **options)
    assert last.finish(60) == [0] * processes, last.text
    count_repeated(open_faults, undone(folder, position), table)
    assert results(folder) == wanted[processes]
    events = read_events(folder)
    assert [e["step"] for e in events if e["kind"] == "step"] == list(range(1, STEPS + 1))
    assert events[-1]["reason"] == "done"


def count_repeated(open_faults, began, table):
    "Count the steps that a life does again, for what had been done to the lives before."
    if began is None: return
    for fault, step in open_faults: table[fault].update(resumed=1, repeated=max(0, step - began))
    open_faults.clear()


def wait_until_gone(run):
    "Loader workers look for their parent every 5 s."
    until = time.monotonic() + 15
    while (left := family(run.ranks)) and time.monotonic() < until: time.sleep(.1)
    assert not left, f"still running: {left}"


@pytest.mark.parametrize("number", range(CASES // 5))
def test_torchrun_goes_on_by_itself(number, images, tmp_path, start, wanted, table):
    "Random processes of a run are killed again and again; `torchrun --max-restarts` starts them anew."
    rng, folder = random.Random(f"torchrun {number}"), tmp_path / "run"
    options = {**TINY, **options_of(images, tmp_path, 2, workers=rng.choice([0, 1]))}
    words = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=5", "-m", "llb.train"
    run = start(sys.executable, *words, *flags(**options))
    for _ in range(rng.randint(1, 3)):
        wanted_steps, until = len(steps_reported(folder)) + rng.randrange(1, 12), time.monotonic() + 40
        while len(steps_reported(folder)) < wanted_steps and time.monotonic() < until and run.process.poll() is None:
            time.sleep(.005)
        victims = [pid for pid in run.alive() if pid != run.process.pid]
        if run.process.poll() is None and victims:
            send([rng.choice(victims)], signal.SIGKILL)
            table["kill -9 under torchrun --max-restarts"].update(times=1, running=1, resumed=1)
    assert run.finish(120).code == 0, run.err
    run.wait_until_gone()
    assert results(folder) == wanted[2]


@pytest.mark.parametrize("seed", range(30))
def test_stop_at_random_moments(seed, images, tmp_path, forked, wanted):
    check_stop_at_random(1000 + seed, images, tmp_path, forked, wanted)
