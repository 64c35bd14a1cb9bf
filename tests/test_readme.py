"""The README and the guides say nothing that does not run: their code, their commands, the names in them.

Python blocks run as they are, with `SMALLER` where they would ask a model hub or take long. Commands run too: one that
trains gets the flags of `SHORT` behind its own, and what cannot be here (several machines, ImageNet) is parsed by the
real parser. `make` is how these tests are run, so its targets are only looked up. `nbdev_test` runs the guides' cells.
"""
import functools
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_images
from torch.distributed.run import get_args_parser

import llb
from llb.cli import COMMANDS, main
from llb.runs.config import parse_command

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = {"target_layer=11": "target_layer=4", "num_objects=2048": "num_objects=16"}
SHORT = ("--epochs 1 --backbone test_vit.r160_in1k --random_backbone --image_size 32 --target_layer 3 --num_layers 2 "
         "--num_objects 8 --batch_size 8 --workers 0 --device cpu").split()
HIDDEN = {"90_train": 1, "91_cli": 1}   # `main()` where the notebook is a module that was started


def prose():
    "Name and text of the README and of each guide, and of each chapter: what people read, without code cells."
    yield "README", README
    for notebook in sorted([*ROOT.glob("nbs/*/*.ipynb"), *ROOT.glob("nbs/*.ipynb")]):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        yield notebook.stem, "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def commands():
    "Each command line: where it stands, and its words without comments and redirections."
    for name, text in prose():
        for line in re.findall(r"^    ((?:llb|torchrun|make|python|find|pip) .*|export .*)$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            yield name, words[:words.index(">")] if ">" in words else words


COMMANDS_SEEN = list(commands())
BLOCKS = [(name, block) for name, text in prose() for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


@pytest.fixture
def place(tmp_path, monkeypatch, images):
    "A folder with what the README takes for granted: images, a finished run, no model hub."
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "photos", 8)
    (tmp_path / "photos/dog.jpg").write_bytes(next(images.rglob("*.png")).read_bytes())
    small = llb.load_backbone("test_vit", pretrained=False, num_classes=5, image_size=160)
    fake = functools.wraps(llb.load_backbone)(lambda *given, **options: small)
    monkeypatch.setattr("llb.models.backbone.load_backbone", fake)
    return tmp_path


def test_there_is_something_to_test():
    assert len(BLOCKS) >= 2 and len(COMMANDS_SEEN) >= 15 and {name for name, _ in BLOCKS} >= {"README"}


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for _, block in BLOCKS], ids=[name for name, _ in BLOCKS])
def test_a_block_of_python_runs(block, place, whole):
    shutil.copytree(whole / "1", place / "runs/demo")
    known = {"images": torch.randn(2, 3, 160, 160), "labels": torch.tensor([0, 3])}
    for name, smaller in SMALLER.items(): block = block.replace(name, smaller)
    exec(compile(block, "block", "exec"), known)
    if "out" in known: assert known["out"].label_logits.shape == (2, 5) and known["terms"]["loss"].isfinite()


def training_words(words):
    "The flags of a command that trains; None for any other."
    if words[:2] == ["llb", "train"]: return words[2:]
    if words[0] == "torchrun": return words[words.index("llb.train") + 1:]
    return words[words.index("--") + 1:] if words[:3] == ["llb", "launch", "sbatch"] else None


@pytest.mark.parametrize("name,words", COMMANDS_SEEN, ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60])
def test_a_command_is_one(name, words):
    "Every command line, by the parsers of what it starts."
    if words[0] == "make": assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if words[0] == "llb": assert words[1] in COMMANDS
    if words[0] == "torchrun": get_args_parser().parse_args(words[1:])
    flags = training_words(words)
    if flags is not None and not flags[-1].isupper(): parse_command(flags)   # FLAGS stands for any


@pytest.mark.parametrize("name,text", list(prose()), ids=lambda x: x if len(x) < 40 else "")
def test_commands_named_in_a_sentence_are_there(name, text):
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z][a-z-]*)", text):
        assert re.search(rf"^{target}:", targets, re.MULTILINE), target
    for command in re.findall(r"`llb ([a-z][a-z-]*)[ `]", text): assert command in COMMANDS, command


def readme_trainings():
    "Commands of the README that train on a folder of one's own."
    return [words for name, words in COMMANDS_SEEN if name == "README" and training_words(words) and "photos" in words]


@pytest.mark.slow
@pytest.mark.parametrize("words", readme_trainings(), ids=lambda words: words[0])
def test_a_training_command_of_the_readme_trains(words, place):
    (place / "photos/dog.jpg").unlink()   # it is no class folder
    words = ["--nproc_per_node=2" if w.startswith("--nproc") else w for w in [*words, *SHORT]]
    programs = {"llb": ["-c", "from llb.cli import main; main()"], "torchrun": ["-m", "torch.distributed.run"]}
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *programs[words[0]], *words[1:]], cwd=place, env=env, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(place.glob("runs/*/metrics.json"))) == 1


@pytest.mark.slow
def test_other_commands_of_the_readme_run(place, capsys, monkeypatch, whole):
    "Those that are done in a second, on a run that is there. Of a pipe the first part is only what `find` would print."
    for name in "demo", "photos": shutil.copytree(whole / "1", place / "runs" / name)
    shutil.copytree(place / "photos", place / "imagenet-a", ignore=shutil.ignore_patterns("*.jpg"))
    shown = [words[words.index("|") + 1 if "|" in words else 0:] for name, words in COMMANDS_SEEN if name == "README"]
    others = [words for words in shown if words[0] == "llb" and words[1] != "train"]
    assert len(others) >= 4
    for words in others:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"photos/circle/00.png\n")))
        try: main(words[1:])
        except SystemExit as e: assert not e.code, words
        assert capsys.readouterr().out or list(place.glob("*.csv")), words


def hidden_cells(notebook):
    "How many cells `nbdev_test` leaves out."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    pattern = re.compile(r"^(#\|\s*(eval:\s*false|slow|cuda|net)\b|- skip_exec)", re.MULTILINE)
    return sum(bool(pattern.search("".join(c["source"]))) for c in cells)


def test_no_cell_hides_from_the_tests():
    notebooks = [*ROOT.glob("nbs/*/*.ipynb"), *ROOT.glob("nbs/*.ipynb")]
    assert {n.stem: count for n in notebooks if (count := hidden_cells(n))} == HIDDEN
    assert not [n for n in notebooks if n.name.startswith("_")] and not list(ROOT.glob("nbs/**/.notest"))


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README): assert (ROOT / target).exists(), target
