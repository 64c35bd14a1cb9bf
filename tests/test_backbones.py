"""One contract for every backbone, the release's method names, and what is refused."""
import os
import random
import re
import urllib.error
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from llb.core.errors import InputError
from llb.models.backbone import architecture, load_backbone
from llb.models.zoo import FOCUS_NAME, HUB_NAMES, METHODS

# name, prefix tokens, patch: class token, none, registers only, both, distillation token, rotary and relative
# positions, CNN stem, parallel blocks
FAMILIES = [
    ("vit_tiny_patch16_224", 1, 16), ("deit_tiny_distilled_patch16_224", 2, 16), ("deit3_small_patch16_224", 1, 16),
    ("flexivit_small", 1, 16), ("test_vit", 1, 16), ("test_vit3", 1, 16), ("vit_small_patch14_dinov2", 1, 14),
    ("vit_small_patch14_reg4_dinov2", 5, 14), ("vit_small_patch16_dinov3", 5, 16),
    ("vit_wee_patch16_reg1_gap_256", 1, 16), ("vit_little_patch16_reg4_gap_256", 4, 16),
    ("vit_base_patch16_siglip_224", 0, 16), ("vit_base_patch32_clip_224", 1, 32),
    ("eva02_tiny_patch14_336", 1, 14), ("beit_base_patch16_224", 1, 16), ("vit_relpos_small_patch16_224", 0, 16),
    ("vit_relpos_base_patch16_cls_224", 1, 16), ("vit_small_patch16_rope_mixed_224", 1, 16),
    ("vit_pe_core_tiny_patch16_384", 1, 16), ("naflexvit_base_patch16_parfac_gap", 4, 16),
    ("naflexvit_base_patch16_siglip", 0, 16), ("vit_tiny_r_s16_p8_224", 1, 32),
    ("vit_pwee_patch16_reg1_gap_256", 1, 16),
]
LARGE = {"naflexvit_base_patch16_siglip", "vit_base_patch16_siglip_224", "vit_base_patch32_clip_224",
         "vit_relpos_base_patch16_cls_224"}   # slow to write to disk
REFUSED = ["resnet50", "swin_tiny_patch4_window7_224", "mixer_s32_224", "cait_xxs24_224", "xcit_nano_12_p16_224",
           "convit_tiny", "volo_d1_224", "crossvit_tiny_240", "tnt_s_patch16_224", "samvit_base_patch16",
           "hiera_tiny_224", "pit_ti_224", "qwen3_vit_88m", "gemma4_vit_167m"]


@pytest.mark.parametrize("name,prefix,patch", FAMILIES, ids=[f[0] for f in FAMILIES])
def test_contract(name, prefix, patch, tmp_path):
    height, width = size = 3 * patch, 2 * patch
    b = load_backbone(name, pretrained=False, image_size=size)
    images, layer = torch.randn(2, 3, *size), b.depth - 1
    seen = []
    hook = b.vit.blocks[layer - 1].register_forward_hook(lambda m, i, o: seen.append(o))
    out = b(images, layer)
    hook.remove()
    assert b.grid == out.grid == (3, 2) and out.num_prefix == b.num_prefix == prefix
    assert out.tokens.shape == (2, prefix + 6, b.dim) and out.patches.shape[1] == 6
    assert torch.equal(out.tokens, seen[0])                       # exactly the block's output, prefix tokens first
    assert out.visual_features.shape == (2, b.num_features)
    if b.num_classes:
        assert torch.equal(out.visual_logits, b.vit(images))
    else:
        assert out.visual_logits is None
    early = b(images, layer, visual=False)
    assert torch.equal(early.tokens, out.tokens) and early.visual_features is None and not early.tokens.requires_grad

    if name in LARGE:
        return
    # a file of this backbone gives the same backbone, also at another size and for another number of classes
    save_file(b.vit.state_dict(), tmp_path / "backbone.safetensors")
    again = load_backbone(name, checkpoint=tmp_path / "backbone.safetensors", image_size=size)
    assert torch.equal(again(images, layer).tokens, out.tokens) and again.content_hash() == b.content_hash()
    other = load_backbone(name, checkpoint=tmp_path / "backbone.safetensors", image_size=size[::-1], num_classes=17)
    assert other.grid == (2, 3) and other.num_classes in (0, 17)
    assert other(torch.randn(1, 3, width, height), layer).patches.shape == (1, 6, b.dim)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(InputError, match="not a plain token ViT"), torch.device("meta"):
        load_backbone(name, pretrained=False)


@pytest.mark.parametrize("name", ["qwen3_vit_88m_enc", "qwen3_vit_306m_enc", "qwen3_vit_416m_enc",
                                  "deepseek_vit_412m_enc"])
def test_what_would_crash_later_is_refused_at_load(name):
    with pytest.raises(InputError, match="loads, but its forward pass fails"), torch.device("meta"):
        load_backbone(name, pretrained=False)


@pytest.mark.parametrize("name", timm.list_models(module="naflexvit"))
def test_naflexvit_has_a_grid_of_any_size(name):
    with torch.device("meta"):
        b = load_backbone(name, pretrained=False, image_size=(64, 96))
        out = b(torch.empty(1, 3, 64, 96), layer=b.depth)
    assert out.grid == b.grid == (4, 6) and out.patches.shape == (1, 24, b.dim)


# ---- names ----

def test_names_of_the_hub():
    """Each name a maker uses on the hub stands for weights that timm publishes, and for a backbone that runs."""
    assert set(HUB_NAMES.values()) <= set(timm.list_pretrained())
    assert architecture("Facebook/DINOv2-Small") == architecture("hf_hub:facebook/dinov2-small")
    for prefix in "timm/", "hf_hub:timm/", "hf-hub:timm/", "":
        assert architecture(f"{prefix}vit_tiny_patch16_224.augreg_in21k") == "vit_tiny_patch16_224.augreg_in21k"


def test_a_revision_is_passed_to_the_hub_and_kept(monkeypatch):
    asked, real = {}, timm.create_model

    def hub(name, pretrained=False, pretrained_cfg_overlay=None, **kwargs):
        if pretrained: asked.update(pretrained_cfg_overlay)
        return real(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", hub)
    b = load_backbone("hf_hub:timm/test_vit.r160_in1k@0123abc")
    assert asked == dict(hf_hub_id="timm/test_vit.r160_in1k@0123abc") and asked["hf_hub_id"] in b.source
    assert load_backbone(**b.spec).name == b.name == "test_vit.r160_in1k@0123abc"   # a saved run asks for it again


def test_clip_heads_of_the_hub_are_no_class_scores(monkeypatch):
    asked, real = {}, timm.create_model

    def hub(name, pretrained=False, **kwargs):
        if pretrained: asked[name] = kwargs.get("num_classes")
        with torch.device("meta"): return real(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", hub)
    monkeypatch.setattr("llb.models.backbone._check_finite", lambda *a: None)   # meta tensors have no numbers
    for name in "vit_base_patch32_clip_224.laion2b", "vit_base_patch32_clip_224.laion2b_ft_in12k_in1k":
        load_backbone(name)
    assert asked == {"vit_base_patch32_clip_224.laion2b": 0, "vit_base_patch32_clip_224.laion2b_ft_in12k_in1k": None}


@pytest.mark.parametrize("kwargs,words", [
    (dict(name="vit_bas_patch16_224"), "vit_base_patch16_224"),
    (dict(name="timm/vit_bas_patch16_224"), "vit_base_patch16_224"),
    (dict(name="facebook/dinov2-smal"), "facebook/dinov2-small"),
    (dict(name="google/vit-base-patch16-224"), "vit_base_patch16_224"),
    (dict(name="vit_tiny_patch16_224.nobody"), "augreg_in21k_ft_in1k"),
    (dict(name=__file__), "is a file"),
    (dict(name="vit_tiny_patch16_224@0123abc", pretrained=False), "revision"),
    (dict(name="vit_tiny_patch16_224@", pretrained=True), "revision"),
    (dict(name="mae_in1k_ft_in1q/Base"), "mae_in1k_ft_in1k"),
    (dict(name="timm_augreg_in21k_ft_in1k/Huge"), "Tiny, Small, Base, Large"),
    (dict(name="mae_in1k_ft_plc365/Base"),
     "llb train --objective visual --method mae_in1k_ft_in1k --vit_size Base --dataset Places365"),
    (dict(name="swag_ig_ft_inat18/large"),
     "llb train --objective visual --method swag_ig_ft_in1k --vit_size Large --dataset iNat18"),
    (dict(name="vit_tiny_patch16_224", image_size=225), "224 x 224"),
    (dict(name="vit_tiny_patch16_224", image_size=8), "16 x 16"),
    (dict(name="vit_tiny_patch16_224", checkpoint="nowhere.pth"), "nowhere.pth"),
    (dict(name="vit_dlittle_patch16_reg1_gap_nope"), "Near matches"),
    (dict(name="test_vit5"), "Near matches"),
])
def test_wrong_input(kwargs, words):
    with pytest.raises(InputError) as error:
        load_backbone(**kwargs)
    assert words in str(error.value)


def test_no_hub(monkeypatch, tmp_path):
    """Without a network the message says what to do instead, and nothing stays behind in the cache."""
    real = timm.create_model

    def offline(*args, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no network")
        return real(*args, **kwargs)

    def no_host(*_, **__):
        raise urllib.error.URLError("no host")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_host)
    monkeypatch.setenv("LLB_CACHE", str(tmp_path))
    for name in "timm_augreg_in21k_ft_in1k/tiny", "vit_tiny_patch16_224", "mae_in1k_ft_in1k", "swag_ig_ft_in1k":
        with pytest.raises(InputError, match="could not be fetched.*checkpoint="):
            load_backbone(name)
    assert not os.listdir(tmp_path)


def test_hub_arguments(monkeypatch, capsys):
    """The hub is asked for the tag the paper used, and for no head where the class count differs."""
    asked, real = {}, timm.create_model

    def hub(name, pretrained=False, **kwargs):
        if pretrained:
            asked.update(name=name, **kwargs)
        return real(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", hub)
    b = load_backbone("timm_augreg_in21k_ft_in1k/TINY", num_classes=365, image_size=32)
    assert asked == dict(name="vit_tiny_patch16_224.augreg_in21k_ft_in1k", num_classes=0, img_size=(32, 32))
    assert "1000 classes, not 365" in capsys.readouterr().out and "resampled" in b.source and b.reloadable
    assert b.spec["name"] == "timm_augreg_in21k_ft_in1k/Tiny" and b.preprocessing.mean == (.5, .5, .5)


# ---- the release's methods ----

# with 1000 classes, as published
COUNTS = {"augreg/Tiny": 5717416, "augreg/Small": 22050664, "augreg/Base": 86567656, "augreg/Large": 304326632,
          "mae/Base": 86567656, "mae/Large": 304326632, "mae/Huge": 632045800,
          "swag/Base": 86859496, "swag/Large": 305174504, "swag/Huge": 633470440}


@pytest.mark.parametrize("key", METHODS)
def test_methods(key):
    method = METHODS[key]
    with torch.device("meta"):
        b = load_backbone(key.upper(), pretrained=False)
    classes = {"in1k": 1000, "plc365": 365, "inat18": 8142}[method.name.rsplit("_", 1)[1]]
    head = (b.dim + 1) * (classes - 1000)
    assert sum(p.numel() for p in b.vit.parameters()) == COUNTS[f"{method.family}/{method.size}"] + head
    assert b.num_classes == classes and b.name == key and b.source == "random" and not b.reloadable
    sizes = {"Base": 384, "Large": 512, "Huge": 518} if method.family == "swag" else {}
    assert b.image_size == (sizes.get(method.size, 224),) * 2
    assert (b.vit.global_pool == "avg") == (method.family == "mae") == isinstance(b.vit.fc_norm, torch.nn.LayerNorm)
    p = b.preprocessing
    assert (p.mean, p.std, p.crop_pct, p.interpolation) == {
        "augreg": ((.5,) * 3, (.5,) * 3, .9, "bicubic"),
        "mae": ((.485, .456, .406), (.229, .224, .225), .875, "bicubic"),
        "swag": ((.485, .456, .406), (.229, .224, .225), 1.0, "bicubic")}[method.family]


def test_seven_methods():
    assert {m.name for m in METHODS.values()} == {
        "timm_augreg_in21k_ft_in1k", "mae_in1k_ft_in1k", "mae_in1k_ft_plc365", "mae_in1k_ft_inat18", "swag_ig_ft_in1k",
        "swag_ig_ft_plc365",
        "swag_ig_ft_inat18"}
    assert all((m.address is None) == (not m.name.endswith("in1k")) for m in METHODS.values())


def test_class_number_wins_over_the_method():
    with torch.device("meta"):
        assert load_backbone("mae_in1k_ft_plc365", pretrained=False, num_classes=12).num_classes == 12


@pytest.mark.parametrize("name,sizes", [("vit_tiny_patch16_224", (224, 384, 512)), ("vit_huge_patch14_224", (224, 518)),
                                        (FOCUS_NAME, (224, 518))])
def test_sizes(name, sizes):
    for size in sizes:
        with torch.device("meta"):
            b = load_backbone(name, pretrained=False, image_size=size)
        assert b.grid == (size // b.patch_size,) * 2


# ---- the table of docs/backbones.md ----

PAGE = (Path(__file__).parent.parent / "docs/backbones.md").read_text(encoding="utf-8")
RUNS = {name: row for name, row in re.findall(r"^\| `(\w+)` \| (\d+ x .*) \|$", PAGE, re.M) if timm.is_model(name)}
NOT = set(re.findall(r"`(\w+)`", PAGE[PAGE.index("## What is refused"):])) & set(timm.list_models())


def test_the_table_names_every_architecture():
    if f"with timm {timm.__version__};" not in PAGE: pytest.skip("the table was made with another timm")
    assert not RUNS.keys() & NOT and RUNS.keys() | NOT == set(timm.list_models())


@pytest.mark.parametrize("module", ["vision_transformer", "eva", "naflexvit", "others"])
def test_the_table_is_right(module):
    """Drawn at random, anew in each run (pytest-randomly seeds it and says with what)."""
    def belongs(name): return timm.model_entrypoint(name).__module__.endswith(f".{module}") or module == "others"
    for name in random.sample(sorted(filter(belongs, RUNS)), 2):
        with torch.device("meta"): b = load_backbone(name, pretrained=False)
        row = f"{b.image_size[0]} x {b.image_size[1]} | {b.patch_size} | {b.dim} | {b.depth} | {b.num_prefix} | "
        assert RUNS[name] == row + str(b.num_classes or "none"), name
    for name in random.sample(sorted(NOT), 2):
        with pytest.raises(InputError), torch.device("meta"): load_backbone(name, pretrained=False)
