"""Two machines, played by two torchrun agents with a c10d rendezvous on loopback; one dies and comes back."""
import json
import os
import signal
import socket
import sys

import psutil
import pytest
from running import flags, OPTIONS, results, TINY, wait_for_step

from llb.runs.folder import read_events

pytestmark = pytest.mark.slow
PROGRAM = """
import sys
from llb import train
from faults import die_once
die_once()
train.main(sys.argv[1:])
"""
RENDEZVOUS = "join_timeout=60,keep_alive_interval=1,keep_alive_max_attempt=2"


@pytest.fixture
def machines(images, tmp_path, start):
    "Start the agent of machine 0 (which holds the rendezvous) or 1; both with the same command."
    (tmp_path / "program.py").write_text(PROGRAM)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def make(number, env=(), **options):
        words = flags(**{**TINY, **OPTIONS, "batch_size": 3, "data_dir": images, "save_dir": tmp_path, **options})
        path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
        return start(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                     "--max-restarts=3", "--rdzv_backend=c10d", "--rdzv_id=job", f"--rdzv_endpoint=127.0.0.1:{port}",
                     f"--rdzv_conf=is_host={int(number == 0)},{RENDEZVOUS}", tmp_path / "program.py", *words,
                     env={"PYTHONPATH": path, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **dict(env)})
    return make


def kinds(folder): return [json.loads(line)["kind"] for line in (folder / "events.jsonl").read_text().splitlines()]


def test_two_machines(machines, tmp_path, wanted):
    agents = [machines(0), machines(1)]
    for agent in agents: assert agent.finish(90).code == 0, agent.err
    assert results(tmp_path / "run") == wanted[2]
    for agent in agents: agent.wait_until_gone()


def test_a_machine_dies_and_comes_back(machines, tmp_path, wanted):
    stays, dies = machines(0), machines(1, env={"LLB_TEST_DIES": "1"})
    assert dies.finish(90).code == -signal.SIGKILL
    dies.wait_until_gone()
    assert stays.process.poll() is None, "the other machine waits for it"
    again = machines(1)
    for agent in stays, again: assert agent.finish(90).code == 0, agent.err
    found = kinds(tmp_path / "run")
    assert found.count("start") == 1 and found.count("resume") == 1 and found[-1] == "end"
    assert results(tmp_path / "run") == wanted[2]
    for agent in stays, again: agent.wait_until_gone()


def test_stopping_one_machine_stops_both(machines, tmp_path):
    agents = [machines(0, epochs=400), machines(1, epochs=400)]
    wait_for_step(tmp_path / "run", 8, agents[0])
    (child,) = psutil.Process(agents[1].process.pid).children()
    child.terminate()   # as SLURM does with --signal: to the processes, not to the agent
    for agent in agents: assert agent.finish(60).code == 0, agent.err
    end = read_events(tmp_path / "run")[-1]
    assert (end["kind"], end["reason"], end["by"]) == ("end", "stopped", "SIGTERM")
    assert (tmp_path / f"run/checkpoints/step-{end['step']:08d}").is_dir()
    for agent in agents: agent.wait_until_gone()
