"""The bundled images are what their README says; a user's folder is read exactly or refused with a sentence."""
import csv
import errno
import os
import random
import re
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import draw, make_images
from PIL import Image

from llb.cli import check_data
from llb.core.errors import InputError
from llb.data.batches import make_loader, ImageDataset, TrainBatches
from llb.data.images import UnreadableImage, as_rgb, decode, scan_folder
from llb.data.splits import check_labels, load_data
from llb.data.unreadable import find_unreadable, known_unreadable, without_unreadable
from llb.runs.build import make_data
from llb.runs.config import Config

CLIPART = Path(__file__).parent.parent / "data" / "openclipart"


def counts_in_readme():
    text = (CLIPART / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.M)
    return {name: tuple(map(int, numbers)) for name, *numbers in rows}


def test_bundled_counts_are_those_of_the_readme():
    table, train, val = counts_in_readme(), scan_folder(CLIPART, "train"), scan_folder(CLIPART, "val")
    found = {c: (Counter(train.labels)[i], Counter(val.labels)[i]) for i, c in enumerate(train.classes)}
    assert {c: (a, b, a + b) for c, (a, b) in found.items()} == {c: n for c, n in table.items() if c != "total"}
    assert table["total"] == (len(train), len(val), len(train) + len(val)) and train.classes == val.classes


def test_bundled_index_names_every_file_once():
    with open(CLIPART / "index.csv", newline="", encoding="utf-8") as f: rows = list(csv.DictReader(f))
    on_disk = {p.relative_to(CLIPART).as_posix() for p in CLIPART.rglob("*.webp")}
    assert len(rows) == len(on_disk) and {r["path"] for r in rows} == on_disk
    assert all(r["path"].startswith(f"{r['split']}/{r['label']}/") for r in rows)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_near_duplicates_stay_on_one_side(seed):
    data = load_data(CLIPART, seed=seed)
    train, selection, val = (set(p.groups) for p in (data.train, data.selection, data.val))
    assert not train & val and not train & selection and not selection & val
    assert len(set(data.train.files) | set(data.selection.files)) == len(scan_folder(CLIPART, "train"))
    assert set(data.selection.labels) == set(data.val.labels) == set(range(14))


def test_no_two_bundled_files_are_equal_across_splits():
    train, val = ({p.read_bytes() for p in (CLIPART / split).rglob("*.webp")} for split in ("train", "val"))
    assert not train & val


def test_every_bundled_image_decodes():
    for split in "train", "val":
        images = scan_folder(CLIPART, split)
        assert find_unreadable(images.paths) == {}
    assert images.open(0).size == (224, 224) and images.open(0).mode == "RGB"


# A user's own folder

def test_folder_without_splits(images):
    data = load_data(images)
    parts = [set(p.files) for p in (data.train, data.selection, data.val)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60 and len(parts[2]) == 12
    assert data.classes == ("circle", "square", "triangle") and set(data.val.labels) == {0, 1, 2}
    other = load_data(images, seed=1)   # the reported images do not depend on the seed, the selection does
    assert other.val == data.val and other.selection.files != data.selection.files


def test_folder_with_splits(tmp_path):
    for split, n in ("train", 10), ("val", 4): make_images(tmp_path / split, n)
    data = load_data(tmp_path)
    assert len(data.train) + len(data.selection) == 30 and len(data.val) == 12
    assert all(f.startswith("val/") for f in data.val.files)
    assert all(f.startswith("train/") for f in data.train.files + data.selection.files)


def test_no_image_is_held_out_where_nothing_is_chosen(images):
    data, everything = load_data(images), load_data(images, selection_fraction=0)
    assert len(everything.train) == 48 and not len(everything.selection) and everything.val == data.val
    assert data.without_selection() == everything
    clean, reasons = without_unreadable(everything)
    assert clean == everything and not reasons


def test_groups_of_a_user(tmp_path):
    make_images(tmp_path / "train", 12)
    make_images(tmp_path / "val", 2)
    files = sorted(p.relative_to(tmp_path).as_posix() for p in (tmp_path / "train").rglob("*.png"))
    with open(tmp_path / "index.csv", "w", newline="") as f:
        csv.writer(f).writerows([("path", "group"), *((p, i // 4) for i, p in enumerate(files))])
    data = load_data(tmp_path, selection_fraction=.3)
    assert not set(data.train.groups) & set(data.selection.groups)
    assert len(data.selection) == 12   # one group of four of each class


@pytest.mark.parametrize("names,read", [
    (("Train", "Val"), ("Train", "Val")), (("training", "test"), ("training", "test")),
    (("train", "valid", "Testing"), ("train", "valid"))])
def test_splits_by_other_names(names, read, tmp_path, capsys):
    data = load_data(splits(tmp_path, *names))
    assert data.classes == ("circle", "square", "triangle") and len(data.val) == 15
    found = [{f.split("/")[0] for f in images.files} for images in (data.train, data.selection, data.val)]
    assert found == [{read[0]}, {read[0]}, {read[1]}]
    assert ("Testing is not read: valid is what is reported" in capsys.readouterr().out) == (len(names) == 3)


def test_a_class_may_be_called_train(tmp_path):
    assert load_data(make_images(tmp_path, 6, ("bus", "test", "train"))).classes == ("bus", "test", "train")


def test_what_is_no_image_is_counted_in_one_line(tmp_path, capsys):
    for split, n in ("train", 10), ("val", 4): make_images(tmp_path / split, n)
    for name in "circle/notes.txt", "circle/x.heic", "circle/.a.png", "square/._x.jpg", "square/Thumbs.db":
        (tmp_path / "train" / name).touch()
    shutil.copytree(tmp_path / "train/circle", tmp_path / "train/circle/.ipynb_checkpoints")
    os.mkfifo(tmp_path / "val/circle/pipe.png")
    (tmp_path / "val/circle/gone.png").symlink_to("nowhere.png")
    (tmp_path / "val/circle/self.png").symlink_to("self.png")
    shutil.copy(tmp_path / "val/circle/00.png", tmp_path / "val/loose.png")
    data = load_data(tmp_path)
    assert (len(data.train) + len(data.selection), len(data.val)) == (30, 12)
    assert capsys.readouterr().out == (f"Left out in {tmp_path}: 1 .db, 1 .heic, 1 .txt, 3 hidden, 2 link to nothing, "
                                       "1 outside the class folders, 1 pipe or device.\n")


def test_names_of_one_file_stay_in_one_split(tmp_path, capsys):
    folder = make_images(tmp_path, 20, ("circle", "square"))
    for i in range(20): (folder / f"circle/again{i:02}.png").hardlink_to(folder / f"circle/{i:02}.png")
    data = load_data(folder, selection_fraction=.3)
    assert "20 of 60 images" in capsys.readouterr().out
    inodes = [set(images.identities()) for images in vars(data).values()]
    assert not inodes[0] & inodes[1] and not inodes[0] & inodes[2] and not inodes[1] & inodes[2]


def test_class_folders_that_hold_the_same_folders_are_noted(tmp_path, capsys):
    for part in "set1", "set2": make_images(tmp_path / part, 5)
    assert load_data(tmp_path).classes == ("set1", "set2")
    assert "hold no image themselves, but folders of the same names (circle, square" in capsys.readouterr().out


def test_an_index_may_name_images_that_are_gone(tmp_path, capsys):
    load_data(with_index(tmp_path, b"path,group\ncircle/00.png,1\ncircle/01.png,1\ncircle/99.png,1\n"))
    assert "Note: 1 files named in" in capsys.readouterr().out


def only(tmp_path, *names, per_class=3): return make_images(tmp_path / "data", per_class, names)

def a_file(tmp_path):
    (tmp_path / "data").write_text("no folder")
    return tmp_path / "data"

def empty_class(tmp_path):
    folder = only(tmp_path, "circle", "square")
    (folder / "void").mkdir()
    return folder

def train_alone(tmp_path):
    make_images(tmp_path / "data" / "train")
    return tmp_path / "data"

def other_classes(tmp_path):
    make_images(tmp_path / "data" / "train", 4)
    make_images(tmp_path / "data" / "val", 4, ("circle", "hexagon"))
    return tmp_path / "data"

def flat(tmp_path):
    only(tmp_path, "circle")
    return tmp_path / "data" / "circle"

def linked_upwards(tmp_path):
    folder = only(tmp_path, "circle", "square")
    (folder / "circle/loop").symlink_to("..")
    return folder

def linked_class(tmp_path):
    folder = only(tmp_path, "circle", "square", "triangle")
    (folder / "circle/more").symlink_to("../square")
    return folder

def splits(tmp_path, *names):
    for i, name in enumerate(names): make_images(tmp_path / "data" / name, 4 + i)
    return tmp_path / "data"

def shared_file(tmp_path):
    folder = splits(tmp_path, "train", "val")
    (folder / "val/circle/00.png").unlink()
    (folder / "val/circle/00.png").hardlink_to(folder / "train/circle/00.png")
    return folder

def val_is_train(tmp_path):
    (splits(tmp_path, "train") / "val").symlink_to("train")
    return tmp_path / "data"

def two_trains(tmp_path): return splits(tmp_path, "Train", "training", "val")

def val_alone(tmp_path): return splits(tmp_path, "Validation")

def hidden_only(tmp_path):
    folder = empty_class(tmp_path)
    for name in ".a.png", "._x.jpg": shutil.copy(folder / "circle/00.png", folder / "void" / name)
    return folder

def one_level_too_high(tmp_path):
    make_images(tmp_path / "data/photos")
    return tmp_path / "data"

def with_index(tmp_path, content):
    folder = only(tmp_path, "circle", "square", per_class=6)
    (folder / "index.csv").write_bytes(content)
    return folder

def index_in_latin1(tmp_path): return with_index(tmp_path, b"path,group\ncaf\xe9.png,1\n")

def index_of_others(tmp_path): return with_index(tmp_path, b"path,group\ndata/circle/00.png,1\n")

def index_without_path(tmp_path): return with_index(tmp_path, b"file,group\ncircle/00.png,1\n")

def named(tmp_path, name):
    folder = only(tmp_path, "circle", "square", per_class=6)
    path = os.fsencode(folder) + b"/" + name
    if not name.endswith(b".png"):
        os.mkdir(path)
        path += b"/1.png"
    shutil.copy(folder / "square/00.png", path)
    return folder


@pytest.mark.parametrize("make,words", [
    pytest.param(lambda t: t / "nowhere", "no folder", id="missing"),
    pytest.param(a_file, "no folder", id="file"),
    pytest.param(lambda t: only(t), "no folder", id="empty-missing"),
    pytest.param(flat, "at least 2 classes", id="flat"),
    pytest.param(lambda t: only(t, "circle"), "at least 2 classes", id="one-class"),
    pytest.param(empty_class, "without an image: void", id="empty-class"),
    pytest.param(train_alone, "no val", id="train-only"),
    pytest.param(other_classes, "hexagon", id="other-classes"),
    pytest.param(lambda t: only(t, "circle", "square", per_class=1), "too few", id="too-few"),
    pytest.param(linked_upwards, "is a link to .*/data, .* Remove the link", id="link-loop"),
    pytest.param(linked_class, "circle/more is a link to|square is a link to", id="linked-class"),
    pytest.param(shared_file, "val/circle/00.png .* is the same file as train/circle/00.png", id="shared-file"),
    pytest.param(val_is_train, "val/circle/00.png .* is the same file as train/circle/00.png", id="val-is-train"),
    pytest.param(two_trains, "two folders for train, Train and training", id="two-trains"),
    pytest.param(val_alone, "a folder Validation with folders in it, but no train", id="val-alone"),
    pytest.param(hidden_only, "without an image: void; .* Left out: 2 hidden", id="hidden-only"),
    pytest.param(one_level_too_high, "If the class folders are in .*/data/photos, give that one", id="wrapped"),
    pytest.param(index_in_latin1, "index.csv cannot be read .*UTF-8", id="index-latin1"),
    pytest.param(index_of_others, "index.csv names none of the images", id="index-of-others"),
    pytest.param(index_without_path, "index.csv has no column path, but 'file', 'group'", id="index-without-path"),
    pytest.param(lambda t: named(t, b"caf\xe9"), r"'caf\\udce9', a name with", id="class-not-utf8"),
    pytest.param(lambda t: named(t, b"circle/caf\xe9.png"), r"'caf\\udce9.png', a name with", id="file-not-utf8"),
    pytest.param(lambda t: named(t, b"circle/\x1b[2J.png"), r"'\\x1b\[2J.png', a name with", id="escape-sequence"),
])
def test_bad_folder(make, words, tmp_path):
    with pytest.raises(InputError, match=words) as refused: load_data(make(tmp_path))
    assert str(refused.value).isprintable() and str(refused.value).endswith(".")

def test_empty_folder(tmp_path):
    with pytest.raises(InputError, match="0 images in 0 class folders"): load_data(tmp_path)


def test_class_count(images):
    check_labels(load_data(images).train, 3)
    config = Config.of(dataset="ImageFolder", data_dir=str(images), num_classes=4)
    with pytest.raises(InputError, match="has 3 classes, but 4 are expected"): make_data(config)


@pytest.mark.parametrize("hidden", ["", "circle", "circle/more"])
def test_a_folder_that_cannot_be_read_is_named_simulated(hidden, tmp_path, monkeypatch):
    "SIMULATED: to the superuser, as whom tests may run, every folder is open."
    root = make_images(tmp_path / "closed")
    (root / "circle/more").mkdir()
    scandir, listdir = os.scandir, os.listdir
    def closed(call):
        def wrapped(path="."):
            if Path(path) == root / hidden: raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path)
        return wrapped
    monkeypatch.setattr(os, "scandir", closed(scandir))
    monkeypatch.setattr(os, "listdir", closed(listdir))
    words = rf"The folder '{root / hidden}' cannot be read \(Permission denied\)"
    with pytest.raises(InputError, match=words): scan_folder(root)


@pytest.fixture
def broken(tmp_path):
    "A folder with a truncated, an empty and a text file among its images."
    folder = make_images(tmp_path / "broken")
    whole = (folder / "circle/03.png").read_bytes()
    (folder / "circle/03.png").write_bytes(whole[:len(whole) // 2])
    (folder / "square/04.png").write_bytes(b"")
    (folder / "triangle/05.png").write_text("<html>not found</html>")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache."
    monkeypatch.setenv("LLB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_corrupt_images_are_found_and_left_out(broken, capsys, cache):
    data = load_data(broken)
    clean, reasons = without_unreadable(data)
    names = {"circle/03.png", "square/04.png", "triangle/05.png"}
    assert len(reasons) == 3 and all(any(n in r for r in reasons) for n in names)
    assert sum(map(len, (clean.train, clean.selection, clean.val))) == 57
    assert not names & {*clean.train.files, *clean.selection.files, *clean.val.files}
    make_data(Config.of(dataset="ImageFolder", data_dir=str(broken), skip_unreadable=True))
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "3 unreadable" in said and all(n in said for n in names)


def test_what_a_check_found_is_remembered(broken, cache, monkeypatch):
    decoded = []
    monkeypatch.setattr("llb.data.unreadable.decode", lambda path: decoded.append(path) or decode(path))
    config = Config.of(dataset="ImageFolder", data_dir=str(broken), skip_unreadable=True)
    assert sum(map(len, vars(make_data(config)).values())) == 57 and len(decoded) == 60
    make_data(config.but(seed=1))   # other splits of the same files
    assert len(decoded) == 60
    with pytest.raises(InputError, match="3 of these images are known to be unreadable; the first: .*circle/03.png"):
        make_data(config.but(skip_unreadable=False))
    shutil.copy(broken / "circle/02.png", broken / "circle/03.png")
    assert sum(map(len, vars(make_data(config)).values())) == 58 and len(decoded) == 120
    for note in (cache / "checked").iterdir(): note.write_text('{"tor')
    left = make_data(config)   # was never checked as such
    assert known_unreadable(left) is None and len(decoded) == 180


def test_a_cache_that_cannot_be_written(broken, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLB_CACHE", str(tmp_path / "file"))
    assert len(without_unreadable(load_data(broken))[1]) == 3 and "cannot be remembered" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    pytest.param([], id="broken"),
    pytest.param(["--dataset", "ImageFolder"], id="no folder"),
    pytest.param(["--dataset", "ImageFolder", "--data_dir", "nowhere"], id="wrong folder"),
])
def test_check_data_command(flags, broken, tmp_path, start):
    if not flags: flags = ["--dataset", "ImageFolder", "--data_dir", broken]
    env = {"LLB_CACHE": str(tmp_path / "cache")}
    run = start(sys.executable, "-c", "from llb.cli import main; main()", "check-data", *flags, env=env).finish()
    if broken not in flags: assert run.code == 2 and run.err.startswith("error: ") and run.err.count("\n") == 1
    else: assert run.code == 1 and run.out.count("cannot be decoded") == 3 and run.err == "", run.err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named_in_one_sentence(workers, broken):
    images = scan_folder(broken)
    with pytest.raises(UnreadableImage) as met:
        for _ in make_loader(ImageDataset(images, lambda p: torch.zeros(1)), TrainBatches(60, 4, 0), workers): pass
    text = str(met.value)
    assert re.match(rf"{re.escape(str(broken))}/\w+/0[345]\.png cannot be decoded \(.+\.$", text)
    assert "\n" not in text and "Traceback" not in text


@pytest.mark.parametrize("factor", [1.5, 5], ids=["beyond the limit", "far beyond"])
def test_decompression_bomb(factor, tmp_path, monkeypatch):
    folder = make_images(tmp_path / "bomb", 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)   # a stand-in for the true limit, so that the bomb is small
    Image.new("RGB", (round(3000 * factor / 50), 50)).save(folder / "circle/01.png")
    images = scan_folder(folder)
    bomb = images.files.index("circle/01.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(UnreadableImage, match="circle/01.png"): images.open(bomb)
        assert list(find_unreadable(images.paths)) == [str(images.paths[bomb])]
    assert images.open(0).size == (40, 40)


def test_a_true_decompression_bomb(tmp_path):
    folder = make_images(tmp_path / "bomb", 4)
    Image.new("1", (20000, 20000)).save(folder / "circle/01.png")   # 50 kB, 400 million pixels
    with pytest.raises(UnreadableImage, match="circle/01.png.*[Bb]omb"): scan_folder(folder).open(1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_rgb(mode, tmp_path):
    folder = make_images(tmp_path / "modes", 4)
    suffix = ".tif" if mode in ("CMYK", "I;16") else ".png"
    Image.new(mode, (30, 20)).save(folder / "circle" / f"09{suffix}")
    images = scan_folder(folder)
    image = as_rgb(images.open(images.files.index(f"circle/09{suffix}")))
    assert image.mode == "RGB" and image.size == (30, 20)


def test_check_data_counts_what_is_special(tmp_path, cache, capsys):
    folder = make_images(tmp_path / "images", 6)
    Image.new("LA", (8, 8)).save(folder / "circle/glass.png")
    Image.new("I;16", (8, 8)).save(folder / "circle/deep.png")
    (folder / "circle/a.txt").touch()
    check_data(["--dataset", "ImageFolder", "--data_dir", str(folder)])
    said = capsys.readouterr().out
    for line in ("with transparency: 1 images", "16-bit or floating-point grey: 1 images",
                 f"Left out in {folder}: 1 .txt."): assert line in said


ODD = ["<script>alert(1)</script>".replace("/", "∕"), "a b", "déjà vu 猫", "it's \"quoted\"", "100%", "{x}", "--flag",
       "a;b&c"]


def test_odd_class_and_file_names(tmp_path):
    rng = random.Random(0)
    for name in ODD:
        (tmp_path / name).mkdir()
        for odd in ODD: draw("circle", rng).save(tmp_path / name / f"{odd}.png")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a b" / "notes.txt").write_text("not an image")
    data = load_data(tmp_path)
    assert data.classes == tuple(sorted(ODD)) and find_unreadable(data.train.paths) == {}
    assert sum(map(len, (data.train, data.selection, data.val))) == 64
    for file, label in zip(data.train.files, data.train.labels): assert file.split("/")[0] == data.classes[label]


def test_fingerprint_sees_names_labels_and_sizes(tmp_path):
    folder = make_images(tmp_path / "a", 4)
    first = scan_folder(folder)
    shutil.copytree(folder, tmp_path / "b")
    assert scan_folder(tmp_path / "b").fingerprint() == first.fingerprint()   # wherever it lies
    before, plain = first.fingerprint(), first.fingerprint(sizes=False)
    with open(folder / "circle/01.png", "ab") as f: f.write(b"x")
    assert scan_folder(folder).fingerprint() != before and scan_folder(folder).fingerprint(sizes=False) == plain
    (folder / "circle/01.png").rename(folder / "square/99.png")
    assert scan_folder(folder).fingerprint(sizes=False) != plain


WITH_WORKERS = """
import os, signal, sys, time
from pathlib import Path
from llb.data.batches import ImageDataset, TrainBatches, make_loader; from llb.data.images import scan_folder
def slow(image): time.sleep(.05); return 0
loader = make_loader(ImageDataset(scan_folder(sys.argv[1]), slow), TrainBatches(60, 2, 0), workers=2)
batches = iter(loader)
next(batches)
workers = [p.pid for p in batches._workers]
for pid in workers: os.kill(pid, signal.SIGINT)
for pid in workers: os.system(f"kill -TERM {pid}")   # from another process than the parent
left = sum(1 for _ in batches)
print(left, all(Path(f"/proc/{pid}").exists() for pid in workers), flush=True)
keep = iter(loader); next(keep)   # the program ends, or fails, with its loader in use
1 / 0
"""


@pytest.mark.slow
def test_loader_workers_obey_their_parent_only(images, start):
    run = start(sys.executable, "-c", WITH_WORKERS, images).finish(40)
    assert run.out == "29 True\n" and run.code == 1 and "ZeroDivisionError" in run.err
    run.wait_until_gone()
