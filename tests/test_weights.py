"""Whole models of other makers against our translation of their files, positions against independent arithmetic."""
import argparse
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import ViT_B_16_Weights, VisionTransformer, vit_b_16, vit_h_14, vit_l_16

from llb.core.errors import InputError
from llb.core.files import file_hash
from llb.models.backbone import load_backbone
from llb.models.weights import fetch, layout_of, read_state_dict, to_timm

NAME, SIZE, DIM, HEADS, DEPTH, CLASSES = "vit_tiny_patch16_224", 48, 192, 3, 12, 7   # a 3 x 3 grid


def randomised(state):
    """Every tensor random and non-zero, scaled so that scores stay of order one."""
    g = torch.Generator().manual_seed(1)
    def draw(name, shape):
        values = torch.randn(shape, generator=g)
        if len(shape) > 1: return values * .02
        return values * .1 + (1. if "weight" in name else 0.)
    return {name: draw(name, value.shape) for name, value in state.items()}


def torchvision_vit():
    model = VisionTransformer(SIZE, 16, DEPTH, HEADS, DIM, 4 * DIM, num_classes=CLASSES)
    model.load_state_dict(randomised(model.state_dict()))
    return model.eval()


def in_native_layout(state):
    """A torchvision state as SWAG's own code writes it."""
    out = {}
    for name, tensor in state.items():
        name = name.replace("encoder_layer_", "layer_").replace("heads.head", "head.layers.head")
        out[name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2")] = tensor
    out["encoder.pos_embedding"] = out["encoder.pos_embedding"].permute(1, 0, 2)
    return out


def logits(backbone, images):
    return backbone(images, layer=1).visual_logits


def plain_vit(w, x, patch_mean):
    """A ViT written out with torch.nn.functional; `w` in timm's names."""
    def norm(x, n):
        return F.layer_norm(x, (x.shape[-1],), w[f"{n}.weight"], w[f"{n}.bias"], 1e-6)

    def linear(x, n):
        return F.linear(x, w[f"{n}.weight"], w[f"{n}.bias"])

    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16).flatten(2).mT
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for i in range(DEPTH):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, -1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        a = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + linear((a @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
    return linear(norm(x[:, 1:].mean(1), "fc_norm") if patch_mean else norm(x, "norm")[:, 0], "head")


# ---- layouts ----

@pytest.mark.parametrize("spelling", ["torchvision", "torchvision, old names", "swag"])
def test_torchvision_and_swag(spelling, tmp_path):
    theirs, images = torchvision_vit(), torch.randn(3, 3, SIZE, SIZE)
    state = theirs.state_dict()
    if spelling == "swag":
        state = in_native_layout(state)
    elif "old" in spelling:
        state = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in state.items()}
    torch.save(state, tmp_path / "w.torch")
    ours = load_backbone(NAME, checkpoint=tmp_path / "w.torch")
    with torch.no_grad():
        expected = theirs(images)
    assert layout_of(state) == spelling.split(",")[0]
    assert ours.image_size == (SIZE, SIZE) and ours.num_classes == CLASSES
    assert (logits(ours, images) - expected).abs().max() < 1e-5 and expected.std() > .1
    assert ours.preprocessing.mean == (.485, .456, .406) and ours.preprocessing.crop_pct == 1


@pytest.mark.parametrize("make,name,size,classes", [
    (vit_b_16, "vit_base_patch16_224", 384, 1000), (vit_l_16, "vit_large_patch16_224", 512, 365),
    (vit_h_14, "vit_huge_patch14_224", 518, 8142)])
@pytest.mark.parametrize("layout", ["torchvision", "swag"])
def test_true_sizes(make, name, size, classes, layout):
    """At true size every name and shape of torchvision's and SWAG's models has its place in timm's."""
    with torch.device("meta"):
        theirs = make(image_size=size, num_classes=classes).state_dict()
        ours = timm.create_model(name, img_size=size, num_classes=classes).state_dict()
    state = to_timm(in_native_layout(theirs) if layout == "swag" else theirs)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in ours.items()}


def test_swag_backbone_without_head(tmp_path):
    state = {k: v for k, v in in_native_layout(torchvision_vit().state_dict()).items() if not k.startswith("head.")}
    torch.save(state, tmp_path / "vit.torch")
    b = load_backbone("vit_tiny_patch16_224", checkpoint=tmp_path / "vit.torch", num_classes=365)
    assert b.num_classes == 0 and logits(b, torch.randn(1, 3, SIZE, SIZE)) is None


@pytest.mark.parametrize("patch_mean", [True, False])
def test_mae(patch_mean, tmp_path):
    """A file as MAE's fine-tuning writes it; with a class token it is told from timm's by its method name alone."""
    model = timm.create_model(NAME, img_size=SIZE, num_classes=CLASSES, global_pool="avg" if patch_mean else "token")
    state = randomised(model.state_dict())
    saved = {"model": state, "epoch": 99, "args": argparse.Namespace(lr=1e-3), "optimizer": {}, "scaler": {"scale": 1.}}
    torch.save(saved, tmp_path / "mae.pth")
    ours, images = load_backbone(NAME, checkpoint=tmp_path / "mae.pth"), torch.randn(3, 3, SIZE, SIZE)
    assert (logits(ours, images) - plain_vit(state, images, patch_mean)).abs().max() < 1e-5
    assert layout_of(state) == ("mae" if patch_mean else "timm")
    assert (ours.preprocessing.mean[0], ours.preprocessing.crop_pct) == ((.485, .875) if patch_mean else (.5, .9))


def test_mae_method_file(monkeypatch, tmp_path):
    """The method's published file is read like any other: Base size, and its family's preprocessing."""
    model = timm.create_model("vit_base_patch16_224", img_size=32, num_classes=1000, global_pool="avg")
    torch.save({"model": model.state_dict()}, tmp_path / "mae_finetuned_vit_base.pth")
    asked, file = [], tmp_path / "mae_finetuned_vit_base.pth"
    monkeypatch.setattr("llb.models.backbone.fetch", lambda *a: asked.append(a) or file)
    b = load_backbone("mae_in1k_ft_in1k/base", num_classes=365, image_size=64)
    assert asked == [("https://dl.fbaipublicfiles.com/mae/finetune/mae_finetuned_vit_base.pth", "md5:1b25e9")]
    assert b.num_classes == 0 and b.num_features == 768
    assert b.source.endswith("pixels: bicubic)") and b.preprocessing.crop_pct == .875


def google_arrays(layout, with_head=True):
    """A random file as JAX code writes it, in one of three layouts."""
    g = np.random.default_rng(0)
    prefix, mha, mlp, norm2 = ("", 1, 3, 2) if layout == "vit_jax" else ("params/", 0, 0, 1)

    def normal(*shape):
        return (g.standard_normal(shape) * (.1 if len(shape) < 2 else .03)).astype(np.float32)

    out = {"cls": normal(1, 1, DIM), "embedding/kernel": normal(16, 16, 3, DIM), "embedding/bias": normal(DIM),
           "Transformer/encoder_norm/scale": 1 + normal(DIM), "Transformer/encoder_norm/bias": normal(DIM)}
    out["Transformer/posembed_input/pos_embedding" if layout == "vit_jax" else "pos_embedding"] = normal(1, 10, DIM)
    if with_head:
        out |= {"head/kernel": normal(DIM, CLASSES), "head/bias": normal(CLASSES)}
    blocks = []
    for _ in range(DEPTH):
        block = {f"LayerNorm_{n}/{k}": (k == "scale") + normal(DIM) for n in (0, norm2) for k in ("scale", "bias")}
        for part in "query", "key", "value":
            block[f"MultiHeadDotProductAttention_{mha}/{part}/kernel"] = normal(DIM, HEADS, DIM // HEADS)
            block[f"MultiHeadDotProductAttention_{mha}/{part}/bias"] = normal(HEADS, DIM // HEADS)
        block |= {f"MultiHeadDotProductAttention_{mha}/out/kernel": normal(HEADS, DIM // HEADS, DIM),
                  f"MultiHeadDotProductAttention_{mha}/out/bias": normal(DIM)}
        for r, (i, o) in enumerate([(DIM, 4 * DIM), (4 * DIM, DIM)]):
            block |= {f"MlpBlock_{mlp}/Dense_{r}/kernel": normal(i, o), f"MlpBlock_{mlp}/Dense_{r}/bias": normal(o)}
        blocks.append(block)
    if layout == "big_vision, stacked":
        out |= {f"Transformer/encoderblock/{k}": np.stack([b[k] for b in blocks]) for k in blocks[0]}
    else:
        out |= {f"Transformer/encoderblock_{i}/{k}": v for i, b in enumerate(blocks) for k, v in b.items()}
    return {prefix + k: v for k, v in out.items()}


@pytest.mark.parametrize("layout", ["vit_jax", "big_vision", "big_vision, stacked"])
@pytest.mark.parametrize("size", [48, 80])
def test_google(layout, size, tmp_path):
    """Every tensor as timm's own reader has it, also at another size."""
    np.savez(tmp_path / "w.npz", **google_arrays(layout))
    timms = timm.create_model(NAME, img_size=size, num_classes=CLASSES).eval()
    timms.load_pretrained(str(tmp_path / "w.npz"))
    ours, images = load_backbone(NAME, checkpoint=tmp_path / "w.npz", image_size=size), torch.randn(2, 3, size, size)
    assert all(torch.equal(v, timms.state_dict()[k]) for k, v in ours.vit.state_dict().items())
    with torch.no_grad():
        assert (logits(ours, images) - timms(images)).abs().max() < 1e-5
    assert ("bilinear" in ours.source) == (size != 48)


def test_google_against_plain_arithmetic(tmp_path):
    np.savez(tmp_path / "w.npz", **google_arrays("vit_jax"))
    file, images = tmp_path / "w.npz", torch.randn(2, 3, SIZE, SIZE)
    ours = load_backbone("timm_augreg_in21k_ft_in1k/Tiny", checkpoint=file)
    assert (logits(ours, images) - plain_vit(to_timm(read_state_dict(file)), images, False)).abs().max() < 1e-5


# ---- strictness ----

def test_strict(tmp_path, capsys):
    good = timm.create_model(NAME, img_size=32, num_classes=CLASSES).state_dict()
    shrunk = {k: v for k, v in good.items() if k != "blocks.3.mlp.fc1.bias"}
    for state, words in [(shrunk, "blocks.3.mlp.fc1.bias"), (good | {"extra.weight": torch.ones(1)}, "extra.weight"),
                         (good | {"pos_embed": torch.zeros(1, 8, DIM)}, "7 patch positions")]:
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(InputError, match=words):
            load_backbone(NAME, checkpoint=tmp_path / "w.safetensors")
    save_file(good, tmp_path / "w.safetensors")
    capsys.readouterr()
    assert load_backbone(NAME, checkpoint=tmp_path / "w.safetensors").num_classes == CLASSES
    assert not capsys.readouterr().out
    assert load_backbone(NAME, checkpoint=tmp_path / "w.safetensors", num_classes=9).num_classes == 0
    assert f"{CLASSES} classes, not 9" in capsys.readouterr().out


def test_family_must_match_the_method(tmp_path):
    torch.save(torchvision_vit().state_dict(), tmp_path / "w.pth")
    for method in "mae_in1k_ft_in1k", "timm_augreg_in21k_ft_in1k/Tiny":
        with pytest.raises(InputError, match="torchvision"):
            load_backbone(method, checkpoint=tmp_path / "w.pth")


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: {"model": {"w": torch.ones(1)}, "args": e}])
def test_no_code_from_files(wrap, tmp_path, capsys):
    torch.save(wrap(Evil()), tmp_path / "w.pth")
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_state_dict(tmp_path / "w.pth")
    np.savez(tmp_path / "w.npz", a=np.array([Evil()], dtype=object))
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_state_dict(tmp_path / "w.npz")
    assert "never run" not in capsys.readouterr().out


# ---- damaged files ----

def test_damaged_files_give_a_sentence(tmp_path):
    good = timm.create_model("test_vit").state_dict()
    save_file(good, tmp_path / "cut.safetensors")
    torch.save({"model": good}, tmp_path / "cut.pth")
    for name in "cut.safetensors", "cut.pth":
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1000])
    for name in "empty.pth", "empty.safetensors", "empty.npz": (tmp_path / name).touch()
    np.savez(tmp_path / "object.npz", a=np.array([{}], dtype=object))
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    for name, value in [("list.pth", [torch.ones(1)]), ("tensor.pth", torch.ones(1)), ("plain.pth", {"epoch": 3}),
                        ("nested.pth", {"model": {"a": {"b": torch.ones(1)}}})]:
        torch.save(value, tmp_path / name)
    (tmp_path / "folder.pth").mkdir()
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(InputError) as error:
            load_backbone("test_vit", checkpoint=file)
        assert file.name in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("value,words", [
    (torch.full((64,), float("nan")), "NaN or infinite numbers are in norm.weight"),
    (torch.full((64,), -float("inf")), "NaN or infinite"),
    (torch.ones(64, dtype=torch.int8), "whole numbers are in norm.weight"),
    (torch.ones(64, dtype=torch.bool), "whole numbers"),
    (torch.ones(32), r"norm.weight is \[32\] and not \[64\]")])
def test_damaged_numbers_are_refused(value, words, tmp_path):
    torch.save(timm.create_model("test_vit").state_dict() | {"norm.weight": value}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=words):
        load_backbone("test_vit", checkpoint=tmp_path / "w.pth")


def test_a_cached_file_is_verified_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLB_CACHE", str(tmp_path / "cache"))
    published, reads = tmp_path / "mae.pth", []
    published.write_bytes(b"numbers")
    digest = f"md5:{file_hash(published, 'md5')[:6]}"
    monkeypatch.setattr("llb.models.weights.file_hash", lambda *a: reads.append(a) or file_hash(*a))
    cached = fetch(published.as_uri(), digest)
    del reads[:]
    assert fetch(published.as_uri(), digest) == fetch(published.as_uri(), digest) == cached and len(reads) == 1
    cached.write_bytes(b"garbage")   # the same size, another time
    assert fetch(published.as_uri(), digest).read_bytes() == b"numbers" and "fetched again" in capsys.readouterr().out
    cached.write_bytes(b"garbage")
    published.unlink()
    with pytest.raises(InputError, match="could not be fetched"):
        fetch(published.as_uri(), digest)


# ---- position embeddings ----

def kernel(kind, t):
    """Interpolation kernels: the triangle, and Keys' cubic with PyTorch's -0.75 or, antialiased, -0.5."""
    t = abs(t)
    if kind == "bilinear":
        return max(0., 1 - t)
    a = -.75 if kind == "bicubic" else -.5
    return ((a + 2) * t - (a + 3)) * t * t + 1 if t < 1 else ((a * t - 5 * a) * t + 8 * a) * t - 4 * a if t < 2 else 0.


def weights_1d(old, new, kind, corners=False):
    """The matrix [new,old] that resamples one axis."""
    out, antialias = np.zeros((new, old)), kind == "antialiased"
    scale = (old - 1) / max(new - 1, 1) if corners else old / new
    for i in range(new):
        centre = i * scale if corners else (i + .5) * scale - .5
        if antialias:   # a wider kernel when shrinking, normalised at the border
            row = np.array([kernel(kind, (j - centre) / max(scale, 1)) for j in range(old)])
            out[i] = row / row.sum()
        else:           # neighbours beyond the border repeat it
            for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
                out[i, min(max(j, 0), old - 1)] += kernel(kind, centre - j)
    return out


def resampled(positions, old, new, kind, corners=False):
    grid = positions[0, 1:].double().numpy().reshape(*old, -1)
    rows, columns = (weights_1d(o, n, kind, corners) for o, n in zip(old, new, strict=True))
    out = np.einsum("yh,xw,hwd->yxd", rows, columns, grid).reshape(1, new[0] * new[1], -1)
    return torch.cat([positions[:, :1], torch.from_numpy(out).float()], 1)


@pytest.mark.parametrize("family,rule", [("timm", ("antialiased",)), ("mae", ("bicubic",)), ("swag", ("bicubic", True)),
                                         ("torchvision", ("bicubic", True)), ("google", ("bilinear",))])
@pytest.mark.parametrize("new", [(5, 5), (2, 2), (4, 2), (3, 3)])
def test_positions(family, rule, new, tmp_path):
    """Each family's positions follow its own rule to a larger, a smaller and an oblong grid."""
    file = tmp_path / ("w.npz" if family == "google" else "w.pth")
    if family == "google":
        np.savez(file, **google_arrays("vit_jax"))
    elif family in ("swag", "torchvision"):
        state = torchvision_vit().state_dict()
        torch.save(in_native_layout(state) if family == "swag" else state, file)
    else:
        pool = "avg" if family == "mae" else "token"
        model = timm.create_model(NAME, img_size=SIZE, num_classes=CLASSES, global_pool=pool)
        torch.save(randomised(model.state_dict()), file)
    stored = to_timm(read_state_dict(file))["pos_embed"]
    b = load_backbone(NAME, checkpoint=file, image_size=tuple(16 * s for s in new))
    found, expected = b.vit.pos_embed, stored if new == (3, 3) else resampled(stored, (3, 3), new, *rule)
    assert torch.allclose(found, expected, atol=1e-6), (found - expected).abs().max()
    assert ("resampled from 48 x 48" in b.source) == (new != (3, 3)) and not found.requires_grad


def test_rules_differ():
    positions = torch.randn(1, 10, 4)
    rules = ("antialiased",), ("bicubic",), ("bicubic", True), ("bilinear",)
    results = [resampled(positions, (3, 3), (5, 5), *rule) for rule in rules]
    assert all((a - b).abs().max() > .01 for i, a in enumerate(results) for b in results[:i])


# ---- preprocessing ----

def test_preprocessing_as_published(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8))
    image = noise.resize((631, 447), Image.Resampling.BICUBIC)
    with torch.device("meta"):
        swag = load_backbone("swag_ig_ft_in1k", pretrained=False)
        mae = load_backbone("mae_in1k_ft_in1k", pretrained=False)
        augreg = load_backbone("timm_augreg_in21k_ft_in1k", pretrained=False)
        linear = load_backbone("swag_ig_ft_in1k", pretrained=False, image_size=224)
        large = load_backbone("mae_in1k_ft_in1k", pretrained=False, image_size=384)
    published = ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1, ViT_B_16_Weights.IMAGENET1K_SWAG_LINEAR_V1
    for ours, theirs in zip((swag, linear), published, strict=True):
        assert (ours.transform()(image) - theirs.transforms()(image)).abs().max() < 1e-6
    for ours, crop_pct in ((augreg, .9), (mae, 224 / 256), (large, 1.)):
        p = ours.preprocessing
        theirs = timm.data.create_transform((3, *ours.image_size), interpolation="bicubic", mean=p.mean, std=p.std,
                                            crop_pct=crop_pct)
        assert (ours.transform()(image) - theirs(image)).abs().max() < 1e-6
