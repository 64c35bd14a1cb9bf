"""What is computed once and kept: a store gives back what was put into it, or says what is wrong.

A key knows all that the content depends on. What comes from a cache is what comes without it.
"""
import multiprocessing
import os
import pickle
import shutil
import time
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image
from torchvision.transforms import v2

from llb.core.arrays import ArrayStore, build_store, open_store
from llb.core.distributed import Runtime
from llb.core.errors import InputError
from llb.core.files import atomic
from llb.data.augment import RandAugment
from llb.data.batches import EvalBatches, ImageDataset, make_loader
from llb.data.image_cache import all_images, build_images, StoredImages
from llb.data.images import scan_folder
from llb.data.preprocessing import Geometry, Preprocessing
from llb.data.splits import load_data
from llb.models.backbone import load_backbone
from llb.models.token_cache import build_tokens, TokenDataset
from llb.runs.config import Config
from llb.runs.folder import read_events

COLUMNS = {"label": ("int64", ()), "image": ("uint8", (3, 50, 31))}
ROWS = 12


def rows_of(rows):
    "The true content of some rows."
    images = [np.random.default_rng(row).integers(0, 256, (3, 50, 31), dtype=np.uint8) for row in rows]
    return {"label": np.array(list(rows)), "image": np.stack(images)}


def opened(folder, **about): return open_store(folder, {"seed": 0, **about}, COLUMNS, ROWS, "example")


@pytest.fixture
def store(tmp_path):
    "A whole store."
    store = opened(tmp_path)
    store.put(range(ROWS), **rows_of(range(ROWS)))
    store.flush()
    return store


def same(store, rows=range(ROWS)):
    "Whether some rows hold what they must."
    for row in rows:
        found, wanted = store.get(row), rows_of([row])
        if not all(np.array_equal(found[name], wanted[name][0]) for name in COLUMNS): return False
    return True


def change(path, place, change):
    "Change the bytes of a file from `place` on."
    content = bytearray(path.read_bytes())
    found = content[place:place + 64]
    content[place:place + 64] = change(bytes(found))
    path.write_bytes(content)


def test_a_store_gives_back_what_was_put(store, tmp_path):
    assert same(store) and same(pickle.loads(pickle.dumps(store))) and len(pickle.dumps(store)) < 500
    assert np.array_equal(store["image"], rows_of(range(ROWS))["image"]) and not store["image"].flags.writeable
    assert opened(tmp_path).folder == store.folder != opened(tmp_path, seed=1).folder
    assert not len(opened(tmp_path).missing())
    with pytest.raises(InputError, match="no column 'nope'; there are label, image"): store["nope"]


ROW = 3 * 50 * 31
DAMAGES = {
    "bit": lambda f: change(f / "image.bin", 4 * ROW + 999, lambda b: bytes([b[0] ^ 128]) + b[1:]),
    "zeros": lambda f: change(f / "image.bin", 4 * ROW, lambda b: bytes(64)),
    "other order": lambda f: change(f / "image.bin", 4 * ROW, lambda b: b[8:16] + b[:8] + b[16:]),
    "another row": lambda f: change(f / "label.bin", 4 * 8, lambda b: b[8:16] + b[8:]),
    "check": lambda f: change(f / "checks.bin", 4 * 8, lambda b: bytes([b[0] ^ 1]) + b[1:]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_row_is_refused_and_made_anew(damage, store, tmp_path):
    "With all others that are damaged."
    change(store.folder / "image.bin", 7 * ROW + 5, lambda b: b[1:] + b[:1])
    DAMAGES[damage](store.folder)
    with pytest.raises(InputError, match="Row 4 of the example .* damaged; start again"): store.get(4)
    again = opened(tmp_path)
    assert again.missing().tolist() == [4, 7] and same(again, [0, 1, 2, 3, 5, 6, 8, 9, 10, 11])
    again.put([4, 7], **rows_of([4, 7]))
    assert same(opened(tmp_path)) and not (store.folder / "damaged").exists()


def test_files_of_zeros_are_missing_rows(store, tmp_path):
    "What a power cut can leave of files that were renamed before they were on the disk."
    for name in "image.bin", "label.bin", "checks.bin":
        path = store.folder / name
        path.write_bytes(bytes(path.stat().st_size))
    assert opened(tmp_path).missing().tolist() == list(range(ROWS))


TRUNCATED = [("image.bin", 5), ("label.bin", 5), ("checks.bin", 5), ("image.bin", 0), ("about.json", ROWS)]


@pytest.mark.parametrize("name, kept", TRUNCATED)
def test_truncated_files_are_mended_at_the_next_start(name, kept, store, tmp_path):
    path = store.folder / name
    os.truncate(path, path.stat().st_size * kept // ROWS if kept < ROWS else 9)
    again = opened(tmp_path)
    assert again.missing().tolist() == list(range(kept, ROWS)) and same(again, range(kept))


def test_a_store_truncated_while_it_is_read_ends_nothing(store):
    os.truncate(store.folder / "image.bin", 6 * ROW)
    assert same(store, range(6))
    with pytest.raises(InputError, match="Row 6 of the example"): store.get(6)


def test_a_missing_file_or_store(store, tmp_path):
    (store.folder / "image.bin").unlink()
    assert opened(tmp_path).missing().tolist() == list(range(ROWS))
    with pytest.raises(InputError, match="no stored arrays"): pickle.loads(pickle.dumps(store)).__class__(tmp_path)


def test_a_disk_without_room(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("llb.core.arrays.shutil.disk_usage", lambda path: usage(0, 0, 4096))
    words = "The example cannot be kept in .* needs .* GB more, but .* are free. Set LLB_CACHE"
    with pytest.raises(InputError, match=words): opened(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="The example cannot be kept in .*: Not a directory"): opened(tmp_path / "file")


def test_room_is_reserved(tmp_path):
    file = opened(tmp_path).folder / "image.bin"
    assert file.stat().st_blocks * 512 >= file.stat().st_size == ROWS * ROW


def test_building_goes_on_with_whole_batches(tmp_path):
    "A batch that was torn is computed again as a whole: numbers don't depend on where it was interrupted."
    done = []
    def fill(store, batches):
        for rows in batches:
            if len(done) == 2: raise KeyboardInterrupt
            store.put(rows, **rows_of(rows))
            done.append(list(rows))
    with pytest.raises(KeyboardInterrupt): build_store(lambda: opened(tmp_path), fill, 5)
    store = opened(tmp_path)
    assert store.missing().tolist() == [10, 11]
    DAMAGES["check"](store.folder)
    with pytest.raises(InputError): store.get(4)
    done.clear()
    assert same(build_store(lambda: opened(tmp_path), fill, 5)) and done == [[0, 1, 2, 3, 4], [10, 11]]


def write(folder, first):
    store = ArrayStore(folder)
    for row in range(first, ROWS, 3):
        store.put([row], **rows_of([row]))
        time.sleep(.01)
    store.flush()


def test_processes_write_rows_of_their_own(tmp_path):
    context, folder = multiprocessing.get_context("fork"), opened(tmp_path).folder
    writers = [context.Process(target=write, args=(folder, first)) for first in range(3)]
    for writer in writers: writer.start()
    for writer in writers: writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0] and same(opened(tmp_path))


# Files that appear at once

def test_atomic_leaves_the_old_or_the_new(tmp_path):
    file, folder = tmp_path / "a.txt", tmp_path / "sub"
    for text in "old", "new":
        with atomic(file) as made: made.write_text(text)
        with atomic(folder, folder=True) as made: (made / text).write_text(text)
    for path, is_folder in (file, False), (folder, True):
        with pytest.raises(KeyboardInterrupt), atomic(path, is_folder) as made:
            (made / "torn" if is_folder else made).write_text("torn")
            raise KeyboardInterrupt
    assert file.read_text() == "new" and [p.name for p in folder.iterdir()] == ["new"]
    assert sorted(tmp_path.iterdir()) == [file, folder]


# Images and tokens

CPU = Runtime(torch.device("cpu"))
SQUARE = Preprocessing((32, 32), (.5, .4, .3), (.2, .3, .4), "bilinear", .875)
WIDE = Preprocessing((28, 42), (.5,) * 3, (.5,) * 3)


@pytest.fixture
def jpegs(tmp_path):
    "Images of many sizes, large ones too."
    folder = make_images(tmp_path / "jpegs", 4)
    for i, size in enumerate([(90, 64), (64, 200), (300, 260)]):
        noise = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "circle" / f"large{i}.jpg")
    return folder


@pytest.mark.parametrize("preprocessing", [SQUARE, WIDE], ids=["square", "rectangle"])
def test_stored_images_are_the_plain_ones(preprocessing, jpegs, tmp_path):
    images = scan_folder(jpegs)
    store = build_images(images, preprocessing, tmp_path / "store", workers=2)
    keys = [(e, i) for e in (0, 5) for i in range(len(images))]
    for train in False, True:
        plain = ImageDataset(images, preprocessing.transform(train), 3)
        wanted = torch.stack([plain[k]["image"] for k in keys])
        for source in store, Geometry(preprocessing):
            bytewise = StoredImages(images, source, RandAugment() if train else None, 3)
            batch = torch.stack([bytewise[k]["image"] for k in keys])
            assert batch.dtype == torch.uint8 and torch.equal(preprocessing.normalise(batch), wanted)
            assert all(bytewise[k][name] == plain[k][name] for k in keys for name in ("label", "index"))


def test_a_split_finds_its_rows(jpegs, tmp_path):
    images = scan_folder(jpegs)
    store = build_images(images, SQUARE, tmp_path / "store")
    split = pickle.loads(pickle.dumps(StoredImages(images.take([7, 2]), store)))   # as a spawned worker gets it
    assert np.array_equal(split[0, 0]["image"], store.get(7)) and np.array_equal(split[0, 1]["image"], store.get(2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_a_sentence(workers, images, tmp_path):
    "Also from a loader worker."
    some = scan_folder(images)
    store = build_images(some, SQUARE, tmp_path)
    change(store.arrays.folder / "image.bin", 0, lambda b: bytes([b[0] ^ 255]) + b[1:])
    loader = make_loader(StoredImages(some, store), EvalBatches(len(some), 4), workers)
    words = r"^Row 0 of the image cache \(--cache_images\) in .* made anew\.$"
    with pytest.raises(InputError, match=words): list(loader)


def test_splits_of_any_seed_share_a_cache(images):
    a, b = (all_images(load_data(images, seed=s)) for s in (0, 1))
    assert a.files == b.files and a.content_key == b.content_key and len(a) == 60


def test_each_file_is_looked_up_once(images, monkeypatch):
    looked_up = []
    stat = type(images).stat
    def counted(path, **options):
        if path.suffix == ".png": looked_up.append(path)
        return stat(path, **options)
    monkeypatch.setattr(type(images), "stat", counted)
    data = load_data(images)
    for _ in range(2):
        names = {all_images(data).content_key, *(split.fingerprint() for split in vars(data).values())}
    assert len(names) == 4 and len(looked_up) == len(set(looked_up)) == 60


def edited_in_place(tmp_path):
    "Another image in the same file: name and number of bytes stay."
    path = tmp_path / "images/circle/00.bmp"
    size = path.stat().st_size
    Image.new("RGB", (40, 40), "white").save(path)
    assert path.stat().st_size == size
    return path.parents[1]


def another_folder(tmp_path):
    "With files of equal names and sizes."
    shutil.copytree(tmp_path / "images", tmp_path / "others")
    Image.new("RGB", (40, 40), "white").save(tmp_path / "others/circle/00.bmp")
    for path in (tmp_path / "images").rglob("*.bmp"):   # and of equal times
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        os.utime(tmp_path / "others" / path.relative_to(tmp_path / "images"), ns=times)
    return tmp_path / "others"


def renamed(tmp_path):
    (tmp_path / "images/circle/00.bmp").rename(tmp_path / "images/circle/0.bmp")
    return tmp_path / "images"


# Each option, and whether it changes pixels as bytes (and then tokens, too) or tokens alone.
OPTIONS = {
    "interpolation": (dict(interpolation="bilinear"), True),
    "crop": (dict(crop_pct=.8), True),
    "size": (dict(image_size=(48, 48)), True),
    "mean": (dict(mean=(.1, .2, .3)), False),
    "std": (dict(std=(.1, .2, .3)), False),
    "folder": (dict(folder=another_folder), True),
    "edited": (dict(folder=edited_in_place), True),
    "renamed": (dict(folder=renamed), True),
    "fewer": (dict(files=5), True),
    "backbone": (dict(backbone_seed=1), False),
    "classes": (dict(num_classes=7), False),
    "layer": (dict(layer=2), False),
    "dtype": (dict(bf16=True), False),
    "amp": (dict(amp=True), False),
    "views": (dict(views=1), False),
    "more views": (dict(views=2), False),
    "seed": (dict(views=1, seed=1), False),
    "augmentation": (dict(views=1, augment=RandAugment(3, 5)), False),
}
PREPROCESSING = {"interpolation", "crop_pct", "image_size", "mean", "std"}


def caches(tmp_path, folder=None, files=6, backbone_seed=0, num_classes=0, layer=3, bf16=False, amp=False, views=0,
           seed=0, augment=None, **preprocessing):
    "Both caches of some images, built with some options."
    images = scan_folder(folder(tmp_path) if folder else tmp_path / "images").take(range(files))
    torch.manual_seed(backbone_seed)
    size = preprocessing.get("image_size", (32, 32))
    backbone = load_backbone("test_vit", pretrained=False, image_size=size, num_classes=num_classes)
    backbone.preprocessing = replace(backbone.preprocessing, **{"crop_pct": .9, **preprocessing})
    if bf16: backbone.to_bfloat16()
    stored = build_images(images, backbone.preprocessing, tmp_path / "cache")
    dataset = StoredImages(images, stored, (augment or RandAugment()) if views else None, seed)
    runtime = replace(CPU, amp=amp)
    folder = tmp_path / "cache"
    return stored, build_tokens(backbone, layer, images, runtime, folder, dataset=dataset, views=views, seed=seed)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_that_changes_pixels_or_tokens_changes_every_key(option, tmp_path):
    for name, colour in ("circle", "red"), ("square", "blue"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 40), colour).save(tmp_path / "images" / name / f"{i:02}.bmp")
    changes, changes_pixels = OPTIONS[option]
    base = caches(tmp_path, views=1) if option in ("more views", "seed", "augmentation") else caches(tmp_path)
    other = caches(tmp_path, **changes)
    pixels, tokens = (a.arrays.folder != b.arrays.folder for a, b in zip(base, other))
    assert tokens and pixels == changes_pixels
    if folder := changes.get("folder"):
        if folder is not renamed: assert not np.array_equal(base[0].get(0), other[0].get(0))


def test_an_option_that_changes_nothing_finds_the_cache(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    base = caches(tmp_path)
    for changes in dict(seed=3), dict(augment=RandAugment(1, 1)), {}:
        again = caches(tmp_path, **changes)
        assert [c.arrays.folder for c in again] == [c.arrays.folder for c in base]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_tokens_do_not_depend_on_an_interruption(images, tmp_path, monkeypatch):
    shutil.copytree(images, tmp_path / "images")
    whole = caches(tmp_path, files=50)[1]
    wanted = [whole.get(row) for row in range(50)]
    for name in "tokens.bin", "visual.bin":
        path = whole.arrays.folder / name
        os.truncate(path, path.stat().st_size * 35 // 50)
    again = caches(tmp_path, files=50)[1]
    assert all(torch.equal(again.get(row)[name], wanted[row][name]) for row in range(50) for name in wanted[0])


def test_tokens_keep_their_type_and_go_with_their_image(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    listed = scan_folder(tmp_path / "images").take(range(6))
    dataset = TokenDataset(caches(tmp_path, views=2)[1], listed)
    one, later = dataset[0, 4], dataset[2, 4]
    assert one["tokens"].dtype == torch.bfloat16 and one["visual_features"].dtype == torch.float32
    assert (one["index"], one["label"]) == (4, listed.labels[4]) and torch.equal(one["tokens"], later["tokens"])
    assert not torch.equal(one["tokens"], dataset[1, 4]["tokens"])


@pytest.mark.parametrize("size", [(32, 32), (30, 45), (224, 224)])
def test_augmentation_is_torchvisions(size):
    rng, reference = np.random.default_rng(0), v2.RandAugment(num_ops=3, magnitude=9)
    for seed in range(40):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size[::-1], Image.BICUBIC)
        planes = np.ascontiguousarray(np.asarray(coarse).transpose(2, 0, 1))
        before = planes.copy()
        torch.manual_seed(seed)
        wanted = np.asarray(reference(coarse)).transpose(2, 0, 1)
        assert np.array_equal(RandAugment()(planes, torch.Generator().manual_seed(seed)), wanted), seed
        assert np.array_equal(planes, before)


# Runs

def set_cache(path): os.environ["LLB_CACHE"] = path


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_on_stored_images_is_the_same_run(processes, images, tmp_path, forked):
    "Bit by bit; the second finds the cache."
    cache = tmp_path / "cache"
    options = dict(data_dir=images, save_dir=tmp_path, augment="randaugment", batch_size=8 // processes, workers=1)
    for name in "plain", "stored", "again":
        run = forked(processes, name=name, patch=(set_cache, str(cache)), cache_images=name != "plain", **options)
        assert run.finish(180) == [0] * processes, run.text
        assert ("Building the image cache (--cache_images): 60 of 60 rows" in run.text) == (name == "stored")
        epochs = read_events(tmp_path / name, "epoch")
        assert len(epochs) == 3 and all(0 <= e["data_wait"] <= 1 for e in epochs)
        assert run.text.count("waiting for data") == 3
        for file in "model/model.safetensors", "metrics.json":
            assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / name / file).read_bytes(), (name, file)
    assert len(list((cache / "images").iterdir())) == 1


@pytest.mark.slow
def test_augmented_views_from_the_cache(images, tmp_path, forked):
    options = dict(augment="randaugment", cache=True, cache_views=2, cache_images=True)
    run = forked(data_dir=images, save_dir=tmp_path, patch=(set_cache, str(tmp_path / "cache")), **options)
    assert run.finish(120) == [0], run.text
    assert "Building the token cache (--cache, train features): 84 of 84 rows" in run.text   # 42 images
    with pytest.raises(InputError, match="cache_views"): Config.of(cache_views=2)
    with pytest.raises(InputError, match="cache_views"): Config.of(cache_views=2, cache=True, augment="none")
