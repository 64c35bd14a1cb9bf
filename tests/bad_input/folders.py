"""Folders that are not laid out as they should be, and files that are no images, or strange ones."""

import json
import os
import shutil
import socket
import zlib
from pathlib import Path
from struct import pack

import numpy as np
from conftest import make_images
from PIL import Image

from llb.data.datasets import load_dataset
from llb.data.splits import load_data

DOTS = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)


def image(mode="RGB", size=(40, 40)):
    return Image.fromarray(DOTS).resize(size).convert(mode)


def classes(root, count=6, names=("circle", "square", "triangle")):
    return make_images(root, count, names)


def listed(spoil, then=None):
    "Spoil a folder of three classes, then list and read it; `then` must hold of what was listed."

    def act(shop):
        root = classes(shop.here / "data")
        moved = spoil(root)
        if isinstance(moved, Path):
            root = moved
        printed = shop.check(root)
        if then:
            assert then(load_data(root), printed), printed
        return printed

    return act


def official(name, spoil):
    "A folder that is given as one of the benchmarks."

    def act(shop):
        root = classes(shop.here / "data")
        spoil(root)
        return str(load_dataset(name, root))

    return act


def with_file(name, content=b"", then=None):
    "One more file in the class `circle`."

    def spoil(root):
        path = root / "circle" / name
        if isinstance(content, Image.Image):
            content.save(path)
        else:
            path.write_bytes(content)

    return listed(spoil, then)


def count(data):
    return sum(len(images) for images in vars(data).values())


def files(data):
    return [file for images in vars(data).values() for file in images.files]


def apart(data):
    "No image is in two splits."
    found = [os.path.realpath(path) for images in vars(data).values() for path in images.paths]
    return len(set(found)) == len(found)


def png_of(width, height):
    "A PNG that claims a size and holds one row of black."

    def chunk(kind, data):
        return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * ((width + 1) * height if width * height < 10**7 else 100))
    header = pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def split_into(train, val):
    "Move the class folders below two folders."

    def spoil(root):
        for name in train, val:
            shutil.copytree(root, root.parent / "both" / name)
        return root.parent / "both"

    return spoil


def remove_all(root):
    for path in list(root.iterdir()):
        shutil.rmtree(path)


def socket_file(root):
    made, here = socket.socket(socket.AF_UNIX), os.getcwd()
    os.chdir(root / "circle")  # such a name must be short
    try:
        made.bind("a.png")
    finally:
        os.chdir(here)
        made.close()


def only(root, name, keep):
    "Leave so many files in a class."
    for path in sorted((root / name).iterdir())[keep:]:
        path.unlink()


def annotated(**change):
    "iNaturalist's annotations, with a change."

    def spoil(root):
        good = {
            "images": [{"id": 0, "file_name": "circle/00.png"}, {"id": 1, "file_name": "square/00.png"}],
            "annotations": [{"image_id": 0, "category_id": 0}, {"image_id": 1, "category_id": 1}],
            "categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}],
        }
        for name in "train2018.json", "val2018.json":
            (root / name).write_text(json.dumps({**good, **change}))

    return spoil


def written(name, text):
    return lambda root: (root / name).write_text(text)


def places(categories="/c/circle 0\n/s/square 1\n", train="/c/circle/00.png 0\n", val="00.png 0\n"):
    def spoil(root):
        for name, text in {
            "categories_places365": categories,
            "places365_train_standard": train,
            "places365_val": val,
        }.items():
            (root / f"{name}.txt").write_text(text)
        for name in "data_256", "val_256":
            (root / name).mkdir()

    return spoil


FOLDERS = {
    "no such folder": (lambda s: s.check(s.here / "nope"), "nope"),
    "a file instead": (lambda s: s.check(s.write("data.zip", "x")), "data.zip"),
    "an empty name": (lambda s: s.train(data_dir=""), "data_dir"),
    "only spaces": (lambda s: s.check("  "), "'  '"),
    "a name with NUL": (lambda s: s.train(data_dir="a\0b"), "data_dir"),
    "an empty folder": (lambda s: s.check(s.write("empty/.keep").parent), "empty"),
    "images without class folders": (lambda s: s.check(s.images / "circle"), "circle"),
    "one class": (listed(lambda r: [shutil.rmtree(r / n) for n in ("square", "triangle")]), "at least 2 classes"),
    "an empty class": (listed(lambda r: (r / "zebra").mkdir()), "zebra"),
    "a class of no images": (listed(lambda r: (r / "zebra").mkdir() or (r / "zebra" / "a.txt").touch()), "zebra"),
    "a class of one image": (listed(lambda r: only(r, "circle", 1)), None),
    "a hidden class folder": (
        listed(lambda r: [shutil.copytree(r / "circle", r / ".git")], lambda d, _: len(d.classes) == 3),
        None,
    ),
    "a file beside the classes": (listed(lambda r: (r / "README").write_text("x")), None),
    "one image in all": (
        listed(lambda r: [only(r, "circle", 1), only(r, "square", 0), only(r, "triangle", 0)]),
        "circle|square",
    ),
    "two images in two classes": (
        listed(lambda r: [only(r, "circle", 1), only(r, "square", 1), shutil.rmtree(r / "triangle")]),
        "empty|too few",
    ),
    "train without val": (listed(lambda r: (shutil.move(r, r.parent / "train"), r.parent)[1]), "val"),
    "val without train": (listed(lambda r: (shutil.move(r, r.parent / "val"), r.parent)[1]), "train"),
    "train and an empty val": (
        listed(lambda r: (shutil.move(r, r.parent / "train"), (r.parent / "val").mkdir(), r.parent)[2]),
        "val",
    ),
    "val has other classes": (
        listed(
            lambda r: (
                split_into("train", "val")(r),
                (r.parent / "both/val/circle").rename(r.parent / "both/val/round"),
                r.parent / "both",
            )[2]
        ),
        "round",
    ),
    "Train and Val": (listed(split_into("Train", "Val"), lambda d, _: len(d.classes) == 3), None),
    "training and test": (listed(split_into("training", "test"), lambda d, _: len(d.classes) == 3), None),
    "TRAIN and VAL": (listed(split_into("TRAIN", "VAL"), lambda d, _: len(d.classes) == 3), None),
    "a loop of links": (listed(lambda r: (r / "circle" / "loop").symlink_to(r)), "loop is a link"),
    "a class linked into another": (listed(lambda r: (r / "circle" / "more").symlink_to(r / "square")), "is a link"),
    "a class that is a link": (
        listed(
            lambda r: (shutil.move(r / "circle", r.parent / "away"), (r / "circle").symlink_to(r.parent / "away"), r)[
                2
            ],
            lambda d, _: count(d) == 18,
        ),
        None,
    ),
    "a link to nothing": (
        listed(lambda r: (r / "circle" / "a.png").symlink_to("/nope.png"), lambda d, out: "1 link to nothing" in out),
        None,
    ),
    "a folder called a.png": (listed(lambda r: (r / "circle" / "a.png").mkdir()), None),
    "folders in a class": (
        listed(lambda r: [shutil.copytree(r / "circle", r / "circle" / "deep")], lambda d, _: count(d) == 24),
        None,
    ),
    "a name of an old encoding": (
        listed(
            lambda r: open(os.fsencode(r / "circle") + b"/\xff.png", "wb").write((r / "circle/00.png").read_bytes())
        ),
        r"\\xff|udcff|\?|�",
    ),
    "a class of an old encoding": (
        listed(lambda r: os.rename(r / "circle", os.fsencode(r) + b"/\xff")),
        r"\\xff|udcff|\?|�",
    ),
    "names with spaces and letters": (listed(lambda r: ((r / "circle").rename(r / "grüner Kreis 日"), r)[1]), None),
    "a name with a line break": (listed(lambda r: str((r / "circle/00.png").rename(r / "circle/a\nb.png"))), r"a\\nb"),
    "index.csv without path": (listed(written("index.csv", "file,group\na,b\n")), "index.csv"),
    "index.csv of an old encoding": (
        listed(lambda r: (r / "index.csv").write_bytes(b"path,group\n\xff,a\n")),
        "index.csv",
    ),
    "index.csv is a folder": (listed(lambda r: (r / "index.csv").mkdir()), "index.csv"),
    "ImageNet without synsets": (official("ImageNet", lambda r: None), "train|val"),
    "Places365 without lists": (official("Places365", lambda r: None), "Places365"),
    "Places365: a line without number": (official("Places365", places(train="/c/circle/00.png\n")), "train_standard"),
    "Places365: a number too high": (official("Places365", places(train="/c/circle/00.png 9\n")), "9"),
    "Places365: classes miscounted": (official("Places365", places(categories="/c/circle 4\n")), "categories"),
    "iNat18 without annotations": (official("iNat18", lambda r: None), "train2018"),
    "iNat18: no JSON": (
        official("iNat18", lambda r: [written(n, "{")(r) for n in ("train2018.json", "val2018.json")]),
        "2018.json",
    ),
    "iNat18: a list": (
        official("iNat18", lambda r: [written(n, "[]")(r) for n in ("train2018.json", "val2018.json")]),
        "2018.json",
    ),
    "iNat18: an image without label": (official("iNat18", annotated(annotations=[])), "annotation"),
    "iNat18: a stray annotation": (
        official("iNat18", annotated(annotations=[{"image_id": i, "category_id": 0} for i in range(3)])),
        "annotates",
    ),
    "iNat18: a file outside the folder": (
        official(
            "iNat18",
            annotated(images=[{"id": 0, "file_name": "../../secret.png"}, {"id": 1, "file_name": "square/00.png"}]),
        ),
        "secret",
    ),
    "iNat18: an absolute file": (
        official(
            "iNat18",
            annotated(images=[{"id": 0, "file_name": "/etc/secret.png"}, {"id": 1, "file_name": "square/00.png"}]),
        ),
        "secret",
    ),
    "an unknown data set": (lambda s: str(load_dataset("cifar10", s.images)), "cifar10"),
    "a benchmark without folder": (lambda s: str(load_dataset("ImageNet")), "data_dir"),
    "--num_classes of another number": (lambda s: s.train(num_classes=7), "7"),
    "train on a folder without images": (lambda s: s.train(data_dir=s.write("a/b/c.txt", "x").parent.parent), "a"),
}

IMAGES = {
    "an empty file": (with_file("x.png"), "x.png"),
    "text called jpg": (with_file("x.jpg", b"hello"), "x.jpg"),
    "a cut off image": (
        lambda s: listed(lambda r: (r / "circle/00.png").write_bytes((r / "circle/00.png").read_bytes()[:90]))(s),
        "00.png",
    ),
    "PostScript called jpg": (with_file("x.jpg", b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"), "x.jpg"),
    "a PNG called jpg": (with_file("x.jpg", png_of(40, 40)), None),
    "only a hidden image": (listed(lambda r: (only(r, "circle", 0), image().save(r / "circle/.a.png"))[1]), "circle"),
    "a companion of macOS": (with_file("._00.png", b"\0\5\x16\7", lambda d, _: count(d) == 18), None),
    "a pipe": (listed(lambda r: os.mkfifo(r / "circle" / "a.png"), lambda d, out: "1 pipe" in out), None),
    "a socket": (listed(socket_file, lambda d, out: "1 pipe or device" in out), None),
    "an image nobody may read": (with_file("x.png", image()), None),
    "a bomb": (with_file("x.png", png_of(60000, 60000)), "x.png"),
    "a line of 1.5 million pixels": (with_file("x.png", png_of(1500000, 1)), None),
    "one pixel": (with_file("x.png", image(size=(1, 1))), None),
    "grey": (with_file("x.png", image("L")), None),
    "grey with alpha": (with_file("x.png", image("LA")), None),
    "alpha": (with_file("x.png", image("RGBA")), None),
    "palette": (with_file("x.png", image("P")), None),
    "one bit": (with_file("x.png", image("1")), None),
    "CMYK": (with_file("x.jpg", image("CMYK")), None),
    "16 bits": (with_file("x.png", Image.fromarray(DOTS[..., 0].astype(np.uint16) * 256)), None),
    "real numbers": (with_file("x.tif", Image.fromarray(DOTS[..., 0] / np.float32(255))), None),
    "a GIF": (with_file("x.gif", image("P"), lambda d, out: "circle/x.gif" in files(d) or "gif" in out), None),
    "an unknown ending": (with_file("x.psd", b"8BPS", lambda d, out: count(d) == 18), None),
    "train on an unreadable image": (
        lambda s: (
            classes(s.here / "d"),
            (s.here / "d/circle/00.png").write_bytes(b"x"),
            s.train(data_dir=s.here / "d"),
        )[2],
        "00.png",
    ),
    "leave unreadable images out": (
        lambda s: (
            classes(s.here / "d"),
            (s.here / "d/circle/00.png").write_bytes(b"x"),
            s.train("--skip_unreadable", data_dir=s.here / "d"),
        )[2],
        None,
    ),
    "all images of val unreadable": (
        listed(
            lambda r: (
                [p.write_bytes(b"x") for p in (split_into("train", "val")(r) / "val").rglob("*.png")]
                and r.parent / "both"
            )
        ),
        "val",
    ),
}

CASES = {**FOLDERS, **{f"image: {name}": case for name, case in IMAGES.items()}}
