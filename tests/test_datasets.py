"""The paper's data sets in the layouts they are distributed in: order, counts, what is refused, ImageNet-ReaL."""
import io
import json
import random
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import RealLabelsImagenet
from torchvision.datasets import ImageFolder

from llb.core.errors import InputError
from llb.data.datasets import _from_rows, load_dataset, real_labels
from llb.data.images import ImageList
from llb.training.evaluate import format_table, report_metrics
from llb.training.metrics import ALPHAS, Scores, set_accuracy

SYNSETS = (files("timm.data") / "_info" / "imagenet_synsets.txt").read_text().split()


def tree(root, *paths, mode="RGB"):
    """The same tiny image at all the given paths."""
    image = io.BytesIO()
    Image.new(mode, (8, 8), 90 if mode == "L" else (90, 10, 10)).save(image, "JPEG")
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(image.getvalue())
    return root


def everything(data):
    """File -> label over all three splits."""
    return {f: y for part in vars(data).values() for f, y in zip(part.files, part.labels)}


# ImageNet

def imagenet(root, classes, each=4):
    return tree(root, *(f"train/{c}/{c}_{i}.JPEG" for c in classes for i in range(each)),
                *(f"val/{c}/ILSVRC2012_val_{i + 1:08d}.JPEG" for i, c in enumerate(classes)))


@pytest.mark.parametrize("name", ["ImageNet", "imageet", "IMAGENET"])
def test_imagenet_part(tmp_path, name):
    data = load_dataset(name, imagenet(tmp_path, SYNSETS[:5]), num_classes=5)
    assert data.classes == tuple(SYNSETS[:5])
    assert all(f.split("/")[1] == SYNSETS[y] for f, y in everything(data).items())
    assert (len(data.train) + len(data.selection), len(data.val)) == (20, 5)


def test_imagenet_whole_count_and_official_index(tmp_path, capsys):
    root = imagenet(tmp_path, SYNSETS, each=1)
    data = load_dataset("ImageNet", root, selection_fraction=.1)
    assert data.classes == tuple(SYNSETS) and len(data.train) == 900 and len(data.selection) == 100
    assert "1,281,167" in capsys.readouterr().out
    assert ImageFolder(root / "val").classes == list(data.classes)
    (root / "train" / SYNSETS[3]).rename(root / "train" / "n99999999")
    (root / "val" / SYNSETS[3]).rename(root / "val" / "n99999999")
    with pytest.raises(InputError, match="n99999999"): load_dataset("ImageNet", root)
    whole = imagenet(tmp_path / "b", SYNSETS, each=1)
    with pytest.raises(InputError, match="1000 classes, but 7"): load_dataset("ImageNet", whole, num_classes=7)


def test_numeric_folders_sort_as_numbers(tmp_path):
    data = load_dataset("imagenet", imagenet(tmp_path, [str(i) for i in range(12)]), num_classes=12)
    assert data.classes == tuple(str(i) for i in range(12)) and everything(data)["train/10/10_0.JPEG"] == 10


def test_imagenet_refuses(tmp_path):
    root = imagenet(tmp_path / "a", SYNSETS[:3])
    with pytest.raises(InputError, match="3 classes, but 1000"): load_dataset("ImageNet", root)
    with pytest.raises(InputError, match="needs --data_dir"): load_dataset("ImageNet")
    with pytest.raises(InputError, match="no folder"): load_dataset("ImageNet", tmp_path / "nowhere")
    with pytest.raises(InputError, match="no folder"): load_dataset("ImageNet", root / "train")
    train = [f"train/{SYNSETS[i]}/1.JPEG" for i in range(2)]
    flat = tree(tmp_path / "b", *train, "val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(InputError, match="sorted into one folder a class"):
        load_dataset("ImageNet", flat, num_classes=2)
    (root / "train" / SYNSETS[7]).mkdir()
    with pytest.raises(InputError, match="hold no image"): load_dataset("ImageNet", root, num_classes=4)


# Places365

PLACES = ["desert/sand", "desert/vegetation", "desert_road", "field/cultivated", "field/wild", "field_road",
          "underwater/ocean_deep"]


@pytest.mark.parametrize("joint", "-_")
@pytest.mark.parametrize("name", ["Places365", "plc365"])
def test_places_folders(tmp_path, name, joint):
    folders = [p.replace("/", joint) for p in PLACES]
    folders_at_random = random.Random(0).sample(folders, 7)
    root = tree(tmp_path, *(f"{s}/{c}/{i}.jpg" for s in ("train", "val") for c in folders_at_random for i in range(4)))
    data = load_dataset(name, root, num_classes=7)
    assert list(data.classes) == folders and all(f.split("/")[1] == folders[y] for f, y in everything(data).items())


def lists(root, train_folder="data_256_standard", val_folder="val_256"):
    """The official layout: nested training folders, one flat validation folder, lists in no particular order."""
    train = [(f"/{p[0]}/{p}/{i:08d}.jpg", y) for y, p in enumerate(PLACES) for i in range(1, 5)]
    val = [(f"Places365_val_{i:08d}.jpg", (i * 3) % 7) for i in range(1, 15)]
    tree(root, *(train_folder + f for f, _ in train), *(f"{val_folder}/{f}" for f, _ in val))
    categories = [(f"/{p[0]}/{p}", y) for y, p in enumerate(PLACES)]
    for name, rows in dict(categories_places365=categories, places365_train_standard=train, places365_val=val).items():
        random.Random(1).shuffle(rows)
        (root / f"{name}.txt").write_text("".join(f"{f} {y}\n" for f, y in rows))
    return root, {train_folder + f: y for f, y in train} | {f"{val_folder}/{f}": y for f, y in val}


@pytest.mark.parametrize("name", ["../outside.jpg", "a/../../outside.jpg", "/etc/outside.jpg", "\x1b[2J.jpg"])
def test_a_list_cannot_lead_out_of_its_folder(name, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.jpg")
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match="which is outside its folder|a name with control characters") as refused:
        _from_rows(tmp_path / "data", [(name, 0)], ("a",), "list.txt")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("size", ["256", "large"])
@pytest.mark.parametrize("ending", ["", "_standard"])
def test_places_lists(tmp_path, size, ending):
    root, wanted = lists(tmp_path, f"data_{size}{ending}", f"val_{size}")
    data = load_dataset("Places365", root, num_classes=7)
    assert everything(data) == wanted and data.classes == tuple(p.replace("/", "-") for p in PLACES)
    assert len(data.val) == 14 and set(data.train.labels) == set(range(7))


def test_places_refuses(tmp_path, capsys):
    root, _ = lists(tmp_path / "a")
    with pytest.raises(InputError, match="7 classes, but 365"): load_dataset("Places365", root)
    (root / "val_256" / "Places365_val_00000003.jpg").unlink()
    with pytest.raises(InputError, match="1 of 14 listed .*Places365_val_00000003.jpg"):
        load_dataset("Places365", root, num_classes=7)
    (root / "val_256").rename(root / "val_large")
    with pytest.raises(InputError, match="none of the folders val_256"): load_dataset("Places365", root, num_classes=7)
    (root / "places365_val.txt").unlink()
    with pytest.raises(InputError, match="no places365_val.txt"): load_dataset("Places365", root, num_classes=7)
    with pytest.raises(InputError, match="is no Places365"): load_dataset("Places365", tmp_path)
    letters = tree(tmp_path / "b", *(f"{s}/{p[0]}/{p}/1.jpg" for s in ("train", "val") for p in PLACES))
    with pytest.raises(InputError, match="folder for each initial"): load_dataset("Places365", letters, num_classes=7)
    other = tree(tmp_path / "c", *(f"{s}/place{i:03d}/1.jpg" for s in ("train", "val") for i in range(365)))
    assert len(load_dataset("Places365", other).classes) == 365
    assert "not named as those of Places365" in capsys.readouterr().out


# iNaturalist

def inat(root, n=6, **changes):
    """The official layout, with images and annotations in different orders and ids that are no positions."""
    rows = [(f"train_val2018/Aves/{i % n}/{i:03d}.jpg", i % n) for i in range(8 * n)]
    tree(root, *(f for f, _ in rows if not (root / f).exists()))
    for split, part in dict(train=rows[:6 * n], val=rows[6 * n:]).items():
        ids = random.Random(split).sample(range(10_000), len(part))
        content = {"images": [{"id": k, "file_name": f, "width": 8} for k, (f, _) in zip(ids, part)],
                   "annotations": [{"id": 5 * k, "image_id": k, "category_id": y} for k, (_, y) in zip(ids, part)],
                   "categories": [{"id": y, "name": f"species {y}", "supercategory": "Aves"} for y in range(n)]}
        for rows_ in content.values(): random.Random(2).shuffle(rows_)
        random.Random(3).shuffle(content["annotations"])
        if split == "train":
            for key, change in changes.items(): content[key] = change(content[key])
        (root / f"{split}2018.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("name", ["iNat18", "inat18", "iNaturalist"])
def test_inat_joins_on_the_image_id(tmp_path, name):
    data = load_dataset(name, inat(tmp_path), num_classes=6)
    assert all(int(f.split("/")[2]) == y for f, y in everything(data).items()) and len(everything(data)) == 48
    assert data.classes == tuple(f"species {y}" for y in range(6))


def test_inat_all_categories(tmp_path):
    names = [{"id": i, "name": "Bombus" if i < 2 else f"s{i}"} for i in range(8142)]
    root = inat(tmp_path, categories=lambda _: names)
    val = json.loads((root / "val2018.json").read_text())
    (root / "val2018.json").write_text(json.dumps({**val, "categories": names}))
    data = load_dataset("iNat18", root)
    assert len(set(data.classes)) == 8142 and data.classes[:2] == ("Bombus (0)", "Bombus (1)")


@pytest.mark.parametrize("message, changes", [
    ("1 of 36 images .* no annotation", dict(annotations=lambda a: a[1:])),
    ("36 of 36 images .* no annotation", dict(annotations=lambda a: [])),
    ("annotates 1 images it does not list", dict(images=lambda a: a[1:])),
    ("several categories", dict(annotations=lambda a: [*a, {**a[0], "category_id": (a[0]["category_id"] + 1) % 6}])),
    ("different categories", dict(categories=lambda a: [c for c in a if c["id"] != 5])),
    ("category 99, which it does not name", dict(annotations=lambda a: [{**a[0], "category_id": 99}, *a[1:]])),
    ("not 0, 1, 2", dict(categories=lambda a: [{**c, "id": c["id"] + 1} for c in a])),
    ("1 of 36 listed images", dict(images=lambda a: [{**a[0], "file_name": "train_val2018/Aves/0/gone.jpg"}, *a[1:]])),
    ("no images, annotations and categories", dict(images=lambda a: 7)),
])
def test_inat_refuses(tmp_path, message, changes):
    with pytest.raises(InputError, match=message): load_dataset("iNat18", inat(tmp_path, **changes), num_classes=6)


def test_inat_wrong_count_and_missing_files(tmp_path):
    root = inat(tmp_path)
    with pytest.raises(InputError, match="6 classes, but 8142"): load_dataset("iNat18", root)
    (root / "val2018.json").unlink()
    with pytest.raises(InputError, match="no val2018.json"): load_dataset("iNat18", root, num_classes=6)


# all

def test_grey_images_come_out_in_colour(tmp_path):
    paths = [f"{s}/{c}/{i}.jpg" for s in ("train", "val") for c in SYNSETS[:2] for i in range(4)]
    root = tree(tmp_path, *paths, mode="L")
    data = load_dataset("ImageNet", root, num_classes=2)
    with Image.open(root / data.train.files[0]) as raw: assert raw.mode == "L"
    assert data.train.open(0).mode == "RGB"


def test_other_names(tmp_path):
    assert len(load_dataset("openclipart").classes) == 14 == len(load_dataset("OpenClipart", num_classes=14).classes)
    with pytest.raises(InputError, match="14 classes, but 3"): load_dataset("openclipart", num_classes=3)
    with pytest.raises(InputError, match="Unknown data set 'cifar10'"): load_dataset("cifar10")
    assert load_dataset("imagefolder", imagenet(tmp_path, ["b", "a"])).classes == ("a", "b")


# ImageNet-ReaL

def scores_of(logits, label):
    """Scores with the same prediction at every alpha."""
    n, a = len(logits), len(ALPHAS)
    column = lambda x: np.repeat(np.asarray(x)[:, None], a, 1)
    p = logits.softmax(1)
    top = column(p.max(1).values)
    return Scores(np.arange(n), label, np.array(ALPHAS), column(p.argmax(1)), column(np.zeros(n, bool)), top, top,
                  column(p.square().sum(1)))


def test_real_agrees_with_timm_on_all_names(tmp_path):
    g = torch.Generator().manual_seed(0)
    folders = torch.randint(1000, (50_000,), generator=g).tolist()
    order = torch.randperm(50_000, generator=g).tolist()
    names = tuple(f"val/{SYNSETS[folders[i]]}/ILSVRC2012_val_{i + 1:08d}.JPEG" for i in order)
    labels = json.loads((files("timm.data") / "_info" / "imagenet_real_labels.json").read_text())
    logits = torch.randn(50_000, 1000, generator=g)
    for row, i in enumerate(order):
        if labels[i] and row % 3: logits[row, labels[i][-1]] += 5.
    theirs = RealLabelsImagenet(names)
    theirs.add_result(logits)
    accepted = real_labels(ImageList(tmp_path, names, (0,) * 50_000, tuple(SYNSETS), names))
    assert sum(x is not None for x in accepted) == 46_837
    ours = set_accuracy(scores_of(logits, np.zeros(50_000, int)), accepted, .5)
    assert np.isclose(100 * ours, theirs.get_accuracy(1), atol=1e-9) and .5 < ours < .9


def test_real_is_not_reported_for_other_names(tmp_path):
    paths = [f"{s}/{c}/{i}.jpg" for s in ("train", "val") for c in "ab" for i in range(4)]
    val = load_dataset("ImageFolder", tree(tmp_path, *paths)).val
    assert real_labels(val) is None
    scores = scores_of(torch.eye(2)[list(val.labels)], np.array(val.labels))
    assert "imagenet_real" not in report_metrics(scores, val, .5, "given")


def test_real_is_reported_for_a_part(tmp_path):
    root = imagenet(tmp_path, SYNSETS[:8])
    val = load_dataset("ImageNet", root, num_classes=8).val
    labels = json.loads((files("timm.data") / "_info" / "imagenet_real_labels.json").read_text())
    metrics = report_metrics(scores_of(torch.eye(8)[list(val.labels)] * 9, np.array(val.labels)), val, .5, "given")
    numbers = [int(f[-13:-5]) - 1 for f in val.files]
    counted = [y in labels[i] for i, y in zip(numbers, val.labels) if labels[i]]
    assert metrics["imagenet_real"]["n"] == len(counted) and metrics["imagenet_real"]["fused"] == np.mean(counted)
    assert set(metrics["imagenet_real"]) == {"visual", "label", "fused", "alpha_0.5", "alpha_0.8", "n"}
    assert "ReaL" in format_table(metrics)
