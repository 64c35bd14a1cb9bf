"""Agreement with masks against brute force and scikit-learn; attention, scenes and matching on larger cases."""
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import (adjusted_mutual_info_score, adjusted_rand_score, completeness_score, homogeneity_score,
                             mutual_info_score)

from llb.analysis.attention import attention_maps, class_attention, over_objects, rollout
from llb.analysis.build import forward_with_tokens
from llb.analysis.exemplars import at_quantile, Exemplars, PatchSample
from llb.analysis.masks import (best_overlap, contingency, foreground_ari, information, mask_scores, masks_on_patches,
                                miou_hungarian, miou_many_to_one, pnmi)
from llb.analysis.scenes import cut_out, make_scenes
from llb.analysis.similarity import match_table
from llb.core.distributed import Runtime
from llb.core.errors import InputError
from llb.data.images import ImageList
from llb.models.backbone import BackboneOutput
from llb.models.llb import LabelBranch

RNG = np.random.default_rng(3)
REGIONS = RNG.integers(-1, 4, (20, 30))
CODES = np.where(RNG.random((20, 30)) < .6, np.maximum(REGIONS, 0), RNG.integers(0, 7, (20, 30)))
NONE = np.zeros((2, 3), int)   # images without a foreground region


@pytest.fixture
def rng(): return np.random.default_rng(5)


def test_information_is_scikit_learns():
    kept = REGIONS >= 0
    table = contingency(REGIONS, CODES)
    assert np.isclose(information(table).shared, mutual_info_score(REGIONS[kept], CODES[kept]))
    assert np.isclose(information(table).fraction, homogeneity_score(REGIONS[kept], CODES[kept]))
    assert np.isclose(information(table.T).fraction, completeness_score(REGIONS[kept], CODES[kept]))
    scores = mask_scores(REGIONS, CODES, REGIONS, CODES, permutations=5)
    assert np.isclose(scores["ami"], adjusted_mutual_info_score(REGIONS[kept], CODES[kept]))
    each = [adjusted_rand_score(r[r > 0], c[r > 0]) for r, c in zip(REGIONS, CODES)]
    assert np.isclose(scores["fg_ari"], np.mean(each)) and np.isclose(foreground_ari(REGIONS, CODES), np.mean(each))


def overlap(a, b): return (a & b).sum() / max((a | b).sum(), 1)


def test_segmentation_is_that_of_loops():
    kept = REGIONS >= 0
    each = [np.mean([max(overlap((r == g) & k, (c == j) & k) for j in range(7)) for g in range(1, 4) if (r == g).any()])
            for r, c, k in zip(REGIONS, CODES, kept)]
    assert np.isclose(best_overlap(REGIONS, CODES), np.mean(each))
    pairs = [[overlap((REGIONS == g) & kept, (CODES == j) & kept) for j in range(7)] for g in range(4)]
    best = max(sum(pairs[g][j] for g, j in enumerate(order)) for order in itertools.permutations(range(7), 4)) / 4
    assert np.isclose(miou_hungarian(REGIONS, CODES), best)
    becomes = [np.bincount(REGIONS[10:][kept[10:] & (CODES[10:] == j)], minlength=4).argmax() for j in range(7)]
    named = np.array(becomes)[CODES[:10]]
    want = np.mean([overlap((REGIONS[:10] == g) & kept[:10], (named == g) & kept[:10]) for g in range(4)])
    assert np.isclose(miou_many_to_one(REGIONS[:10], CODES[:10], REGIONS[10:], CODES[10:]), want)


def test_the_null_is_flat_for_noise_and_not_fooled_by_many_codes(rng):
    values = [pnmi(REGIONS, rng.integers(0, 40, REGIONS.shape), permutations=40, seed=s).p for s in range(30)]
    assert .2 < np.mean(values) < .8 and np.mean(np.array(values) < .1) < .35
    assert pnmi(REGIONS, CODES, 100).p < .02


@pytest.mark.parametrize("size,grid", [((30, 44), (3, 4)), ((28, 28), (2, 2)), ((37, 50), (5, 7))])
def test_patches_take_the_region_that_covers_them(size, grid, rng):
    mask = rng.integers(0, 3, (1, *size))
    found = masks_on_patches(mask, grid, cover=.4)[0].reshape(grid)
    for i, j in np.ndindex(grid):
        rows = slice(i * size[0] // grid[0], -(-(i + 1) * size[0] // grid[0]))
        columns = slice(j * size[1] // grid[1], -(-(j + 1) * size[1] // grid[1]))
        fraction = np.bincount(mask[0, rows, columns].ravel(), minlength=3) / mask[0, rows, columns].size
        assert found[i, j] == (fraction.argmax() if fraction.max() >= .4 else -1)


@pytest.mark.parametrize("call,words", [
    (lambda: contingency([1, 2], [1]), "one of each per patch"), (lambda: contingency([-1], [0]), "left out"),
    (lambda: pnmi(REGIONS[:1], CODES[:1]), "at least two"), (lambda: foreground_ari(NONE, NONE), "two foreground"),
    (lambda: best_overlap(NONE, NONE), "foreground region"),
    (lambda: masks_on_patches(-np.ones((1, 4, 4)), (2, 2)), "from 0")])
def test_bad_masks_are_named(call, words):
    with pytest.raises(InputError, match=words): call()


def test_rollout_is_a_product_of_matrices():
    torch.manual_seed(0)
    branch = LabelBranch(dim=16, num_heads=2, num_classes=3, num_objects=5, num_layers=4)
    features = BackboneOutput(torch.randn(3, 4 + 6, 16), grid=(2, 3), num_prefix=4)   # registers before the patches
    maps = attention_maps(branch, features)
    fresh = LabelBranch(16, 2, 3, 5, 2)
    assert maps.shape == (3, 3, 2, 7, 7)
    assert branch.label_blocks[0].attn.fused_attn == fresh.label_blocks[0].attn.fused_attn   # as it was
    for b in range(3):
        total = torch.eye(7)
        for layer in range(3): total = (maps[b, layer].mean(0) + torch.eye(7)) / 2 @ total
        assert torch.allclose(rollout(maps)[b], total[0, 1:] / total[0, 1:].sum(), atol=1e-6)
    a = branch(features).assignments
    shared = over_objects(class_attention(maps), a)
    by_hand = maps[1, 2, 0, 0, 1:] @ a[1]
    assert torch.allclose(shared[1, 2, 0], by_hand / by_hand.sum(), atol=1e-6)


def test_no_hook_stays_after_an_error():
    class Broken:
        branch = LabelBranch(dim=16, num_heads=2, num_classes=3, num_objects=5, num_layers=2)
        def features(self, images): raise RuntimeError("no")
    with pytest.raises(RuntimeError):
        forward_with_tokens(Broken(), {"image": torch.zeros(1)}, Runtime(torch.device("cpu")))
    assert not Broken.branch.norm._forward_hooks


def test_the_sample_is_uniform_over_patches_and_images():
    sample = PatchSample(2, 200)
    objects, confidence = np.zeros((5000, 16), int), np.linspace(0, 1, 5000)[:, None].repeat(16, 1)
    for part in np.array_split(np.arange(5000), 13): sample.add(part, objects[part], confidence[part])
    own = sample.exemplars().of(0)
    assert len(own) == 200 and abs(own.score.mean() - .5) < .08 and abs(at_quantile(own, .9, 1).score[0] - .9) < .07
    assert np.bincount(own.patch, minlength=16).min() >= 3 and len(sample.exemplars().of(1)) == 0
    with pytest.raises(InputError, match="0..1"): at_quantile(Exemplars(*np.zeros((3, 4))), 2, 1)


def test_stability_of_half_a_dictionary():
    a = np.repeat(np.arange(4), 24)
    b = np.concatenate([np.repeat([7, 2], 24), np.tile([0, 1], 24)])   # two objects kept, two shuffled together
    found = match_table(contingency(a, b))
    assert found.stability == .75 and dict(zip(found.first[:2], found.second[:2])) == {0: 7, 1: 2}
    assert np.isclose(found.ami, adjusted_mutual_info_score(a, b))


def test_scenes_say_what_every_pixel_is(tmp_path):
    for c, colour in zip("abcd", [(200, 0, 0), (0, 160, 0), (0, 0, 200), (90, 90, 0)]):
        drawn = np.full((60, 60, 3), 255, np.uint8)
        drawn[12:48, 15:45] = colour
        drawn[25:32, 26:33] = 255   # a white shirt
        Image.fromarray(drawn).save(tmp_path / f"{c}.png")
    images = ImageList(tmp_path, tuple(f"{c}.png" for c in "abcd"), (0, 1, 2, 3), tuple("abcd"), tuple("abcd"))
    assert cut_out(np.asarray(images.open(0)))[28, 29] and not cut_out(np.asarray(images.open(0)))[5, 5]
    for kind in "white", "flat", "noise":
        scenes = make_scenes(images, 5, 112, kind, things=(4, 4))
        for image, category in zip(scenes.images, scenes.categories):
            assert set(np.unique(category)) == {0, 1, 2, 3, 4}
            for c, channel in (1, 0), (2, 1), (3, 2):
                pixels = image[category == c].reshape(-1, 3)
                coloured = pixels[pixels.min(1) < 40]
                assert len(coloured) > .6 * len(pixels) and (coloured.argmax(1) == channel).all()
