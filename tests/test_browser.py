"""The notebooks where people use them: JupyterLab in a real browser, with real kernels and real training processes."""
import os
import shutil
import signal
import uuid

import pytest
from browser import ROOT, until, VIEW, write_notebook

from llb.runs.checkpoints import load_newest
from llb.runs.processes import attach

pytestmark = [pytest.mark.slow, pytest.mark.browser]
TINY = """
from llb.runs.config import Config
from llb.runs.processes import start
from llb.apps.monitor import RunMonitor
config = Config.of(backbone="test_vit.r160_in1k", random_backbone=True, image_size=64, num_objects=8, num_layers=2,
                   target_layer=2, epochs=3000, batch_size=64, augment="none", cache=True, workers=0, log_every=1,
                   device="cpu", save_dir="runs", name="kept")
run = start(config, nproc=2)
RunMonitor(run)
"""


def start_in_notebook(lab, *cells):
    "Run a notebook that starts a run and shows its monitor, wait until it takes steps; the run."
    write_notebook(lab.folder / "a.ipynb", TINY, *cells)
    lab.open("a.ipynb")
    lab.run_all()
    folder = lab.folder / "runs/kept"   # the page may have been scrolled away from what the cell has printed
    until(lambda: (folder / "launch/001/proc.json").exists(), "the run to be started")
    run = attach(folder)
    until(lambda: run.progress() and run.progress().step > 2, "the run to be at work")
    return run


def wait_until_running(lab):
    until(lambda: lab.panel.get_by_role("status").count() and "running; epoch" in lab.status(), "the run to be at work")


def wait_until_it_moves(lab):
    before = lab.status()
    until(lambda: lab.status() != before, "progress to move")


def stop_by_button(lab):
    lab.press("Stop")
    until(lambda: "stopped: as asked" in lab.status(), "the run to be stopped")


def maps_in(lab): return lab.panel.locator("img[alt^='Assignment maps']")


def see_in_log(lab, name, words):
    "Open a log, and wait for words in it."
    lab.panel.get_by_text(name, exact=True).click()
    until(lambda: words in lab.panel.get_by_role("log", name=name).inner_text(), f"{words!r} in the {name}")


def is_whole_in_a_small_window(lab, name):
    "Whether a button can be seen in what a zoom of 200 % leaves."
    lab.page.set_viewport_size({"width": 640, "height": 500})
    button = lab.panel.get_by_role("button", name=name, exact=True)
    button.scroll_into_view_if_needed()
    box = button.bounding_box()
    lab.shot("at-200-percent")
    lab.page.set_viewport_size(VIEW)
    return box["x"] >= 0 and box["x"] + box["width"] <= 640 and box["y"] + box["height"] <= 500


def test_saved_images_show_without_a_kernel(lab):
    shutil.copy(ROOT / "nbs/guides/quickstart.ipynb", lab.folder)
    lab.open("quickstart.ipynb")
    images = lab.panel.locator(".jp-OutputArea img")
    until(lambda: images.count() >= 2, "the stored images")
    for i in range(images.count()): assert images.nth(i).evaluate("x => x.naturalWidth") > 100
    lab.page.locator(".jp-OutputArea img").nth(1).scroll_into_view_if_needed()
    lab.shot("images")


def test_watch_stop_and_resume_by_button(lab):
    run = start_in_notebook(lab)
    wait_until_running(lab)
    wait_until_it_moves(lab)
    until(lambda: maps_in(lab).count() == 1, "the assignment maps")
    see_in_log(lab, "log of rank 0", "loss")
    lab.shot("running")
    assert {p.rank for p in run.processes()} == {None, 0, 1} and is_whole_in_a_small_window(lab, "Stop")
    stop_by_button(lab)
    lab.shot("stopped")
    assert load_newest(run.folder / "checkpoints")["step"] == run.progress().step and not run.processes()
    see_in_log(lab, "log of all ranks", "Stopped after step")   # read when it is opened, though the run has ended
    resume = lab.panel.get_by_role("button", name="Resume", exact=True)
    resume.focus()
    lab.page.keyboard.press("Enter")
    wait_until_running(lab)
    stop_by_button(lab)


def test_a_run_survives_what_happens_to_its_notebook(lab):
    "A cell is interrupted, then the kernel restarted; another notebook attaches to the run."
    run = start_in_notebook(lab, "import time\nprint('busy' + 'now')\ntime.sleep(600)")
    lab.see("busynow")
    lab.command("notebook:interrupt-kernel")
    lab.see("KeyboardInterrupt")
    step = run.progress().step
    until(lambda: run.progress().step > step + 2, "the run to go on")
    wait_until_it_moves(lab)
    assert run.state.name == "running" and len(run.processes()) >= 3
    (kernel,) = lab.kernels()
    lab.command("kernelmenu:restart")
    lab.page.get_by_role("button", name="Confirm Kernel Restart").click()
    until(lambda: kernel not in lab.kernels(), "the kernel to be another")
    step = run.progress().step
    write_notebook(lab.folder / "b.ipynb", "from llb.apps.monitor import RunMonitor\nRunMonitor('runs/kept')")
    lab.open("b.ipynb")
    lab.run_all()
    wait_until_running(lab)
    assert run.progress().step > step
    lab.shot("attached")
    stop_by_button(lab)
    assert not run.processes()


@pytest.mark.parametrize("lab", ["full"], indirect=True)
def test_the_monitor_survives_full_windowing(lab):
    "JupyterLab takes cells that are out of sight out of the page, and puts them back."
    run = start_in_notebook(lab, *["print('line\\n' * 40)"] * 30, "print('last' + 'cell')")
    scroller = lab.panel.locator(".jp-WindowedPanel-outer")
    scroller.evaluate("x => x.scrollTo(0, 0)")   # running all cells may have gone to the last
    wait_until_running(lab)
    scroller.evaluate("x => x.scrollTo(0, x.scrollHeight)")
    stop = lab.panel.get_by_role("button", name="Stop", exact=True)
    until(lambda: stop.count() == 0, "the monitor to leave the page")
    step = run.progress().step
    until(lambda: run.progress().step > step + 5, "the run to go on meanwhile")
    scroller.evaluate("x => x.scrollTo(0, 0)")
    wait_until_running(lab)
    wait_until_it_moves(lab)
    until(lambda: maps_in(lab).count() == 1, "the assignment maps to be back")
    lab.shot("back")
    stop_by_button(lab)


def test_guide_runs_from_top_to_end_and_keeps_its_images(lab):
    (lab.folder / "nbs/guides").mkdir(parents=True)
    guide = lab.folder / "nbs/guides/train_on_many_gpus.ipynb"
    shutil.copy(ROOT / "nbs/guides" / guide.name, guide)
    lab.open("nbs/guides/" + guide.name)
    lab.run_all()
    lab.see("epoch 1.", 240)
    lab.shot("first-epoch")
    lab.see("#SBATCH --nodes=2", 300)
    assert attach(lab.folder / "runs/guide").state.name == "done"
    stderr = lab.panel.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']")
    assert stderr.count() == 0
    lab.command("docmanager:save")
    until(lambda: "#SBATCH --nodes=2" in guide.read_text(), "the notebook to be saved")
    for pid in lab.kernels(): os.kill(pid, signal.SIGKILL)
    saved = lab.folder / f"saved-{uuid.uuid4().hex[:6]}.ipynb"   # under another name no kernel knows it
    shutil.copy(guide, saved)
    lab.open(saved.name)
    until(lambda: maps_in(lab).count() >= 1, "the images of the saved notebook")
    maps_in(lab).last.scroll_into_view_if_needed()
    lab.shot("saved")
