"""What the browser tests share: JupyterLab on a folder of its own, and a page of it in Chromium (fixture `lab`).

Screenshots are kept in runs/browser/, to be seen by people.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHOTS = ROOT / "runs" / "browser"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
VIEW = {"width": 1280, "height": 1000}
NEWS = {"fetchNews": "false", "checkForUpdates": False}


def write_notebook(path, *cells, outputs=()):
    "A notebook of code cells, with the kernel's name: without it JupyterLab asks."
    cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": list(outputs),
              "source": text} for i, text in enumerate(cells)]
    meta = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": cells, "metadata": meta, "nbformat": 4, "nbformat_minor": 5}))


def until(condition, what, seconds=90):
    "Wait until a condition holds; what it returned."
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
        time.sleep(.2)
    return found


class Lab:
    "A JupyterLab on a folder of its own, and a page in a browser."
    def __init__(self, folder, page, url, server, name):
        self.folder, self.page, self.url, self.server, self.name = folder, page, url, server, name
        self.problems = []
        page.on("pageerror", lambda e: self.problems.append(str(e)))
        page.on("console", lambda m: self.problems.append(m.text) if m.type == "error" else None)

    def open(self, notebook):
        self.page.goto(f"{self.url}/lab/tree/{notebook}?token=llb&reset")
        self.page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell", timeout=60_000)
        self.panel = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")

    def command(self, name):
        self.page.evaluate("name => { window.jupyterapp.commands.execute(name) }", name)

    def wait_for_kernel(self):
        idle = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        self.page.wait_for_function(idle, timeout=60_000)

    def run_all(self):
        self.wait_for_kernel()
        self.command("notebook:run-all-cells")

    def text(self): return self.panel.inner_text()

    def see(self, words, seconds=90):
        until(lambda: words in self.text(), f"{words!r} in the notebook, which says\n{self.text()[-3000:]}", seconds)

    def status(self):
        "What a screen reader would announce."
        return self.panel.get_by_role("status").last.inner_text()

    def press(self, name): self.panel.get_by_role("button", name=name, exact=True).click()

    def shot(self, name): self.page.screenshot(path=SHOTS / f"{self.name}-{name}.png")

    def kernels(self):
        "The kernels' process ids."
        listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout
        table = [line.split(None, 2) for line in listed.splitlines()]
        return [int(pid) for pid, parent, words in table if int(parent) == self.server.pid and "ipykernel" in words]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    if BROWSER is None: pytest.skip("the browser tests need a Chromium or Chrome on the PATH")
    with playwright.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(str(tmp_path_factory.mktemp("profile")), executable_path=BROWSER,
                                                       args=FLAGS, viewport=VIEW, device_scale_factor=1)
        yield context
        context.close()


def start_server(folder, work, windowing):
    "JupyterLab on `work` with settings of its own in `folder`; the process and its address."
    settings = {"notebook-extension/tracker": {"windowingMode": windowing}, "apputils-extension/notification": NEWS}
    for name, values in settings.items():
        path = folder / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folders = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "spaces",
               "JUPYTER_CONFIG_DIR": "config", "IPYTHONDIR": "ipython", "JUPYTER_RUNTIME_DIR": "runtime"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
               "--IdentityProvider.token=llb", "--expose-app-in-browser", "--allow-root",
               f"--ServerApp.root_dir={work}", "--ServerApp.port_retries=0"]
    with open(folder / "lab.log", "wb") as log:
        server = subprocess.Popen(command, env={**os.environ, **{k: str(folder / v) for k, v in folders.items()}},
                                  stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    return server, f"http://127.0.0.1:{port}"


@pytest.fixture
def lab(chromium, tmp_path, request):
    """Yields a Lab; afterwards nothing it started is left. As parameter it takes JupyterLab's windowing mode; without
    one, cells out of sight stay in the page, to be read."""
    from llb.runs.processes import runs
    SHOTS.mkdir(parents=True, exist_ok=True)
    (work := tmp_path / "work").mkdir()
    server, url = start_server(tmp_path, work, getattr(request, "param", "none"))

    def answers():
        assert server.poll() is None, (tmp_path / "lab.log").read_text()
        try: return urllib.request.urlopen(f"{url}/api?token=llb", timeout=5).status == 200
        except OSError: return False
    page = chromium.new_page()
    it = Lab(work, page, url, server, request.node.name.removeprefix("test_"))
    try:
        until(answers, "JupyterLab to answer")
        yield it
        it.shot("end")
        assert not (ours := [p for p in it.problems if "llb" in p or "widget" in p.lower()]), ours
    finally:
        page.close()
        left = it.kernels()
        server.send_signal(signal.SIGTERM)
        try: server.wait(30)
        except subprocess.TimeoutExpired: server.kill()   # it waits for a kernel that it interrupted at its start
        for run in runs(work / "runs"): run.stop(grace=0)
        for pid in left:
            if Path(f"/proc/{pid}").exists(): os.kill(pid, signal.SIGKILL)
    assert not [p for run in runs(work / "runs") for p in run.processes()]
