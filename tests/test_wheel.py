"""Installed from a wheel, in an empty folder, without the repository: the commands and the quickstart work."""
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_package import IMPORT_ALL, MODULES

from llb.models.weights import focus_file

ROOT = Path(__file__).parent.parent
SOURCES = ("llb", "data", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md",
           "Makefile", "settings.ini")
TINY = "--image_size 56 --num_objects 16 --num_layers 2 --epochs 1 --workers 0 --device cpu".split()

pytestmark = pytest.mark.slow


def run(*words, **kwargs):
    "Run a program; it must not fail."
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=400, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a source distribution, which is built from a copy, for building leaves files behind; no network."
    copy = tmp_path_factory.mktemp("copy")
    unbuilt = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir(): shutil.copytree(ROOT / name, copy / name, ignore=unbuilt)
        else: shutil.copy(ROOT / name, copy / name)
    run("-c", "import setuptools.build_meta as build; build.build_sdist('dist')", cwd=copy)
    source, = copy.glob("dist/*.tar.gz")
    offline = "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"
    run("-m", "pip", "wheel", *offline, "--wheel-dir", copy / "dist", source)
    return next(copy.glob("dist/*.whl"))


@pytest.fixture(scope="module")
def place(wheel, tmp_path_factory):
    "An empty folder, and the environment in which the wheel, and nothing of the repository, is found."
    folder = tmp_path_factory.mktemp("place")
    site, cache, empty = (folder / name for name in ("site", "cache", "empty"))
    cache.mkdir()
    empty.mkdir()
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    if focus_file().exists(): (cache / focus_file().name).symlink_to(focus_file())   # 90 MB, fetched once
    env = {**os.environ, "PYTHONPATH": str(site), "LLB_CACHE": str(cache), "MPLBACKEND": "agg"}
    return site, dict(cwd=empty, env=env)


def test_what_the_wheel_holds(wheel):
    content = zipfile.ZipFile(wheel)
    names = set(content.namelist())
    assert {f"llb/{m.replace('.', '/')}.py" for m in [*MODULES, "__init__"]} <= names
    data = {p.relative_to(ROOT).as_posix() for p in (ROOT / "llb").rglob("*.*") if p.suffix not in (".py", ".pyc")}
    assert len(data) > 10 and data <= names and "llb/py.typed" in names
    images = {p.relative_to(ROOT).as_posix() for p in (ROOT / "data/openclipart").rglob("*.*")}
    assert len(images) > 2046 and {f"llb/{name}" for name in images} <= names
    assert all(n.startswith(("llb/", "llb_workbench-")) for n in names)


def test_what_an_index_shows(wheel):
    content = zipfile.ZipFile(wheel)
    metadata = next(name for name in content.namelist() if name.endswith("METADATA"))
    header, _, text = content.read(metadata).decode().partition("\n\n")
    required = [line for line in header.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    tools = "nbdev", "fastcore", "jupyterlab", "pytest", "playwright"
    assert not any(tool in line for line in required for tool in tools)
    assert any(line.startswith("Requires-Dist: torch>=2.10") for line in required)
    for field in "Author", "License-Expression", "Keywords", "Classifier", "Project-URL", "Summary":
        assert f"\n{field}: " in header, field
    assert text.startswith("# LLB workbench") and "llb train" in text
    assert not re.search(r"\]\((?!http)", text), "an index has no files of the repository"


def test_every_module_comes_from_the_wheel(place):
    site, there = place
    assert run("-c", IMPORT_ALL, *MODULES, **there).strip() == str(site / "llb/__init__.py")
    assert run("-c", "from llb.data.datasets import BUNDLED; print(BUNDLED)", **there).startswith(str(site))
    light = "import sys, llb; print([name for name in ('torch', 'onnx', 'matplotlib') if name in sys.modules])"
    assert run("-c", light, **there).strip() == "[]"


def test_the_commands_work_in_an_empty_folder(place):
    site, there = place
    llb, images = site / "bin/llb", site / "llb/data/openclipart/val/animals"
    assert "is in the cache" in run(llb, "fetch", **there)
    run(llb, "train", "--recipe", "demo", *TINY, "--name", "demo", **there)
    metrics = json.loads((there["cwd"] / "runs/demo/metrics.json").read_text())
    assert metrics["seen"]["unique"] == metrics["seen"]["images"] > 200
    rows = list(csv.DictReader(io.StringIO(run(llb, "predict", "runs/demo", images, "--format", "csv", **there))))
    assert len(rows) > 20 and "animals" in {row["fused"] for row in rows}
    opened = run("-c", "from llb import Explorer; print(type(Explorer('runs/demo')).__name__)", **there)
    assert opened.split()[-1] == "Explorer"


@pytest.mark.long
def test_the_quickstart_works_in_an_empty_folder(place):
    cells = json.loads((ROOT / "nbs/guides/quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    for name, smaller in {"image_size=112": "image_size=56", "epochs=6": "epochs=1"}.items():
        assert name in code
        code = code.replace(name, smaller)
    assert "validation top-1" in run("-c", code, **place[1])
