"""Parity with the original release: recorded scores, losses and gradients in both precisions, exact round trips."""
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llb.core.errors import InputError
from llb.models.backbone import load_backbone
from llb.models.loss import LLBLoss
from llb.models.llb import LLB, load_reference_checkpoint, reference_name, to_reference_state_dict

FAMILIES = ["vit", "mae", "swag"]
GOLDEN = Path(__file__).parent / "golden"


def golden(family):
    """The parts of a recording, and its facts."""
    with safe_open(GOLDEN / f"{family}.safetensors", "pt") as f:
        tensors, facts = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    def pick(name): return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    parts = {name: pick(name) for name in ("state", "input", "expect", "grad")}
    return parts, facts


def read(source, facts):
    return load_reference_checkpoint(source, num_heads=int(facts["heads"]), target_layer=int(facts["layer"]),
                                     alpha=float(facts["alpha"]),
                                     temperature=float(facts["temperature"]))


def relative(found, expected):
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype,tolerance,gradient_tolerance",
                         [(torch.float32, 1e-4, 1e-3), (torch.float64, 1e-6, 1e-6)], ids=["fp32", "fp64"])
def test_parity(family, dtype, tolerance, gradient_tolerance):
    parts, facts = golden(family)
    model = read(parts["state"], facts).to(dtype)
    images, labels = parts["input"]["images"].to(dtype), parts["input"]["labels"]
    objective = LLBLoss(float(facts["diversity_weight"]))
    out = model(images)
    terms = objective(out, labels)
    found = {"visual_logits": out.visual_logits, "label_logits": out.label_logits, "assignments": out.assignments,
             "fused": out.probabilities(), "ce": terms["cross_entropy"], "entropy": terms["entropy"],
             "loss": terms["loss"]}
    assert found.keys() == parts["expect"].keys() and all(v.dtype == dtype for v in found.values())
    worst = {k: relative(found[k], v) for k, v in parts["expect"].items()}
    assert max(worst.values()) < tolerance, worst

    # in training mode the backbone stops early and the gradients are the recorded ones, under their names
    objective(model.train()(images), labels)["loss"].backward()
    gradients = {reference_name(k, family): p.grad for k, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == parts["grad"].keys()
    worst = {k: relative(gradients[k], v) for k, v in parts["grad"].items()}
    assert max(worst.values()) < gradient_tolerance, max(worst.items(), key=lambda kv: kv[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["dict", "wrapped", "pth", "safetensors"])
def test_round_trip(family, dtype, how, tmp_path):
    """Every key, bit for bit, whatever the file and the precision."""
    parts, facts = golden(family)
    state = {k: v.to(dtype) for k, v in parts["state"].items()}
    source = state
    if how == "wrapped":
        source = {"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3, "scaler": None}
    elif how == "pth":
        torch.save({"model": state, "epoch": 3}, source := tmp_path / "best.pth")
    elif how == "safetensors":
        save_file(state, source := str(tmp_path / "best.safetensors"))
    again = to_reference_state_dict(read(source, facts), family)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], state[k]) and again[k].dtype == dtype and again[k].is_contiguous() for k in state)


def reference_state(family, *, dim, depth, layers, objects, classes, patch, grid, dtype=torch.float32):
    """A random state in the release's layout, written down from its description."""
    g = torch.Generator().manual_seed(0)
    swag = family == "swag"

    def make(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).mul(.1).to(dtype)

    def block(prefix):
        ln, attn, fc = (("ln_", "self_attention.in_proj_", "mlp.linear_") if swag else ("norm", "attn.qkv.", "mlp.fc"))
        out = {f"{prefix}{ln}{n}.{k}": make(dim) for n in (1, 2) for k in ("weight", "bias")}
        proj = "self_attention.out_proj" if swag else "attn.proj"
        return out | {f"{prefix}{attn}weight": make(3 * dim, dim), f"{prefix}{attn}bias": make(3 * dim),
                      f"{prefix}{proj}.weight": make(dim, dim), f"{prefix}{proj}.bias": make(dim),
                      f"{prefix}{fc}1.weight": make(4 * dim, dim), f"{prefix}{fc}1.bias": make(4 * dim),
                      f"{prefix}{fc}2.weight": make(dim, 4 * dim), f"{prefix}{fc}2.bias": make(dim)}

    tokens = grid * grid + 1
    backbone, nv = "blocks.{}.", "nv_blocks.{1}."
    if swag: backbone, nv = "encoder.layers.layer_{}.", "encoder.nv_layers.{}layer_{}."
    plain = ("head", "fc_norm" if family == "mae" else "norm", "norm_nv")
    head, norm, nv_norm = ("head.layers.head", "encoder.ln", "encoder.nv_ln") if swag else plain
    if swag: out = {"class_token": make(1, 1, dim), "encoder.pos_embedding": make(tokens, 1, dim)}
    else: out = {"cls_token": make(1, 1, dim), "pos_embed": make(1, tokens, dim)}
    convolution = "conv_proj" if swag else "patch_embed.proj"
    out |= {f"{convolution}.weight": make(dim, 3, patch, patch), f"{convolution}.bias": make(dim)}
    for i in range(depth):
        out |= block(backbone.format(i))
    names = [nv.format("nv" if i == 0 else "", i) for i in range(layers)]
    for name in names:
        out |= block(name)
    out |= {f"{names[0]}nv_cluster.nv_embeddings": make(objects, dim),
            f"{names[0]}nv_cluster.cls_token_nv": make(1, 1, dim),
            f"{names[0]}nv_cluster.nv_extractor.nv_extractor.weight": make(objects, dim),
            f"{names[0]}nv_cluster.nv_extractor.nv_extractor.bias": make(objects)}
    linear = (norm, ()), (nv_norm, ()), (head, (classes,)), (f"nv_{head}", (classes,))
    return out | {f"{n}.{k}": make(*s) for n, s in linear for k, s in (("weight", (*s, dim)), ("bias", s or (dim,)))}


SHAPES = [dict(dim=40, depth=5, layers=4, objects=33, classes=11, patch=4, grid=5),
          dict(dim=64, depth=12, layers=11, objects=2, classes=2, patch=16, grid=2),
          dict(dim=24, depth=2, layers=2, objects=7, classes=365, patch=14, grid=3, dtype=torch.float64)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=["deep", "twelve", "double"])
def test_other_shapes(family, shape):
    """All dimensions are read off the tensors; also more than ten blocks, any fitting number of heads."""
    state = reference_state(family, **shape)
    for heads in (1, 4, 8):
        model = load_reference_checkpoint(state, num_heads=heads, target_layer=shape["depth"], alpha=.3)
        b, side = model.backbone, shape["patch"] * shape["grid"]
        assert (b.dim, b.depth, b.num_heads, b.patch_size, b.image_size, b.num_classes) == (
            shape["dim"], shape["depth"], heads, shape["patch"], (side, side), shape["classes"])
        assert model.settings == dict(
            num_objects=shape["objects"], num_layers=shape["layers"], target_layer=shape["depth"], alpha=.3,
            temperature=.1, num_classes=shape["classes"], drop_path=0.0)
        out = model(torch.randn(2, 3, side, side, dtype=b.vit.pos_embed.dtype))
        assert out.probabilities().shape == (2, shape["classes"])
        assert out.assignments.shape == (2, shape["grid"] ** 2, shape["objects"])
        again = to_reference_state_dict(model, family)
        assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_format(family, dtype, tmp_path):
    """A model that was read is saved and loaded like any other, its backbone with it, in its own precision."""
    parts, facts = golden(family)
    model, images = read({k: v.to(dtype) for k, v in parts["state"].items()}, facts), parts["input"]["images"].to(dtype)
    model.save_pretrained(tmp_path)
    again = LLB.from_pretrained(tmp_path)
    assert torch.equal(again(images).probabilities(), model(images).probabilities()) and again.branch.dtype == dtype
    assert again.backbone.preprocessing == model.backbone.preprocessing
    assert again.backbone.source == model.backbone.source
    (tmp_path / "backbone.safetensors").unlink()
    with pytest.raises(InputError, match="backbone.safetensors"):
        LLB.from_pretrained(tmp_path)


def test_writing_any_plain_model(tmp_path):
    """A model made here can be written, its visual head as the backbone's, and reads back to the same scores."""
    torch.manual_seed(0)
    for family, name in ("vit", "vit_tiny_patch16_224"), ("mae", "mae_in1k_ft_in1k"), ("swag", "vit_tiny_patch16_224"):
        backbone = load_backbone(name, pretrained=False, image_size=32)
        model = LLB(backbone, num_objects=6, num_layers=2, target_layer=3, num_classes=5)
        torch.nn.init.normal_(model.branch.visual_head.weight)
        save_file(to_reference_state_dict(model, family), tmp_path / "w.safetensors")
        again = load_reference_checkpoint(tmp_path / "w.safetensors", num_heads=backbone.num_heads, target_layer=3)
        images = torch.randn(2, 3, 32, 32)
        assert torch.allclose(again(images).probabilities(), model(images).probabilities(), atol=1e-6)
        assert again.branch.visual_head is None


@pytest.mark.parametrize("change,words", [
    (lambda s: s.pop("norm_nv.weight"), "1 missing.*norm_nv.weight"),
    (lambda s: s.update({"nv_blocks.7.extra": torch.ones(1)}), "unexpected"),
    (lambda s: s.pop("blocks.1.norm1.bias"), "blocks.1.norm1.bias"), (lambda s: s.pop("pos_embed"), "pos_embed"),
    (lambda s: s.pop("nv_blocks.0.nv_cluster.nv_embeddings"), "latent objects"),
    (lambda s: [s.pop(k) for k in list(s) if "nv" in k], "load_backbone"),
    (lambda s: s.update({"nv_head.weight": torch.zeros(3, 48)}), "nv_head|classifier.weight"),
    (lambda s: s.update({"pos_embed": torch.zeros(1, 16, 48)}), "no square"),
    (lambda s: s.update({"blocks.0.ls1.gamma": torch.ones(48)}), "ls1.gamma")])
def test_refused_states(change, words):
    parts, facts = golden("vit")
    change(state := dict(parts["state"]))
    with pytest.raises(InputError, match=words):
        read(state, facts)


@pytest.mark.parametrize("wrong", [dict(num_heads=5), dict(target_layer=0), dict(target_layer=5), dict(alpha=2),
                                   dict(temperature=0)])
def test_refused_arguments(wrong):
    with pytest.raises(InputError):
        load_reference_checkpoint(golden("vit")[0]["state"], **dict(num_heads=3, target_layer=3) | wrong)


def test_refused_writing():
    parts, facts = golden("mae")
    model = read(parts["state"], facts)
    for family in "vit", "swag", "beit":
        with pytest.raises(InputError):
            to_reference_state_dict(model, family)


def test_damaged_file(tmp_path):
    (tmp_path / "w.pth").write_bytes((GOLDEN / "vit.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError):
        load_reference_checkpoint(tmp_path / "w.pth", num_heads=3, target_layer=3)


@pytest.mark.parametrize("method,size,trained", [
    ("timm_augreg_in21k_ft_in1k", "Base", 46_446_312), ("mae_in1k_ft_in1k", "Base", 46_446_312),
    ("swag_ig_ft_in1k", "Base", 46_446_312), ("timm_augreg_in21k_ft_in1k", "Large", 80_801_768)])
def test_trained_parameters(method, size, trained):
    """The paper's settings, L=6 and K=2048 on 1000 classes: 46.5 million for ViT-B, 80.8 million for ViT-L."""
    with torch.device("meta"):
        model = LLB(load_backbone(f"{method}/{size}", pretrained=False), num_objects=2048, num_layers=6)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert model.branch.visual_head is None


def test_golden_files_are_whole():
    for family in FAMILIES:
        parts, facts = golden(family)
        assert facts["family"] == family
        assert len(load_file(GOLDEN / f"{family}.safetensors")) == sum(map(len, parts.values()))
        assert parts["grad"].keys() == {k for k in parts["state"] if "nv" in k and "conv" not in k}
