"""The package as others meet it: imports, layers, the command."""
import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llb

ROOT = Path(__file__).parent.parent
FILES = [p.relative_to(ROOT / "llb") for p in (ROOT / "llb").rglob("*.py") if not p.stem.startswith("_")]
MODULES = sorted(".".join(p.with_suffix("").parts) for p in FILES)
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("[0-9][0-9]_*.ipynb"))


def python(code, **kwargs):
    "Run a program in a process of its own; it must not fail."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **kwargs)
    assert done.returncode == 0, done.stderr
    return done


def test_import_is_quiet_and_small():
    done = python("import sys, threading; import llb, json\n"
                  "heavy = {'torch', 'nbdev', 'fastcore', 'ipywidgets', 'IPython', 'matplotlib'} & set(sys.modules)\n"
                  "assert not heavy, heavy\nassert threading.active_count() == 1\nassert dir(llb) and llb.__version__")
    assert done.stdout == done.stderr == ""


IMPORT_ALL = """
import importlib, os, socket, subprocess, sys, threading
import matplotlib.font_manager, timm, torch, torchvision   # what these do at import is not ours
def refuse(*_, **__): raise AssertionError("an import must not do this")
socket.socket.connect = socket.getaddrinfo = subprocess.Popen = os.fork = os.system = refuse
for name in ("nbdev", "fastcore", "execnb"): sys.modules[name] = None   # importing it raises
for name in sys.argv[1:]:
    module = importlib.import_module("llb." + name)
    missing = [n for n in getattr(module, "__all__", []) if not hasattr(module, n)]
    assert not missing, (name, missing)
assert threading.active_count() == 1
print(importlib.import_module("llb").__file__)
"""


@pytest.mark.slow
def test_every_module_imports_alone():
    "In a process each; they are forked from one that has what all of them need."
    alone = """
import importlib, os, sys, tempfile
import timm, torch, torchvision, matplotlib.figure, ipywidgets, huggingface_hub, tyro
failed = []
for name in sys.argv[1:]:
    if not (child := os.fork()):
        try: module = importlib.import_module("llb." + name)
        except BaseException as e:
            print(name, repr(e), flush=True)
            os._exit(1)
        os._exit(all(hasattr(module, n) for n in getattr(module, "__all__", [])) - 1)
    if os.waitpid(child, 0)[1]: failed.append(name)
assert "llb" not in sys.modules
sys.exit(", ".join(failed) or 0)
"""
    done = subprocess.run([sys.executable, "-c", alone, *MODULES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_modules_import_without_the_tools_that_write_them():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *MODULES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1, done.stdout + done.stderr


def test_training_needs_no_notebook():
    python("import sys, llb.cli, llb.train\n"
           "found = {'ipywidgets', 'jupyter_client', 'matplotlib.pyplot'} & set(sys.modules)\nassert not found, found")


@pytest.mark.parametrize("name", llb.__all__)
def test_public_names_resolve(name): assert getattr(llb, name) is not None


def test_an_editor_sees_the_public_names():
    tree = ast.parse((ROOT / "llb/__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    assert {a.asname: n.module for n in block.body for a in n.names} == llb._HOME


def test_rooms_are_attributes():
    python("import llb; assert llb.plots.__name__ == 'llb.plots' and set(llb.ROOMS) <= set(dir(llb))")


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="it offers"): getattr(llb, "nothing")  # noqa: B009


def places():
    "Module -> its room, counted from the left, and the number of its notebook."
    found = {}
    for notebook in NOTEBOOKS:
        sources = ("".join(c["source"]) for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"])
        lines = (line for source in sources for line in source.splitlines())
        for name in [line.split()[-1] for line in lines if line.startswith("#| default_exp")]:
            room, _, module = name.rpartition(".")
            folder = f"{llb.ROOMS.index(room)}_{room}" if room else "nbs"
            assert notebook.parent.name == folder and notebook.stem[3:] == module, f"{notebook} is no place for {name}"
            found[name] = (llb.ROOMS.index(room) if room else len(llb.ROOMS), int(notebook.name[:2]))
    return found


def imported(module):
    "The modules of this package that a module imports."
    package = ("llb." + module).split(".")[:-1]
    for node in ast.walk(ast.parse((ROOT / "llb" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("llb.") for a in node.names if a.name.startswith("llb."))
        if not isinstance(node, ast.ImportFrom): continue
        base = package[:len(package) - node.level + 1] if node.level else []
        name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
        if name.split(".")[0] != "llb": continue
        name = name.removeprefix("llb").strip(".")
        yield from [name] if name in MODULES else (f"{name}.{a.name}".strip(".") for a in node.names)


def test_each_module_has_a_notebook_in_its_room():
    assert set(places()) == set(MODULES), "a module without notebook, or the reverse"
    numbers = [number for _, number in places().values()]
    assert len(set(numbers)) == len(numbers), "two notebooks share a number"


def test_a_room_imports_from_rooms_to_its_left():
    at, wrong, core, plots = places(), [], llb.ROOMS.index("core"), llb.ROOMS.index("plots")
    for module in MODULES:
        for used in imported(module):
            if at[used] >= at[module]: wrong.append(f"{module} imports {used}, which stands to its right")
            if at[module][0] == plots and at[used][0] not in (core, plots):
                wrong.append(f"{module} imports {used}: plots take arrays and use core alone")
    assert not wrong, wrong


@pytest.mark.slow
@pytest.mark.parametrize("command", [["llb.cli", "--help"], ["llb.cli"], ["llb.train", "--help"]], ids=" ".join)
def test_help(command):
    if command[0] == "llb.cli": words = ["-c", f"from llb.cli import main; main({command[1:]})"]
    else: words = ["-m", *command]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "llb train" in done.stdout and done.stderr == ""


@pytest.mark.slow
def test_console_script():
    script = shutil.which("llb", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert script, "install the package: pip install -e ."
    done = subprocess.run([script, "train", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and all(f in done.stdout for f in ("--num_objects", "--num_layers", "--resume"))
    assert subprocess.run([script, "trian"], capture_output=True, timeout=60).returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--opjects", "3"], ["--epochs", "many"], ["--opt", "Adamm"]], ids=" ".join)
def test_wrong_flags(words):
    done = subprocess.run([sys.executable, "-m", "llb.train", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and words[0] in done.stderr + done.stdout and "Traceback" not in done.stderr


def exported_lines(cell):
    "The lines that a cell exports."
    lines = "".join(cell["source"]).splitlines()
    if cell["cell_type"] != "code" or not lines or not lines[0].startswith("#| export"): return []
    return [line for line in lines if line.strip() and not line.startswith("#|")]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_exported_cells_fit_on_a_screen(notebook):
    "At most 40 lines of 120 characters; ruff leaves out what is exported, for nbdev writes longer lists of names."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not [c["id"] for c in cells if len(exported_lines(c)) > 40]
    assert not [line for c in cells for line in exported_lines(c) if len(line) > 120]


def outputs(notebook):
    "The stored outputs of a notebook, as text."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [json.dumps({k: v for k, v in o.items() if k != "metadata"}) for c in cells for o in c.get("outputs", [])]


@pytest.mark.parametrize("notebook", [*NOTEBOOKS, *sorted((ROOT / "nbs/guides").glob("*.ipynb"))], ids=lambda p: p.stem)
def test_stored_outputs(notebook):
    "No errors, no bars that stand still, nothing of the machine they were made on."
    for text in outputs(notebook):
        assert '"output_type": "error"' not in text and "it/s]" not in text, text[:300]
        assert not [place for place in (str(ROOT), str(Path.home()), "/home/", "/root/") if place in text], text[:300]
