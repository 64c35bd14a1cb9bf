"""Two machines, played by two torchrun agents that meet at a c10d rendezvous on loopback; one of them dies and comes back."""
import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from conftest import OPTIONS, TINY, flags, results, wait_for_step

pytestmark = pytest.mark.slow
PROGRAM = "import sys\nfrom llb import train\nfrom test_many_machines import die_once\ndie_once()\ntrain.main(sys.argv[1:])\n"


def die_once():
    "In the training process: on the machine that is to die, agent and process go at once, in step 9."
    if "LLB_TEST_DIES" not in os.environ: return
    from llb.training.step import TrainStep
    call = TrainStep.__call__
    def step(self, batch, n, epoch):
        if n == 9:
            for pid in os.getppid(), os.getpid(): os.kill(pid, signal.SIGKILL)
        return call(self, batch, n, epoch)
    TrainStep.__call__ = step


@pytest.fixture
def machines(images, tmp_path, start):
    "Start the agent of machine 0 (which holds the rendezvous) or 1; both with the same command."
    (tmp_path / "program.py").write_text(PROGRAM)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    def make(number, env=(), **options):
        words = flags(**{**TINY, **OPTIONS, "batch_size": 3, "data_dir": images, "save_dir": tmp_path, **options})
        return start(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d",
                     "--rdzv_id=job", f"--rdzv_endpoint=127.0.0.1:{port}", f"--rdzv_conf=is_host={int(number == 0)},join_timeout=60,"
                     "keep_alive_interval=1,keep_alive_max_attempt=2", tmp_path / "program.py", *words,
                     env={"PYTHONPATH": os.path.dirname(__file__), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **dict(env)})
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
    children = Path(f"/proc/{agents[1].process.pid}/task/{agents[1].process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)   # as SLURM does with --signal: to the processes, not to the agent
    for agent in agents: assert agent.finish(60).code == 0, agent.err
    end = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()][-1]
    assert end["kind"] == "end" and end["reason"] == "stopped" and (tmp_path / f"run/checkpoints/step-{end['step']:08d}").is_dir()
    for agent in agents: agent.wait_until_gone()
