"""Every fast path against the plain one it replaces: the same numbers, and what it saves. How fast it is, `benchmarks/` says."""
import json
import os
import pickle
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import equal, parameters, spoil_step
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from llb.core.distributed import Runtime
from llb.core.errors import InputError
from llb.data.augment import RandAugment
from llb.data.batches import ImageDataset
from llb.data.image_cache import all_images, build_images, ImageStore, StoredImages
from llb.data.images import scan_folder
from llb.data.preprocessing import Geometry, Preprocessing
from llb.data.splits import load_data
from llb.models.backbone import load_backbone
from llb.models.llb import LLB
from llb.models.loss import batch_totals, LLBLoss
from llb.models.objects import entropy, LatentObjects
from llb.models.token_cache import token_layout
from llb.runs.build import make_backbone, make_model
from llb.runs.config import Config
from llb.runs.folder import check_resumable, read_events
from llb.training.step import TrainStep

HERE = Path(__file__).parent
SMALL = dict(backbone="test_vit", random_backbone=True, image_size=32, num_layers=3, target_layer=3, batch_size=6, num_objects=16)
CPU = Runtime(torch.device("cpu"))


def make_step(dtype=torch.float32, **options):
    "A training step and a batch for it."
    torch.manual_seed(0)
    config = Config.of(**{**SMALL, **options})
    model = make_model(config.model, make_backbone(config.model, 3), 3).to(dtype).train()
    batch = {"image": torch.randn(6, 3, 32, 32, dtype=dtype), "label": torch.arange(6) % 3, "index": torch.arange(6)}
    return TrainStep(model, config, Runtime(torch.device("cpu"), amp=config.run.amp)), batch


def after_steps(step, batch, count=2):
    "Terms of the last of some steps, and the parameters then."
    for number in range(count): terms = step(batch, number, 0.)
    return [terms, *(p.detach() for p in step.model.branch.parameters())]


def far(found, wanted):
    "The largest difference, relative to the largest value."
    return max(float((f - w).detach().abs().max() / w.detach().abs().max().clamp_min(1e-12)) for f, w in zip(found, wanted))


# The step that is compared against is itself the same objective

def test_the_plain_step_of_the_benchmarks_is_ours(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent / "benchmarks"))
    from plain import PlainLLB
    torch.manual_seed(0)
    ours = LLB(load_backbone("vit_tiny_patch16_224", pretrained=False, num_classes=7, image_size=32), num_objects=24, num_layers=3, target_layer=11)
    plain = PlainLLB(dim=192, heads=3, image=32, classes=7, objects=24, layers=3)
    names = {"token": "vit.cls_token", "positions": "vit.pos_embed", "patches": "vit.patch_embed.proj", "norm": "vit.norm", "head": "vit.head"}
    theirs = {f"vit.{k}": v for k, v in ours.backbone.vit.state_dict().items()} | {f"ours.{k}": v for k, v in ours.branch.state_dict().items()}
    def source(key):
        key = key.replace("fc1", "mlp.fc1").replace("fc2", "mlp.fc2").replace("qkv", "attn.qkv")
        part, _, rest = key.partition(".")
        if part in names: return f"{names[part]}.{rest}".rstrip(".")
        key = key.replace(".proj", ".attn.proj")
        if part == "vit": return f"vit.blocks.{rest.replace('.proj', '.attn.proj')}"
        return "ours." + key.replace("assign", "objects.assign").replace("embeddings", "objects.embeddings").replace("label_token", "cls_token").replace(
            "label_norm", "norm").replace("label_head", "classifier")
    plain.load_state_dict({k: theirs[source(k)] for k in plain.state_dict()})
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    found, wanted = plain(images, labels), LLBLoss()(ours.train()(images), labels)
    assert torch.allclose(found["loss"], wanted.loss, rtol=1e-5) and torch.allclose(found["visual_logits"], ours.eval()(images).visual_logits, atol=1e-5)
    found["loss"].backward()
    wanted.loss.backward()
    gradients = {k: p.grad for k, p in plain.named_parameters() if p.requires_grad}
    assert len(gradients) == len(list(ours.branch.parameters()))
    theirs = {f"ours.{k}": p.grad for k, p in ours.branch.named_parameters()}
    for k, g in gradients.items(): assert far([g], [theirs[source(k)]]) < 1e-4, k


# Objects in chunks

@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("objects", [40, 5000])
def test_training_without_kept_assignments_gives_the_same_parameters(objects, micro, monkeypatch):
    results = []
    for limit in 10**9, 1:
        monkeypatch.setattr("llb.training.step.COMPACT", limit)
        step, batch = make_step(num_objects=objects, opt="SGD", lr=.1, micro_batches=micro)
        assert step.model.branch.compact == (limit == 1)
        results.append(after_steps(step, batch))
    assert far(results[1], results[0]) < 1e-5


def test_from_4096_objects_on_assignments_are_not_kept():
    assert [make_step(num_objects=k)[0].model.branch.compact for k in (2048, 4096)] == [False, True]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("temperature", [.02, .1, 2.])
def test_chunks_agree_with_the_plain_path(temperature, amp, monkeypatch):
    "Values and gradients to 1e-5; with bf16 autocast to bf16's rounding, of which each path has its own."
    monkeypatch.setattr("llb.models.objects.CHUNK", 3 * 9 * 300)
    torch.manual_seed(0)
    objects, x, probe = LatentObjects(24, 300, temperature), torch.randn(8, 9, 24, requires_grad=True), torch.randn(8, 9, 24)
    def run(decouple):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp): z, mean, h = decouple(x)
        loss = (z.float() * probe).sum() + entropy(mean.mean(0)) + (mean ** 2).sum()
        return [z.float(), mean, h, *torch.autograd.grad(loss, [x, *objects.parameters()])], z.dtype
    def plain(x):
        z, a = objects(x)
        return z, a.mean(1), entropy(a.detach())
    (wanted, kind), (found, same_kind) = run(plain), run(objects.compact)
    assert kind == same_kind == (torch.bfloat16 if amp else torch.float32)
    assert far(found, wanted) < (2e-2 if amp else 1e-5)


class Largest(TorchDispatchMode):
    "Remembers the most elements that a tensor had."
    elements = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor): self.elements = max(self.elements, t.numel())
        return out


def test_no_tensor_is_as_large_as_the_assignments(monkeypatch):
    monkeypatch.setattr("llb.models.objects.CHUNK", 2 * 49 * 1000)
    objects, x = LatentObjects(8, 1000), torch.randn(16, 49, 8, requires_grad=True)
    sizes = []
    for compact in True, False:
        with Largest() as seen:
            if compact: z, mean, _ = objects.compact(x)
            else: z, mean = (lambda z, a: (z, a.mean(1)))(*objects(x))
            (z.sum() + mean.square().sum()).backward()
        sizes.append(seen.elements)
    assert sizes == [2 * 49 * 1000, 16 * 49 * 1000]


PEAK = """
import sys, torch
from llb.models.objects import LatentObjects
torch.manual_seed(0)
objects, x = LatentObjects(64, 32768), torch.randn(12, 196, 64, requires_grad=True)
# in MB; not ru_maxrss, which begins with the peak of the process that started this one
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
base = peak()
if sys.argv[1] == "plain": z, a = objects(x); mean = a.mean(1)
else: z, mean, _ = objects.compact(x)
(z.sum() + mean.square().sum()).backward()
print(peak() - base)
"""


@pytest.mark.slow
def test_peak_memory_with_32768_objects():
    "The assignments alone are 308 MB here; the plain path holds several of that size at once."
    plain, compact = (float(subprocess.run([sys.executable, "-c", PEAK, how], capture_output=True, text=True, check=True).stdout) for how in ("plain", "compact"))
    assert plain > 2.5 * 308 and compact < 308 and compact < plain / 3, (plain, compact)


# No waiting in the step

class Syncs(TorchDispatchMode):
    "Counts the reads of a number by the host."
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [dict(), dict(micro_batches=3), dict(num_objects=5000), dict(opt="SGD", clip_grad=None), dict(amp=True)], ids=str)
def test_the_step_reads_no_number_back(options):
    step, batch = make_step(**options)
    with Syncs() as seen: step(batch, 0, 0.)
    assert seen.count == 0
    with Syncs() as seen: step.refused()
    assert seen.count == 1   # there, on purpose


def test_the_count_of_images_stays_on_the_device():
    totals = batch_totals([torch.ones(2, 3, 4) / 4, torch.ones(3, 4) / 4])
    assert isinstance(totals.num_images, torch.Tensor) and totals.num_images == 5 and torch.allclose(totals.mean_assignment, torch.full((4,), .25))


def test_after_a_gradient_that_is_not_finite_nothing_changes():
    step, batch = make_step()
    step(batch, 0, 0.)
    before = [p.detach().clone() for p in step.model.branch.parameters()]
    spoiled = {**batch, "image": batch["image"] * float("nan"), "index": batch["index"] + 10}
    assert step(spoiled, 1, 0.).eq(0).all() and step(batch, 2, 0.).eq(0).all()
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.branch.parameters()))
    number, sentence = step.refused()
    assert number == 1 and "step 2 is not finite" in sentence and str([10, 11, 12, 13, 14, 15]) in sentence


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

@pytest.mark.slow
def test_compiled_steps_are_the_same_and_names_stay():
    steps = [make_step(opt="SGD", lr=.1, compile=c, drop_path=0.) for c in (False, True)]
    names = [list(s.model.state_dict()) for s, _ in steps]
    assert names[0] == names[1]
    plain, compiled = (after_steps(*s) for s in steps)
    assert far(compiled, plain) < 1e-4
    from torch._dynamo.utils import counters
    assert counters["stats"]["unique_graphs"] > 0   # it was compiled


def test_a_missing_compiler_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="no-such-compiler"): make_step(compile=True)


def test_a_backbone_in_bf16_keeps_its_name_and_can_be_saved(tmp_path):
    config = Config.of(**SMALL, backbone_dtype="bfloat16")
    backbone = make_backbone(config.model, 3)
    assert backbone.dtype == torch.bfloat16
    model = make_model(config.model, backbone, 3).eval()
    batch = torch.randn(4, 3, 32, 32)
    out = model(batch)
    model.save_pretrained(tmp_path)
    again = LLB.from_pretrained(tmp_path)
    assert again.backbone.content_hash() == backbone.content_hash() and again.backbone.dtype == torch.float32
    assert far([out.label_logits, out.visual_logits.float()], [(w := again(batch)).label_logits, w.visual_logits]) < .1
    assert torch.equal(again.backbone.vit.blocks[0].mlp.fc1.weight, backbone.vit.blocks[0].mlp.fc1.weight.float())
    save_file(again.backbone.vit.state_dict(), tmp_path / "t.safetensors")   # a backbone that a file has keeps the name of that file's weights
    plain, half = (load_backbone("test_vit", tmp_path / "t.safetensors", image_size=32) for _ in range(2))
    assert half.to_bfloat16().content_hash() == plain.content_hash()
    images = load_data(make_images(tmp_path / "p")).val
    assert token_layout(half, 3, images) != token_layout(plain, 3, images)   # but not its features


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
    return make_model(config.model, make_backbone(config.model, 3), 3), load_data(images)


def test_a_run_of_before_these_options_can_be_resumed(images):
    data, config = load_data(images), Config.of(**SMALL)
    new = ("compile", "backbone_dtype", "cache_views", "cache_images")
    saved = {"config": {k: v for k, v in json.loads(json.dumps(config.to_dict())).items() if k not in new}, "classes": list(data.classes),
             "images": data.train.fingerprint(sizes=False), "fingerprint": data.train.fingerprint()}
    check_resumable(saved, config, data)
    check_resumable(saved, config.but(cache_images=True), data)
    for change in dict(compile=True), dict(backbone_dtype="bfloat16"):
        with pytest.raises(InputError, match=next(iter(change))): check_resumable(saved, config.but(**change), data)
