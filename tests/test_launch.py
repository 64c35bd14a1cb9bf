"""Runs started from Python: their processes outlive what notebooks do, and nothing outlives them."""
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from running import flags

from llb.core.errors import InputError
from llb.core.files import write_json
from llb.runs.config import Config
from llb.runs.folder import EventLog
from llb.runs.launch import main
from llb.runs.launchers import MARK, Slurm
from llb.runs.processes import attach, Run, runs, STAGES, start

pytestmark = pytest.mark.slow
TINY = dict(backbone="test_vit.r160_in1k", random_backbone=True, image_size=32, num_objects=8, num_layers=2,
            target_layer=2, epochs=2000, batch_size=64, augment="none", cache=True, workers=0, log_every=1,
            device="cpu")


def until(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
        time.sleep(.1)


def gone(pid):
    "Whether a process has ended, collected or not."
    try: return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return True


def at_work(run, step=2):
    until(lambda: not run.state.live or (run.progress() and run.progress().step >= step), f"{run} to take {step} steps")
    assert run.state.name == "running", f"{run.state}\n{run.log()}"
    return run


def words_of(process):
    try: return " ".join(process.cmdline())
    except psutil.Error: return ""   # it has ended, or only its parent has not asked


def no_process_of(run):
    "By the mark, and by the words of their command lines."
    until(lambda: not run.processes(), f"the processes of {run} to end", 15)
    assert not [p for p in psutil.process_iter() if str(run.folder) in words_of(p)]


@pytest.fixture
def config(tmp_path):
    """A configuration; whatever was started under its save_dir is killed afterwards."""
    yield Config.of(**TINY, save_dir=str(tmp_path / "runs"), name="one")
    for run in runs(tmp_path / "runs"):
        if run.visible and run.launch_info["launcher"] == "torchrun": run.stop(grace=0)


PROGRAM = """
from llb.runs.config import Config
from llb.runs.folder import EventLog
from llb.runs.processes import start
run = start(Config.from_file({file!r}), nproc=2)
while True:
    try: run.wait()
    except KeyboardInterrupt: print('interrupted', flush=True)
"""


@pytest.fixture
def kernel(config, tmp_path):
    "A Python program that has launched a run and waits for it, as a notebook's kernel would."
    file = tmp_path / "start.json"
    write_json(file, {"config": config.to_dict()})
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(file=str(file))], start_new_session=True)
    until(lambda: (config.run_folder / "launch/001/proc.json").exists(), "the program to start the run")
    yield process
    if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_two_runs_at_once_stop_and_resume(config):
    first, second = start(config, nproc=2), start(config.but(name="two"), nproc=1)
    at_work(first), at_work(second)
    assert {p.rank for p in first.processes()} == {None, 0, 1} and {p.rank for p in second.processes()} == {None, 0}
    assert not {p.pid for p in first.processes()} & {p.pid for p in second.processes()}
    assert first.stop().name == "stopped"
    no_process_of(first)
    assert second.state.name == "running", "stopping one run must not touch the other"
    assert second.stop().name == "stopped"
    no_process_of(second)
    epochs = int(first.progress().epoch) + 1
    again = start(config.but(resume=True, epochs=epochs), nproc=2)
    assert again.launch.name == "002" and again.state.live
    assert again.wait(120).name == "done"
    assert again.metrics["fused"]["top1"] >= 0 and again.progress().step == again.progress().steps
    no_process_of(again)


def test_a_run_survives_what_happens_to_its_kernel(config, kernel):
    "An interrupt, as the stop square of a notebook sends, and the end of the kernel; then it is attached to."
    run = at_work(attach(config.run_folder))
    os.killpg(kernel.pid, signal.SIGINT)
    step = run.progress().step
    until(lambda: run.progress().step > step + 2, "training to go on after an interrupt")
    assert run.state.name == "running" and kernel.poll() is None
    os.killpg(kernel.pid, signal.SIGKILL)
    kernel.wait()
    step, found = run.progress().step, attach(config.run_folder)
    until(lambda: found.progress().step > step + 2, "training to go on without the kernel")
    assert {p.rank for p in found.processes()} == {None, 0, 1}
    with pytest.raises(InputError, match="attach"): start(config.but(overwrite=True))
    assert found.stop().name == "stopped"
    no_process_of(found)


def test_no_worker_outlives_its_agent(config):
    run = at_work(start(config.but(workers=1, cache=False), nproc=1))
    pids = [p.pid for p in run.processes()]
    assert len(pids) >= 3, "the agent, the worker, and its loader"
    os.kill(run.launch_info["agent"], signal.SIGKILL)
    until(lambda: all(map(gone, pids)), "workers to end with their agent", 20)
    assert run.wait(10).name == "failed" and not run.stop().live
    no_process_of(run)


def test_stop_escalates(config):
    "A worker that neither looks at the stop file nor obeys SIGTERM is killed, and the run counts as stopped."
    run = at_work(start(config, nproc=2))
    workers = {p.rank: p.pid for p in run.processes() if p.rank is not None}
    os.kill(workers[1], signal.SIGSTOP)
    seen = []
    run.stop(grace=1, wait=False)
    assert run.state.name == "stopping", "without waiting it comes back at once"
    while run.alive:
        seen.append(run.state.reason)
        time.sleep(.1)
    assert run.state.name == "stopped" and "before it could save" in run.state.reason
    assert [stage for stage in STAGES if stage in seen][:2] == list(STAGES[:2])
    until(lambda: not (run.folder / "stop").exists(), "the stop file to be taken away", 5)
    no_process_of(run)


def test_stop_before_the_first_step(config):
    "Asked while the processes are still coming up: the run opens, stops at its first step, and can be resumed."
    run = start(config, nproc=1)
    run.stop()
    assert run.state.name == "stopped" and run.resumable and "error" not in run.log(), f"{run.state}\n{run.log()}"
    no_process_of(run)
    again = start(config.but(resume=True), nproc=1)
    until(lambda: again.state.name != "starting", "the run to open again")
    assert again.state.name == "running", f"{again.state}\n{again.log()}"
    assert again.stop().name == "stopped"


def test_a_run_killed_before_it_began_cannot_be_resumed_but_started(config):
    run = start(config, nproc=1)
    run.stop(grace=0)
    assert run.state.name == "stopped" and not run.resumable and "start it again" in run.state.reason
    at_work(start(config, nproc=1)).stop()


def test_killed_worker_fails_the_run_with_the_signal(config):
    run = at_work(start(config, nproc=2))
    os.kill(next(p.pid for p in run.processes() if p.rank == 1), signal.SIGKILL)
    state = run.wait(60)
    assert state.name == "failed" and "SIGKILL" in state.reason, f"{state}\n{run.log()}"
    no_process_of(run)


RAISES = """
import sys
if 'llb.train' in sys.orig_argv:
    from llb.training.trainer import Trainer
    Trainer.train_epoch = lambda self: 1 / 0
"""


def test_bad_input_and_exceptions_say_why(config, tmp_path, monkeypatch):
    bad = config.but(name="sentence", dataset="ImageFolder", data_dir=str(tmp_path / "nowhere"))
    run = start(bad, nproc=2)
    assert run.wait(60).name == "failed" and "nowhere" in run.state.reason
    (tmp_path / "sitecustomize.py").write_text(RAISES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    raised = start(config.but(name="raised"), nproc=2)
    assert raised.wait(60).name == "failed" and "ZeroDivisionError" in raised.state.reason, raised.log()
    assert raised.error().startswith("Traceback") and "train_epoch" in raised.error()
    no_process_of(raised)


def launch_info(config, **changes):
    "A run folder with the launch info of a start."
    launch = config.run_folder / "launch/001"
    launch.mkdir(parents=True)
    info = {"launcher": "torchrun", "mark": "old", "nproc": 1, "agent": 1, "host": os.uname().nodename, "began": 0}
    write_json(launch / "proc.json", {**info, **changes})
    return attach(config.run_folder)


def test_a_process_with_a_reused_id_is_not_ours(config):
    other = subprocess.Popen(["sleep", "60"])
    try:
        run = launch_info(config, agent=other.pid)
        assert run.state.name == "failed" and not run.stop().live and other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_run_of_another_machine_is_read_from_its_folder(config):
    run, log = launch_info(config, host="elsewhere"), EventLog(config.run_folder)
    log.write("start", 0, per_epoch=10, epochs=2)
    assert run.state.name == "running" and "elsewhere" in run.state.reason
    assert run.stop(grace=.5).live and (config.run_folder / "stop").exists(), "only the stop file can be sent there"
    log.write("end", 7, reason="stopped", by="stop file")
    assert run.state.name == "stopped" and "step 7" in run.state.reason


def test_a_crash_is_not_taken_for_a_stop(config):
    "A run that was asked to stop, and has raised before it did, has failed."
    run = launch_info(config)
    write_json(run.launch / "stop.json", {"stage": STAGES[0]})
    assert run.state.name == "stopped"
    (run.launch / "agent.log").write_text("[rank 0] Traceback ...\nRuntimeError: DataLoader worker is killed\n")
    assert run.state.name == "failed" and "DataLoader" in run.state.reason


FOREIGN = dict(RANK="3", WORLD_SIZE="4", MASTER_PORT="1", PET_NPROC_PER_NODE="5", TORCHELASTIC_RUN_ID="x",
               MPLBACKEND="module://nowhere")   # what another launcher, and a notebook, leave in the environment


def check_command(words, status, pattern, capsys):
    with pytest.raises(SystemExit) as left: main(words)
    assert left.value.code == status and re.search(pattern, capsys.readouterr().out)


def test_command_starts_lists_and_stops(config, capsys, monkeypatch):
    for name, value in FOREIGN.items(): monkeypatch.setenv(name, value)
    words = flags(**TINY, save_dir=config.run.save_dir, name="one")
    check_command(["start", "--nproc", "1", "--", *words], 0, "Started", capsys)
    check_command(["runs", config.run.save_dir], 0, "one +(starting|running)", capsys)
    run = at_work(attach(config.run_folder))
    assert {p.rank for p in run.processes()} == {None, 0}, "the environment of another launcher is not obeyed"
    check_command(["stop", str(run.folder)], 0, "stopped", capsys)
    check_command(["status", str(run.folder)], 75, "stopped", capsys)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    "Programs with SLURM's names: the job runs here, at once, and what is asked of the queue is written down."
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "sbatch": f'cd {tmp_path}; env SLURM_JOB_ID=4711 SLURM_JOB_NODELIST=localhost setsid bash "$2" > job.log 2>&1 &'
                  'echo $! > job.pid; echo 4711',
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {tmp_path}/asked; fi',
        "squeue": f'kill -0 $(cat {tmp_path}/job.pid) 2>/dev/null && echo RUNNING',
        "scancel": f'echo "$@" >> {tmp_path}/asked; pkill -s $(cat {tmp_path}/job.pid)',
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def test_slurm_job_saves_before_its_limit_and_asks_for_another_turn(config, cluster):
    run = start(config, launcher=Slurm(gpus=2))
    assert run.launch_info["job"] == "4711"
    at_work(run)
    os.kill(int((cluster / "job.pid").read_text()), signal.SIGUSR1)   # the time limit is near
    until(lambda: not run.state.live, "the job to end")
    assert run.state.name == "stopped", (cluster / "job.log").read_text()
    assert (cluster / "asked").read_text() == "requeue 4711\n"
    assert (run.folder / "checkpoints").is_dir()
    (cluster / "asked").unlink()
    again = start(config.but(resume=True), launcher=Slurm(gpus=2))
    at_work(again, run.progress().step + 2)
    assert again.stop().name == "stopped"
    assert not (cluster / "asked").exists(), "what a person stops is not queued again"


def test_slurm_is_named_where_it_is_missing(config):
    with pytest.raises(InputError, match="job.sbatch"): start(config, launcher=Slurm())
    assert not Run(config.run_folder).launch_info and MARK not in os.environ
