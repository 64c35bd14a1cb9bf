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
from llb.runs.processes import attach, start
from llb.apps.monitor import RunMonitor
config = Config.of(backbone="test_vit.r160_in1k", random_backbone=True, image_size=64, num_objects=8, num_layers=2, target_layer=2, epochs={epochs}, batch_size=64,
                augment="none", cache=True, workers=0, log_every=1, device="cpu", save_dir="runs", name="{name}")
"""


def test_saved_images_show_without_a_kernel(lab):
    shutil.copy(ROOT / "nbs/guides/quickstart.ipynb", lab.folder)
    lab.open("quickstart.ipynb")
    images = lab.panel.locator(".jp-OutputArea img")
    until(lambda: images.count() >= 2, "the stored images")
    for i in range(images.count()): assert images.nth(i).evaluate("x => x.naturalWidth") > 100
    lab.page.locator(".jp-OutputArea img").nth(1).scroll_into_view_if_needed()
    lab.shot("images")


def test_start_stop_and_resume_by_button(lab):
    write_notebook(lab.folder / "a.ipynb", TINY.format(epochs=3000, name="pressed") + "RunMonitor(config=config, nproc=2)")
    lab.open("a.ipynb")
    lab.run_all()
    start = lab.panel.get_by_role("button", name="Start", exact=True)
    start.wait_for(timeout=90_000)
    start.focus()
    lab.page.keyboard.press("Enter")
    until(lambda: "running; epoch" in lab.status(), "the run to be at work")
    before = lab.status()
    until(lambda: lab.status() != before, "progress to move")
    until(lambda: lab.panel.locator("img[alt^='Assignment maps']").count() == 1, "the assignment maps")
    lab.panel.get_by_text("log of rank 0", exact=True).click()
    until(lambda: "loss" in lab.panel.get_by_role("log", name="log of rank 0").inner_text(), "the log of rank 0")
    lab.shot("running")
    folder = lab.folder / "runs/pressed"
    assert {p.rank for p in attach(folder).processes()} == {None, 0, 1}
    lab.page.set_viewport_size({"width": 640, "height": 500})   # what a zoom of 200 % leaves
    button = lab.panel.get_by_role("button", name="Stop", exact=True)
    button.scroll_into_view_if_needed()
    box = button.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 640 and box["y"] + box["height"] <= 500, box
    lab.shot("at-200-percent")
    lab.page.set_viewport_size(VIEW)
    lab.press("Stop")
    until(lambda: "stopped: as asked" in lab.status(), "the run to be stopped")
    lab.shot("stopped")
    assert load_newest(folder / "checkpoints")["step"] == attach(folder).progress().step
    assert not attach(folder).processes()
    lab.panel.get_by_text("log of all ranks", exact=True).click()   # read when it is opened, though nothing happens any more
    until(lambda: "Stopped after step" in lab.panel.get_by_role("log", name="log of all ranks").inner_text(), "the log of a run that has ended")
    lab.press("Resume")
    until(lambda: "running; epoch" in lab.status(), "the run to be at work again")
    lab.press("Stop")
    until(lambda: "stopped: as asked" in lab.status(), "the run to be stopped again")


@pytest.mark.parametrize("end", ["restart", "kill"])
def test_attach_after_the_kernel_has_ended(lab, end):
    write_notebook(lab.folder / "a.ipynb", TINY.format(epochs=3000, name="kept") + "run = start(config, nproc=2)\nprint('started', run.folder.name)\nRunMonitor(run)")
    write_notebook(lab.folder / "b.ipynb", "from llb.apps.monitor import RunMonitor\nRunMonitor('runs/kept')")
    lab.open("a.ipynb")
    lab.run_all()
    lab.see("started kept")
    run = attach(lab.folder / "runs/kept")
    until(lambda: run.progress() and run.progress().step > 2, "the run to be at work")
    (kernel,) = lab.kernels()
    if end == "kill": os.kill(kernel, signal.SIGKILL)
    else:
        lab.command("kernelmenu:restart")
        lab.page.get_by_role("button", name="Confirm Kernel Restart").click()
    until(lambda: kernel not in lab.kernels(), "the kernel to be another")
    step = run.progress().step
    lab.open("b.ipynb")
    lab.run_all()
    until(lambda: lab.panel.get_by_role("status").count() and "running; epoch" in lab.status(), "the attached monitor to show the run")
    assert run.progress().step > step
    lab.shot("attached")
    lab.press("Stop")
    until(lambda: "stopped: as asked" in lab.status(), "the run to be stopped")
    assert not run.processes()


def test_interrupting_the_kernel_leaves_the_run_alone(lab):
    write_notebook(lab.folder / "a.ipynb", TINY.format(epochs=3000, name="kept") + "run = start(config, nproc=2)\nprint('started', run.folder.name)\nRunMonitor(run)",
                   "import time\nprint('busy' + 'now')\ntime.sleep(600)")
    lab.open("a.ipynb")
    lab.run_all()
    lab.see("busynow")
    run = attach(lab.folder / "runs/kept")
    until(lambda: run.progress() and run.progress().step > 2, "the run to be at work")
    lab.command("notebook:interrupt-kernel")
    lab.see("KeyboardInterrupt")
    step = run.progress().step
    until(lambda: run.progress().step > step + 2, "the run to go on")
    before = lab.status()
    until(lambda: lab.status() != before, "the monitor to move")
    assert run.state.name == "running" and len(run.processes()) >= 3
    lab.press("Stop")
    until(lambda: "stopped: as asked" in lab.status(), "the run to be stopped")


@pytest.mark.parametrize("lab", ["full"], indirect=True)
def test_the_monitor_survives_full_windowing(lab):
    """JupyterLab takes cells that are out of sight out of the page, and puts them back."""
    fillers = ["print('line\\n' * 40)"] * 30
    write_notebook(lab.folder / "a.ipynb", TINY.format(epochs=3000, name="kept") + "RunMonitor(start(config, nproc=2))", *fillers, "print('last' + 'cell')")
    lab.open("a.ipynb")
    lab.run_all()
    until(lambda: lab.panel.get_by_role("status").count() and "running; epoch" in lab.status(), "the run to be at work")
    scroller = lab.panel.locator(".jp-WindowedPanel-outer")
    scroller.evaluate("x => x.scrollTo(0, x.scrollHeight)")
    until(lambda: lab.panel.get_by_role("button", name="Stop", exact=True).count() == 0, "the monitor to leave the page")
    step = attach(lab.folder / "runs/kept").progress().step
    until(lambda: attach(lab.folder / "runs/kept").progress().step > step + 5, "the run to go on meanwhile")
    scroller.evaluate("x => x.scrollTo(0, 0)")
    until(lambda: lab.panel.get_by_role("status").count() and "running; epoch" in lab.status(), "the monitor to be back")
    before = lab.status()
    until(lambda: lab.status() != before, "progress to move")
    until(lambda: lab.panel.locator("img[alt^='Assignment maps']").count() == 1, "the assignment maps to be back")
    lab.shot("back")
    lab.press("Stop")
    until(lambda: "stopped: as asked" in lab.status(), "the run to be stopped")


def test_two_notebooks_train_at_once(lab):
    for name in "one", "two":
        write_notebook(lab.folder / f"{name}.ipynb", TINY.format(epochs=3000, name=name) + f"run = start(config, nproc=1)\nprint('started', {name!r}, 1 + 1)")
        lab.open(f"{name}.ipynb")
        lab.run_all()
        lab.see(f"started {name} 2")
    found = [attach(lab.folder / "runs" / name) for name in ("one", "two")]
    until(lambda: all(run.progress() and run.progress().step > 2 for run in found), "both runs to be at work")
    assert found[0].stop().name == "stopped" and found[1].state.name == "running"
    assert found[1].stop().name == "stopped"


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
    assert lab.panel.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    lab.command("docmanager:save")
    until(lambda: "#SBATCH --nodes=2" in guide.read_text(), "the notebook to be saved")
    for pid in lab.kernels(): os.kill(pid, signal.SIGKILL)
    saved = lab.folder / f"saved-{uuid.uuid4().hex[:6]}.ipynb"   # under another name no kernel knows it
    shutil.copy(guide, saved)
    lab.open(saved.name)
    until(lambda: lab.panel.locator("img[alt^='Assignment maps']").count() >= 1, "the images of the saved notebook")
    lab.panel.locator("img[alt^='Assignment maps']").last.scroll_into_view_if_needed()
    lab.shot("saved")
