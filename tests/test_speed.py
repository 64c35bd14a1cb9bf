"""Every fast path against the plain one it replaces: the same numbers, and what it saves. How fast it is, `benchmarks/` says."""
import json
import os
import pickle
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import equal, parameters, spoil_step
from torchvision.transforms import v2

from llb.core.distributed import Runtime
from llb.core.errors import InputError
from llb.data.augment import RandAugment
from llb.data.batches import ImageDataset
from llb.data.image_cache import all_images, build_images, StoredImages, ImageStore
from llb.data.images import scan_folder
from llb.data.preprocessing import Geometry, Preprocessing
from llb.data.splits import load_data
from llb.models.backbone import load_backbone
from llb.runs.build import make_backbone, make_model
from llb.runs.config import Config
from llb.runs.folder import read_events
from llb.training.trainer import check_resumable

HERE = Path(__file__).parent
SMALL = dict(backbone="test_vit", random_backbone=True, image_size=32, num_layers=3, target_layer=3, batch_size=6, num_objects=16)
CPU = Runtime(torch.device("cpu"))


@pytest.mark.slow
def test_a_run_that_looks_rarely_stops_at_the_same_step(images, tmp_path, forked):
    "The host learns of it up to `log_every` steps later; step, state and sentence are the same."
    states, errors = [], []
    for log_every in 1, 5:
        run = forked(data_dir=images, save_dir=tmp_path, name=f"every{log_every}", log_every=log_every, augment="randaugment", patch=(spoil_step, 3))
        assert run.finish(120) == [1], run.text
        folder = tmp_path / f"every{log_every}"
        assert read_events(folder)[-1]["step"] == 3
        states.append(load_file(folder / "checkpoints/step-00000003/state.safetensors"))
        errors += [line for line in run.text.splitlines() if line.startswith("error")]
    assert equal(*states) and len(errors) == 2 and errors[0] == errors[1]


# Augmentation and stored pixels

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


@pytest.fixture
def jpegs(tmp_path):
    "Images of many sizes, large ones too."
    folder = make_images(tmp_path / "jpegs", 4)
    for i, size in enumerate([(90, 64), (64, 200), (300, 260)]):
        make = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(make).resize(size).save(folder / "circle" / f"large{i}.jpg")
    return folder


SIZES = [Preprocessing((32, 32), (.5, .4, .3), (.2, .3, .4), "bilinear", .875), Preprocessing((28, 42), (.5,) * 3, (.5,) * 3)]


@pytest.mark.parametrize("preprocessing", SIZES, ids=["square", "rectangle"])
def test_stored_pixels_are_the_plain_ones(preprocessing, jpegs, tmp_path):
    images = scan_folder(jpegs)
    store = build_images(images, preprocessing, CPU, tmp_path / "store", workers=2)
    keys = [(e, i) for e in (0, 5) for i in range(len(images))]
    for train in False, True:
        plain = ImageDataset(images, preprocessing.transform(train), 3)
        for source in store, Geometry(preprocessing):
            bytewise = StoredImages(images, source, RandAugment() if train else None, 3)
            batch = torch.stack([bytewise[k]["image"] for k in keys])
            assert batch.dtype == torch.uint8 and torch.equal(preprocessing.normalise(batch), torch.stack([plain[k]["image"] for k in keys]))
            assert all(bytewise[k]["label"] == plain[k]["label"] and bytewise[k]["index"] == plain[k]["index"] for k in keys)
    part = StoredImages(images.take([7, 2]), store)   # a split finds its rows
    assert np.array_equal(part[0, 0]["image"], store.get(7)) and np.array_equal(part[0, 1]["image"], store.get(2))
    assert len(pickle.dumps(store)) < 2000 and np.array_equal(pickle.loads(pickle.dumps(store)).get(2), store.get(2))


def test_a_store_is_for_these_images_and_this_geometry(jpegs, tmp_path):
    images, folder = scan_folder(jpegs), tmp_path / "store"
    first = build_images(images, SIZES[0], CPU, folder)
    again = build_images(images, SIZES[0], CPU, folder)
    assert again.folder == first.folder
    others = [build_images(images, SIZES[1], CPU, folder), build_images(images.take(range(5)), SIZES[0], CPU, folder)]
    assert len({s.folder for s in (first, *others)}) == 3
    (jpegs / "circle/00.png").write_bytes((jpegs / "circle/01.png").read_bytes())
    assert build_images(scan_folder(jpegs), SIZES[0], CPU, folder).folder != first.folder


def test_splits_of_any_seed_share_a_store(images):
    a, b = (all_images(load_data(images, seed=s)) for s in (0, 1))
    assert a.files == b.files and a.fingerprint() == b.fingerprint() and len(a) == 60


def test_building_goes_on_where_it_was_left(jpegs, tmp_path, monkeypatch):
    images, calls = scan_folder(jpegs), []
    put = ImageStore.put
    def dying(self, row, image):
        if len(calls) == 6: raise KeyboardInterrupt
        calls.append(row)
        put(self, row, image)
    monkeypatch.setattr(ImageStore, "put", dying)
    with pytest.raises(KeyboardInterrupt): build_images(images, SIZES[0], CPU, tmp_path)
    first = list(calls)
    monkeypatch.setattr(ImageStore, "put", lambda self, row, image: (calls.append(row), put(self, row, image)))
    store = build_images(images, SIZES[0], CPU, tmp_path)
    assert sorted(calls) == list(range(len(images))) and len(first) == 6 and not len(store.missing())
    for row in range(len(images)): assert np.array_equal(store.get(row), Geometry(SIZES[0])(images.open(row)))


@pytest.mark.parametrize("damage", ["bit", "zeros", "swap", "check"])
def test_a_damaged_record_is_noticed_and_made_anew(damage, jpegs, tmp_path):
    images = scan_folder(jpegs)
    store = build_images(images, SIZES[0], CPU, tmp_path)
    whole = [store.get(i) for i in range(len(images))]
    if damage == "bit": store.pixels[4, 3071] ^= 128
    if damage == "zeros": store.pixels[4] = 0
    if damage == "swap": store.pixels[4] = store.pixels[5]; store.checks[4] = store.checks[5]
    if damage == "check": store.checks[4] += np.uint64(1)
    with pytest.raises(InputError, match="Image 4 of the pixel store .* is damaged"): store.get(4)
    assert store.missing().tolist() == [4]
    again = build_images(images, SIZES[0], CPU, tmp_path)
    assert all(np.array_equal(again.get(i), w) for i, w in enumerate(whole))


def test_a_disk_that_is_too_small_is_refused(jpegs, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("llb.data.image_cache.shutil.disk_usage", lambda path: usage(0, 0, 4096))
    with pytest.raises(InputError, match="needs .* GB more in .*; set LLB_CACHE .* without --cache_images"): build_images(scan_folder(jpegs), SIZES[0], CPU, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_on_stored_pixels_is_the_same_run(processes, images, tmp_path, forked):
    "Bit by bit, also when it is killed and resumed without the store."
    os.environ["LLB_CACHE"] = str(tmp_path / "cache")
    try:
        options = dict(data_dir=images, save_dir=tmp_path, augment="randaugment", batch_size=8 // processes, workers=1)
        runs = {"plain": dict(), "stored": dict(cache_images=True), "again": dict(cache_images=True, seed=0)}
        for name, more in runs.items():
            run = forked(processes, name=name, patch=(set_cache, str(tmp_path / "cache")), **options, **more)
            assert run.finish(180) == [0] * processes, run.text
            assert ("Pixel store: 60 images of 32 x 32" in run.text) == bool(more)
            epochs = read_events(tmp_path / name, "epoch")
            assert len(epochs) == 3 and all(0 <= e["data_wait"] <= 1 for e in epochs) and run.text.count("waiting for data") == 3
            assert equal(parameters(tmp_path / "plain"), parameters(tmp_path / name)), name
            assert (tmp_path / "plain/metrics.json").read_text() == (tmp_path / name / "metrics.json").read_text()
        assert len(list((tmp_path / "cache/pixels").iterdir())) == 1
    finally: del os.environ["LLB_CACHE"]


def set_cache(path): os.environ["LLB_CACHE"] = path


@pytest.mark.slow
def test_augmented_views_from_the_cache(images, tmp_path, forked):
    run = forked(data_dir=images, save_dir=tmp_path, augment="randaugment", cache=True, cache_views=2, cache_images=True,
                 patch=(set_cache, str(tmp_path / "cache")))
    assert run.finish(120) == [0], run.text
    assert "train features: 42 images, 2 views each" in run.text
    with pytest.raises(InputError, match="cache_views"): Config.of(cache_views=2)
    with pytest.raises(InputError, match="cache_views"): Config.of(cache_views=2, cache=True, augment="none")


# Compiled, in bf16, in shares

@pytest.fixture
def backbone_file(tmp_path):
    torch.manual_seed(0)
    save_file(load_backbone("test_vit", pretrained=False, image_size=32, num_classes=3).vit.state_dict(), tmp_path / "backbone.safetensors")
    return tmp_path / "backbone.safetensors"


def say_share():
    "In the training process: what it holds of the backbone when training starts."
    from llb.training.trainer import Trainer
    fit = Trainer.fit
    def wrapped(self):
        local = sum(getattr(p, "_local_tensor", p).numel() for p in self.model.backbone.vit.parameters())
        print(f"SHARE {local / sum(p.numel() for p in self.model.backbone.vit.parameters()):.2f}", flush=True)
        return fit(self)
    Trainer.fit = wrapped


def model_and_data(images):
    config = Config.of(**SMALL)
    return make_model(config, make_backbone(config, 3), 3), load_data(images)


def test_a_run_of_before_these_options_can_be_resumed(images):
    data, config = load_data(images), Config.of(**SMALL)
    new = ("compile", "backbone_dtype", "cache_views", "cache_images")
    saved = {"config": {k: v for k, v in json.loads(json.dumps(config.to_dict())).items() if k not in new}, "classes": list(data.classes),
             "images": data.train.fingerprint(sizes=False), "fingerprint": data.train.fingerprint()}
    check_resumable(saved, config, data)
    check_resumable(saved, config.but(cache_images=True), data)
    for change in dict(compile=True), dict(backbone_dtype="bfloat16"):
        with pytest.raises(InputError, match=next(iter(change))): check_resumable(saved, config.but(**change), data)
