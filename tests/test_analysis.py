"""The index against hand-made cases, brute force and scikit-learn; memory that does not grow with the data."""
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from scipy.stats import theilslopes
from sklearn.metrics import mutual_info_score
from torch import nn
from torch.utils.data import Dataset

from llb.analysis.build import build_index, index_run, index_scores, load_run
from llb.analysis.effects import (ablation_effects, area, attribution, build_effects, effects_of_run,
                                  faithfulness, mean_embedding)
from llb.analysis.index import open_effects, open_index
from llb.analysis.similarity import match_objects, moved_pairs, similarity
from llb.analysis.usage import (association, branch_agreement, class_effects, exemplars, images_with, object_table,
                                partners, summarise)
from llb.core.distributed import Runtime
from llb.core.errors import InputError
from llb.data.batches import EvalBatches, ImageDataset, make_loader
from llb.models.backbone import load_backbone
from llb.models.llb import LLB
from llb.models.token_cache import build_tokens, TokenDataset
from llb.runs.build import make_backbone, make_data, make_model
from llb.runs.config import Config
from llb.runs.folder import describe_data, RunReader
from llb.training.metrics import measure

RUNTIME = Runtime(torch.device("cpu"))
H, W, K, C = 3, 4, 6, 14


class Tokens(Dataset):
    """Tokens made from object ids: the backbone's part is skipped, and an identity model reads the ids back."""
    def __init__(self, images, ids, backbone, noise=0.):
        self.images, self.ids, self.backbone, self.noise = images, ids, backbone, noise

    def __len__(self): return len(self.images)

    def __getitem__(self, key):
        i = key[1]
        generator = torch.Generator().manual_seed(i)
        tokens = self.noise * torch.randn(self.backbone.num_prefix + H * W, self.backbone.dim, generator=generator)
        ids = torch.as_tensor(self.ids[i % len(self.ids)])
        tokens[self.backbone.num_prefix + torch.arange(H * W), ids] += 1
        visual = tokens[-1] * 0 + tokens.mean()
        return {"index": i, "label": self.images.labels[i], "tokens": tokens, "visual_features": visual}


class Second(nn.Module):
    """A visual block that leaves the tokens as they are."""
    def forward(self, x): return x


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    backbone = load_backbone("vit_tiny_patch16_224", pretrained=False, image_size=(16 * H, 16 * W), num_classes=0)
    made = LLB(backbone, num_objects=K, num_layers=3, target_layer=9, num_classes=C).eval()
    made.branch.visual_block = Second()
    with torch.no_grad():
        made.branch.objects.assigner.weight.copy_(torch.eye(K, backbone.dim))
    return made


def indexed(model, folder, ids, images, batch=5, noise=.15, **options):
    dataset = Tokens(images, ids, model.backbone, noise)
    loader = make_loader(dataset, EvalBatches(len(images), batch))
    return build_index(model, loader, folder, RUNTIME, **options), dataset


RNG = np.random.default_rng(0)
IDS = RNG.choice(K - 1, (40, H * W), p=[.4, .3, .15, .1, .05])   # the last object is dead


@pytest.fixture(scope="module")
def few(clipart): return clipart.take(range(0, 400, 10))   # 40, one for each row of IDS


@pytest.fixture(scope="module")
def index(model, few, tmp_path_factory):
    return indexed(model, tmp_path_factory.mktemp("run") / "objects" / "val", IDS, few)[0]


def test_counts_are_those_of_loops(index, few):
    labels = np.array(few.labels)
    assert np.array_equal(index.rows["first"][:], IDS) and index.grid == (H, W)
    for k in range(K):
        assert index.patches[k] == (IDS == k).sum() and index.image_counts[k] == (IDS == k).any(1).sum()
        for j in range(K): assert index.together[k, j] == ((IDS == k).any(1) & (IDS == j).any(1)).sum()
        for c in range(C):
            assert index.class_patches[c, k] == (IDS[labels == c] == k).sum()
            assert index.class_images[c, k] == (IDS[labels == c] == k).any(1).sum()
    assert np.array_equal(index.class_count, np.bincount(labels, minlength=C))


def test_pmi_adds_up_to_scikit_learns_mutual_information(index, few):
    pmi, support = association(index, "pmi")
    labels = np.repeat(few.labels, H * W)
    assert np.isclose(np.nansum(support / support.sum() * pmi), mutual_info_score(labels, IDS.ravel()))
    lift, images = association(index, unit="images")
    k, c = 0, few.labels[0]
    has = (IDS == k).any(1)
    assert np.isclose(lift[c, k], has[np.array(few.labels) == c].mean() / has.mean()) and np.isnan(lift[0, K - 1])
    assert images[c, k] == has[np.array(few.labels) == c].sum()


def test_summary_and_table(index, few):
    summary, table = summarise(index), object_table(index)
    p = np.bincount(IDS.ravel(), minlength=K) / IDS.size
    live = p[p > 0]
    assert np.isclose(summary["hard_perplexity"], np.exp(-(live * np.log(live)).sum()))
    assert summary["dead"] == 1 and summary["live"] == K - 1 and summary["patches"] == IDS.size
    assert summary["information"] > 0
    assert np.isclose(summary["information"], summary["entropy"] - summary["patch_entropy"])
    assert table["dead"].tolist() == [False] * 5 + [True] and np.isnan(table["class_entropy"][-1])
    assert np.array_equal(table["dense"], (np.stack([(IDS == k).any(1).mean() for k in range(K)]) > .5))
    counts = np.bincount(np.repeat(few.labels, H * W)[IDS.ravel() == 0], minlength=C)
    fraction = counts[counts > 0] / counts.sum()
    for k in range(K):
        inside = np.array([((IDS == k).sum(1) * (np.array(few.labels) == c)).sum() for c in range(C)])
        c = inside.argmax()
        images = ((IDS == k).any(1) & (np.array(few.labels) == c)).sum()
        assert table["label_specific"][k] == (2 * inside[c] > inside.sum() and images >= 5)
    assert np.isclose(table["class_entropy"][0], -(fraction * np.log(fraction)).sum())
    assert table["top_class"][0] == counts.argmax()
    ids, lift, both = partners(index, 0, min_support=1)
    assert 0 not in ids and K - 1 not in ids and (np.diff(lift) <= 0).all()
    assert np.array_equal(both, index.together[0, ids])


def test_galleries_are_capped_ranked_and_true(index):
    for k in range(K - 1):
        for quantile in None, .9, .5:
            found = exemplars(index, k, quantile, 6)
            assert (np.diff(found.score) <= 0).all() and np.unique(found.image, return_counts=True)[1].max() <= 2
            assert (IDS[found.image, found.patch] == k).all() or quantile is None
        own = index.sample.of(k)   # fewer patches than it can hold: the sample is everything, at most two an image
        assert len(own) == np.minimum((IDS == k).sum(1), 2).sum()
        median = exemplars(index, k, .5, 1).score[0]
        assert abs(median - np.median(own.score)) <= np.ptp(own.score) * .1 + 1e-6
    with pytest.raises(InputError, match="no object 99"): exemplars(index, 99)


def test_what_is_read_back_is_what_was_written(index, few):
    again = open_index(index.folder)
    for name in "patches", "mass", "together", "object_label":
        assert np.array_equal(getattr(again, name), getattr(index, name))
    assert np.array_equal(again.top.score, index.top.score)
    assert again.classes == few.classes and again.images.files == few.files
    assert again.image(3).shape == (16 * H, 16 * W, 3)
    with pytest.raises(InputError, match="cannot be decoded"): open_index(index.folder, root="/nowhere").image(0)
    with pytest.raises(InputError, match="no object index"): open_index(index.folder / "nothing")


def test_any_batch_size_gives_the_same_index(model, index, tmp_path, few):
    other, _ = indexed(model, tmp_path / "val", IDS, few, batch=17)
    for name in "patches", "together", "class_images": assert np.array_equal(getattr(other, name), getattr(index, name))
    for name in "mass", "patch_entropy", "object_visual", "class_label":
        assert np.allclose(getattr(other, name), getattr(index, name), atol=1e-3)
    for kind in "top", "sample":
        assert np.allclose(getattr(other, kind).score, getattr(index, kind).score, atol=1e-5)
    assert np.array_equal(other.sample.image, index.sample.image)


def test_cached_features_give_the_index_of_the_images(tmp_path, clipart):
    backbone = load_backbone("vit_tiny_patch16_224", pretrained=False, image_size=48, num_classes=0)
    torch.manual_seed(0)
    model, twelve = LLB(backbone, num_objects=9, num_layers=2, num_classes=C), clipart.take(range(0, 60, 5))
    store = build_tokens(backbone, model.target_layer, twelve, RUNTIME, tmp_path)
    one, two = (build_index(model, make_loader(d, EvalBatches(len(twelve), 4)), tmp_path / "val", RUNTIME)
                for d in (ImageDataset(twelve, backbone.transform()), TokenDataset(store, twelve)))
    assert np.allclose(one.mass, two.mass, rtol=.02, atol=.05)   # bf16 tokens


def test_registers_and_wide_grids_keep_their_patches(tmp_path, few):
    backbone = load_backbone("vit_small_patch14_reg4_dinov2", pretrained=False, image_size=(14 * H, 14 * W),
                             num_classes=0)
    model = LLB(backbone, num_objects=K, num_layers=2, target_layer=3, num_classes=C)
    model.branch.visual_block = Second()
    with torch.no_grad(): model.branch.objects.assigner.weight.copy_(torch.eye(K, backbone.dim))
    assert backbone.num_prefix == 5
    found, _ = indexed(model, tmp_path / "val", IDS, few)
    assert found.grid == (H, W) and np.array_equal(found.map(7)[0], IDS[7])
    images, patches = images_with(found, 4)
    assert np.array_equal(np.sort(images), np.flatnonzero((IDS == 4).any(1)))
    assert np.array_equal(patches, (IDS[images] == 4).sum(1))


def test_bad_input_is_named(model, tmp_path, few):
    dataset = Tokens(few, IDS, model.backbone)
    with pytest.raises(InputError, match="use EvalBatches on one process"):
        build_index(model, make_loader(dataset, EvalBatches(len(few), 5, 1, 2)), tmp_path / "val", RUNTIME)
    dataset.noise = float("nan")
    with pytest.raises(InputError, match=few.files[0].split("/")[-1]):
        build_index(model, make_loader(dataset, EvalBatches(len(few), 5)), tmp_path / "val", RUNTIME)
    assert not list(tmp_path.iterdir())   # no half index stays behind


def test_branches(index, few):
    scores, cells = index_scores(index), branch_agreement(index)
    visual, label = (index.rows[f"{n}_logits"][:].argmax(1) == np.array(few.labels) for n in ("visual", "label"))
    assert np.array_equal(cells["only_label"], np.flatnonzero(label & ~visual))
    assert sum(map(len, cells.values())) == len(index)
    assert measure(scores, 1.)["top1"] == visual.mean() and measure(scores, 0.)["top1"] == label.mean()


def test_renamed_objects_are_matched(model, index, tmp_path, few):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    other = LLB(model.backbone, **model.settings)
    other.branch.visual_block = Second()
    state = model.branch.state_dict()
    for name in "objects.assigner.weight", "objects.assigner.bias", "objects.embedding.weight":
        state[name] = state[name][order]
    other.branch.load_state_dict(state)
    found = match_objects(index, indexed(other.eval(), tmp_path / "val", IDS, few)[0])
    assert found.stability == 1 and len(found.first) == K - 1
    assert (order[torch.from_numpy(found.second)].numpy() == found.first).all()
    elsewhere, _ = indexed(model, tmp_path / "few", IDS, few.take(range(5)))
    with pytest.raises(InputError, match="build both from the same"): match_objects(index, elsewhere)


def test_similarity_is_of_the_mean_tokens(model, index, few):
    ids, visual, label = similarity(index, min_patches=5)
    dataset = Tokens(few, IDS, model.backbone, .15)
    tokens = torch.stack([dataset[0, i]["tokens"] for i in range(len(few))])[:, model.backbone.num_prefix:].numpy()
    centroids = np.stack([tokens[IDS == k].mean(0) for k in ids])
    centred = centroids - centroids.mean(0)
    norm = np.linalg.norm(centred, axis=1)
    assert np.allclose(visual, centred @ centred.T / norm[:, None] / norm, atol=1e-4) and label.shape == visual.shape
    assert len(moved_pairs(ids, visual, label).first) == len(ids) * (len(ids) - 1) // 2
    with pytest.raises(InputError, match="lower min_patches"): similarity(index, min_patches=10**9)


@pytest.fixture(scope="module")
def planted():
    """A branch that was taught: object 0 means class 0, object 1 class 1, neither class 2, the others nothing."""
    torch.manual_seed(0)
    backbone = load_backbone("vit_tiny_patch16_224", pretrained=False, image_size=(16 * H, 16 * W), num_classes=0)
    model = LLB(backbone, num_objects=K, num_layers=2, num_classes=3)
    a = torch.eye(K)[torch.randint(2, K, (64, H * W))]
    labels = torch.randint(0, 3, (64,))
    a[torch.arange(64), torch.randint(0, H * W, (64,))] = torch.eye(K)[labels]
    optimizer = torch.optim.AdamW(model.branch.parameters(), 1e-3)
    for _ in range(40):
        loss = nn.functional.cross_entropy(model.branch.label_logits(a @ model.branch.objects.embeddings), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < .05
    return model.branch.eval(), a[labels < 2], labels[labels < 2]


def test_ablation_finds_the_planted_object_and_chance_does_not(planted):
    branch, a, labels = planted
    mean = mean_embedding(branch, a.sum((0, 1)))
    both = torch.stack([labels, torch.full_like(labels, 3)], 1)
    found = ablation_effects(branch, a, labels, both, mean)
    assert found.effect[:, 0].min() > 1 and found.effect[:, 0].median() > 5 * found.random[:, 0].median().abs()
    assert found.effect[:, 1].abs().median() < .2 * found.effect[:, 0].median()
    score = attribution(branch, a, labels, mean)
    assert (score.argmax(1) == labels).float().mean() > .95
    curves = faithfulness(branch, a, labels, mean)
    gone, come = ({name: area(c[i]).mean().item() for name, c in curves.items()} for i in (0, 1))
    assert gone["attribution"] < gone["random"] - .1 and come["attribution"] > come["random"] + .1


def test_effects_are_rows_beside_the_index(model, index, few):
    loader = lambda n: make_loader(Tokens(few.take(range(n)), IDS, model.backbone, .15), EvalBatches(n, 7))
    with pytest.raises(InputError, match="images of the index"):
        build_effects(model, loader(20), index, RUNTIME, count=3)
    effects = build_effects(model, loader(40), index, RUNTIME, count=3)
    effect, count, random = class_effects(index, effects)
    want = np.zeros((C, K))
    for i, y in enumerate(few.labels):
        for k, d in zip(effects["objects"][i], effects["effect"][i]): want[y, k] += d
    assert np.allclose(np.nan_to_num(effect) * count, want, atol=1e-5)
    assert count.sum() == 3 * 40 and np.isnan(effect[count == 0]).all()
    right = effects["predicted"][:] == np.array(few.labels)
    assert np.allclose(effects["predicted_effect"][right], effects["effect"][right]) and len(open_effects(index)) == 40


def test_memory_does_not_grow_with_the_data(tmp_path):
    "Measured in a process of its own, and by a measure that does see an array or a tensor of 4 KB kept of every image."
    program = Path(__file__).with_name("memory.py")
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    def growth(kind): # KB an image: of Python objects, of the whole process
        return [1000 * theilslopes(megabytes, found["images"]).slope for megabytes in zip(*found[kind])]
    assert growth("right")[0] < 1 and growth("right")[1] < 2, found   # names of files are among it
    assert growth("arrays")[0] > 3 and growth("tensors")[1] > 3, found


@pytest.fixture
def run(images, tmp_path):
    "A run folder of an untrained model on a few small images, which may be changed."
    shutil.copytree(images, tmp_path / "images")
    config = Config.of(**TINY | {"data_dir": tmp_path / "images"})
    data, model = make_data(config), make_model(config.model, make_backbone(config.model, 3), 3)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "config.json").write_text(json.dumps({"config": config.to_dict(), **describe_data(data)}))
    return tmp_path


def built(index): return (index.folder / "index.json").stat().st_mtime_ns


def test_a_run_is_indexed_once_and_again_when_its_model_changes(run):
    index, effects = effects_of_run(str(run), "selection", "cpu", count=2)
    assert len(index) == len(effects) == 6 and index.folder == run / "objects/selection"
    assert built(index_run(run, "selection", "cpu")) == built(index)
    assert len(effects_of_run(run, "selection", "cpu", 2).effects) == 6
    model = LLB.from_pretrained(run / "model")
    with torch.no_grad(): model.branch.objects.embedding.weight.add_(1)
    model.save_pretrained(run / "model")
    again = index_run(run, "selection", "cpu")
    assert again.info["model"] != index.info["model"] and open_effects(again) is None
    with pytest.raises(InputError, match="no split"): load_run(run, "test", "cpu")
    assert len(load_run(run, "all", "cpu").loader.dataset) == 60


def test_a_damaged_index_and_one_of_touched_images_are_built_again(run):
    index, _ = effects_of_run(run, "val", "cpu", count=2)
    damaged = [store.columns[name].path for store, name in ((index.rows, "first"), (open_effects(index), "effect"))]
    for path in *damaged, index.folder / "objects.safetensors":
        with open(path, "r+b") as file: file.truncate(9)
        if path.name != "effect.bin":
            with pytest.raises(InputError, match="build it again"): open_index(index.folder)
        index, effects = effects_of_run(run, "val", "cpu", count=2)
        assert effects["effect"].shape == (len(index), 2)
    before = built(index)
    index.images.paths[0].touch()
    assert built(index_run(run, "val", "cpu")) > before


def test_images_that_are_not_the_runs_are_refused(run):
    path = make_data(Config.from_file(run / "config.json")).val.paths[0]
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(InputError, match="images are not those of the run"): index_run(run, "val", "cpu")
    with pytest.raises(InputError, match="there are 12 as before, but"): RunReader(run).load_data()   # as reports do
    path.unlink()
    with pytest.raises(InputError, match="images are not those of the run"): index_run(run, "val", "cpu")
    assert not (run / "objects").exists()


@pytest.mark.slow
def test_the_demos_index_takes_two_minutes_on_two_cores(tmp_path, clipart):
    backbone = load_backbone("focus_vit_small_patch14", image_size=154)
    model, few = LLB(backbone, num_objects=128, num_layers=3, target_layer=9, num_classes=C), clipart.take(range(96))
    began = time.process_time()
    loader = make_loader(ImageDataset(few, backbone.transform()), EvalBatches(96, 32))
    build_index(model, loader, tmp_path / "val", RUNTIME)
    assert (time.process_time() - began) / 96 * 2046 / 2 < 120
