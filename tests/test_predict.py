"""`llb predict` and `model.predict`: which images, in which form, and what is said of those that cannot be read."""
import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image

from llb.cli import predict as main
from llb.core.console import columns_of
from llb.core.errors import InputError
from llb.models.backbone import load_backbone
from llb.models.heads import find_images
from llb.models.llb import LLB


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    backbone = load_backbone("test_vit", pretrained=False, image_size=32, num_classes=3)
    model = LLB(backbone, num_objects=8, num_layers=2, target_layer=3)
    model.classes = ["circle", "square", "triangle"]
    return model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder of class folders, and the working directory beside it."
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "photos", 2)
    return tmp_path / "photos"


def status(*words):
    "The exit status of the command in this process."
    try: main(["--device", "cpu", *map(str, words)])
    except SystemExit as e: return e.code
    return 0


def test_table_csv_and_json_say_the_same(saved, model, place, capsys):
    wanted = model.predict("photos")
    assert status(saved, "photos", "--format", "csv", "--top", 3) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 6 * 3 and [r["image"] for r in rows[::3]] == wanted.images
    for by, probabilities in wanted.probabilities.items():
        found = torch.tensor([[float(r[f"{by}_probability"]) for r in rows[i:i + 3]] for i in range(0, 18, 3)])
        assert torch.allclose(found, probabilities.sort(descending=True).values, atol=1e-5)
        assert [r[by] for r in rows[::3]] == [model.classes[c] for c in probabilities.argmax(-1)]
    assert status(saved, "photos", "--format", "json", "--top", 3) == 0
    assert [{k: str(v) for k, v in r.items()} for r in json.loads(capsys.readouterr().out)] == rows
    assert status(saved, "photos") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and "fused, alpha 0.5" in lines[0]
    assert all(line.startswith(name) for name, line in zip(wanted.images, lines[1:]))


def test_the_name_of_the_file_says_its_form(saved, place, tmp_path, capsys):
    for name in "found.csv", "found.json":
        assert status(saved, "photos", "--output", name) == 0
    assert capsys.readouterr().out == ""
    rows = list(csv.DictReader(open("found.csv", newline="")))
    assert [r["image"] for r in rows] == [r["image"] for r in json.load(open("found.json"))]


def named(saved, capsys, *words):
    assert status(saved, *words, "--format", "json") == 0
    return [row["image"] for row in json.loads(capsys.readouterr().out)]


def test_files_folders_and_patterns(saved, place, capsys):
    everything = sorted(map(str, (p.relative_to(place.parent) for p in place.rglob("*.png"))))
    (place / "notes.txt").write_text("no image")
    (place / "._00.png").write_bytes(b"of macOS")
    patterns = ["photos"], ["photos/*"], ["photos/**/*.png"], ["photos/**"]
    for words in *patterns, everything, ["photos/circle", *everything[2:]]:
        assert named(saved, capsys, *words) == everything, words
    assert named(saved, capsys, "photos/circle/00.png", "photos/[st]*/00.png") == everything[::2]
    os.rename("photos/circle/00.png", "photos/circle/[0].png")
    assert named(saved, capsys, "photos/circle/[0].png") == ["photos/circle/[0].png"], "a file is no pattern"


@pytest.mark.parametrize("joint", ["\n", "\r\n", "\0"])
def test_a_list_on_standard_input(joint, saved, place, capsys, monkeypatch):
    everything = [f"photos/square/0{i}.png" for i in (1, 0)]
    content = joint.join([*everything, "photos/circle", ""])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert named(saved, capsys, "-") == [*everything, "photos/circle/00.png", "photos/circle/01.png"]


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(saved, place, capsys, monkeypatch):
    (place / "circle/broken.png").write_bytes(b"no image")
    (place / "circle/empty.png").touch()
    assert status(saved, "photos", "--format", "csv", "--batch_size", 2) == 1
    out, err = capsys.readouterr()
    assert len(list(csv.DictReader(io.StringIO(out)))) == 6
    assert "photos/circle/broken.png cannot be decoded" in err and "photos/circle/empty.png" in err
    assert "2 of 8 images could not be read." in err and "--skip_unreadable" not in err
    content = b"photos/circle/00.png\nphotos/gone.png\nphotos/square/00.png\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert status(saved, "-") == 1
    out, err = capsys.readouterr()
    assert "photos/gone.png" in err and out.count("photos/") == 2


@pytest.mark.parametrize("words,said", [
    (["photoz"], "There is no image or folder 'photoz'"), (["photos/*.jpg"], "No image has a name like"),
    (["empty"], "holds no image"), (["broken.png"], "None of the 1 images can be read"),
    (["/dev/null"], "no image or folder"),
    (["photos", "--top", "0"], "--top is 0"), (["photos", "--alpha", "1.5"], "alpha is 1.5"),
    (["photos", "--alpha", "nan"], "alpha is nan"), (["photos", "--batch_size", "0"], "batch_size is 0"),
    (["photos", "--output", "a.txt"], "does not end in"), (["photos", "--output", "gone/a.csv"], "cannot be written"),
    (["photos", "--output", "photos"], "does not end in"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_what_cannot_be_done_is_a_sentence(words, said, saved, place, capsys):
    (place.parent / "empty").mkdir()
    (place.parent / "broken.png").write_bytes(b"no image")
    assert status(saved, *words) == 2
    out, err = capsys.readouterr()
    assert said in err and err.startswith(("error: ", "Left out: ")) and "Traceback" not in err and out == ""


def test_no_model_is_a_sentence(place, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for run in "runs/nowhere", "/typo", "photos":
        assert status(run, "photos") == 2
        assert capsys.readouterr().err.startswith("error: There is no ")


NAMES = ["a,b \"c\".png", "line\nbreak.png", "\x1b[31mred.png", "犬の写真.png", os.fsdecode(b"latin\xe9.png")]


def test_names_may_be_anything(saved, place, capsys, monkeypatch):
    for name in NAMES: os.link("photos/circle/00.png", f"photos/circle/{name}")
    assert status(saved, *(f"photos/circle/{name}" for name in NAMES), "--output", "found.csv") == 0
    with open("found.csv", encoding="utf-8", errors="surrogateescape", newline="") as f:
        assert [row["image"].rpartition("/")[2] for row in csv.DictReader(f)] == NAMES
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert status(saved, *(f"photos/circle/{name}" for name in NAMES)) == 0
    sys.stdout.seek(0)
    lines = sys.stdout.read().splitlines()
    assert len(lines) == 6 and not any("\x1b" in line for line in lines)


def test_a_table_fits_the_terminal(saved, place, capsys, monkeypatch):
    long = place / "a folder with a name that goes on and on"
    os.rename(place / "circle", long)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert status(saved, long) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(columns_of(line) <= 60 for line in lines) and "/00.png " in lines[1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert status(saved, long) == 0
    assert f"{long}/00.png " in capsys.readouterr().out, "nothing is cut in a pipe"


def test_images_are_taken_as_they_are_needed(model, images):
    taken = []
    def pairs():
        for pair in find_images(images):
            taken.append(pair)
            yield pair
    batches = model.predict_batches(pairs(), batch_size=4)
    assert len(next(batches)) == len(taken) == 4 and len(next(batches)) == 4 and len(taken) == 8


def test_images_are_seen_as_in_training_whichever_way_they_come(model, tmp_path):
    rng = np.random.default_rng(0)
    kinds = {"grey16": Image.fromarray(rng.integers(0, 65535, (40, 50)).astype(np.uint16)),
             "glass": Image.fromarray(rng.integers(0, 255, (40, 50, 4), np.uint8)),
             "palette": Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).quantize(9)}
    for name, image in kinds.items():
        file = tmp_path / f"{name}.png"
        image.save(file)
        seen = torch.stack([model.backbone.transform()(model_input) for model_input in (Image.open(file), image)])
        wanted = model(seen[:1]).probabilities()
        for given in file, Image.open(file), image:
            assert torch.allclose(model.predict(given).probabilities["fused"], wanted, atol=1e-6), name


def test_predictions_say_what_was_left_out(model, place):
    (place / "square/broken.png").write_bytes(b"no image")
    found = model.predict("photos")
    assert len(found) == 6 and list(found.unreadable) == ["photos/square/broken.png"]
    for shown in repr(found), found._repr_html_(): assert "1 of 7 images could not be read" in shown
    with pytest.raises(InputError, match="cannot be decoded"): model.predict("photos/square/broken.png")
    with pytest.raises(InputError, match="the list is empty"): model.predict([])
    truncated = (place / "square/00.png").read_bytes()[:60]
    with pytest.raises(InputError): model.predict(Image.open(io.BytesIO(truncated)))


@pytest.mark.slow
def test_a_run_and_a_pipe(whole, images, tmp_path):
    "The command as a shell runs it, on a run folder; nothing but rows in the standard output."
    program = "import sys; from llb.cli import main; main(sys.argv[1:])"
    words = [sys.executable, "-c", program, "predict", whole / "1", "-", "--format", "csv", "--device", "cpu"]
    files = "\0".join(map(str, sorted(images.rglob("*.png"))))
    done = subprocess.run(words, input=files, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert len(rows) == 60 and {row["fused"] for row in rows} <= {"circle", "square", "triangle"}
