"""Weight files as their makers publish them, written here from their published layouts, against timm's model."""
import re

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from llb.core.errors import InputError
from llb.models import backbone as module
from llb.models.backbone import load_backbone

SMALL = dict(embed_dim=48, depth=2, num_heads=3)
D, LAYERS = SMALL["embed_dim"], range(SMALL["depth"])


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """timm builds each architecture narrow and shallow."""
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: real(name, **{**SMALL, **options}))
    module._outline.cache_clear()
    yield
    module._outline.cache_clear()


def source_model(name, size, **options):
    """A small random model: every number matters, scores stay of order one."""
    torch.manual_seed(3)
    model = timm.create_model(name, img_size=size, **options).eval()
    for key, p in model.named_parameters():
        with torch.no_grad(): p.normal_(std=.2).add_(1. if p.ndim == 1 and "weight" in key else 0.)
    return model


def renamed(state, *table):
    out = {}
    for name, value in state.items():
        for old, new in table: name = re.sub(old, new, name)
        out[name] = value.clone()
    return out


def same(name, file, model, size, rest=""):
    """The file, loaded, gives what timm's model gives; what was left out is named."""
    b, images = load_backbone(name, checkpoint=file, image_size=size), torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = model.forward_features(images)
        tokens = model.forward_intermediates(images, indices=[0], output_fmt="NLC", intermediates_only=True)[0]
        pooled = model.forward_head(features, pre_logits=True)
    out = b(images, layer=1)
    assert (out.patches - tokens).abs().max() < 1e-4 * tokens.abs().max() and tokens.std() > .1
    assert (out.visual_features - pooled).abs().max() < 1e-4 * pooled.abs().max()
    assert b.source == file.name + (f" (without its {rest})" if rest else "") and b.image_size == (size, size)
    return b


# ---- self-supervised ----

def dinov2(state):
    """facebookresearch/dinov2: registers are kept apart, the class token has a position of its own."""
    out = dict(state)
    if "reg_token" in out:
        position = torch.randn(1, 1, D)
        out["register_tokens"] = out.pop("reg_token")
        out["pos_embed"] = torch.cat([position, out["pos_embed"]], 1)
        out["cls_token"] = out["cls_token"] - position
    return out | {"mask_token": torch.zeros(1, D)}


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_base_patch14_reg4_dinov2"])
def test_dinov2(name, tmp_path):
    model = source_model(name, 42)
    torch.save(dinov2(model.state_dict()), tmp_path / "dinov2_pretrain.pth")
    same(name, tmp_path / "dinov2_pretrain.pth", model, 42, "mask token")
    larger = load_backbone(name, checkpoint=tmp_path / "dinov2_pretrain.pth", image_size=(56, 28))
    assert larger.grid == (4, 2) and "resampled from 42 x 42" in larger.source


def test_dinov2_giant(tmp_path):
    """Its MLP is a packed SwiGLU under other names."""
    model = source_model("vit_giant_patch14_dinov2", 42)
    theirs = renamed(model.state_dict(), (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3"))
    torch.save(theirs | {"mask_token": torch.zeros(1, D)}, tmp_path / "vitg14.pth")
    same("vit_giant_patch14_dinov2", tmp_path / "vitg14.pth", model, 42, "mask token")


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"])
def test_dinov3(name, tmp_path, capsys):
    """facebookresearch/dinov3: one bias for query, key and value, of which the key's is masked; buffers of its RoPE."""
    model = source_model(name, 48)
    theirs = renamed(model.state_dict(), (r"^reg_token$", "storage_tokens"), (r"\.gamma_([12])$", r".ls\1.gamma"))
    for i in LAYERS:
        query, value = (theirs.pop(f"blocks.{i}.attn.{n}_bias", torch.zeros(D)) for n in "qv")
        theirs[f"blocks.{i}.attn.qkv.bias"] = torch.cat([query, torch.zeros(D), value])
        theirs[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(3 * D)
    theirs |= {"mask_token": torch.zeros(1, D), "rope_embed.periods": torch.ones(4)}
    torch.save(theirs, tmp_path / "dinov3_vits16_pretrain.pth")
    same(name, tmp_path / "dinov3_vits16_pretrain.pth", model, 48, "mask token")
    assert "bias" not in capsys.readouterr().out


def test_a_teacher_in_a_training_checkpoint(tmp_path):
    """facebookresearch/dino: student and teacher, each a backbone and a head that projects."""
    model = source_model("vit_small_patch16_224", 48, num_classes=0)
    teacher = {f"backbone.{k}": v for k, v in model.state_dict().items()} | {"head.mlp.0.weight": torch.zeros(2, D)}
    torch.save({"student": {"x": torch.zeros(1)}, "teacher": teacher, "epoch": 3}, tmp_path / "checkpoint.pth")
    same("vit_small_patch16_224", tmp_path / "checkpoint.pth", model, 48, "pre-training heads")


def test_mae_pretraining(tmp_path):
    """facebookresearch/mae: the whole of the pre-training, with its decoder; preprocessed as MAE does."""
    model = source_model("vit_base_patch16_224", 48, num_classes=0)
    parts = "pos_embed", "embed.weight", "blocks.0.norm1.bias", "pred.bias"
    decoder = {f"decoder_{k}": torch.zeros(2) for k in parts}
    torch.save({"model": model.state_dict() | decoder | {"mask_token": torch.zeros(1, 1, 32)}}, tmp_path / "mae.pth")
    b = same("vit_base_patch16_224", tmp_path / "mae.pth", model, 48, "mask token, decoder")
    assert b.preprocessing.mean == (.485, .456, .406) and b.num_classes == 0


def test_ijepa(tmp_path):
    """facebookresearch/ijepa: encoder, predictor and target encoder, each inside a parallel wrapper."""
    model = source_model("vit_huge_patch14_gap_224", 42, num_classes=0)
    encoder = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"encoder": encoder, "predictor": {"module.x": torch.zeros(1)}, "target_encoder": {}, "opt": {}},
               tmp_path / "in1k_vith14.pth.tar")
    same("vit_huge_patch14_gap_224", tmp_path / "in1k_vith14.pth.tar", model, 42)


# ---- text and images ----

CLIP = ((r"^patch_embed\.proj\.", "conv1."), (r"^pos_embed$", "positional_embedding"),
        (r"^cls_token$", "class_embedding"), (r"^norm_pre\.", "ln_pre."), (r"^norm\.", "ln_post."),
        (r"^blocks\.", "transformer.resblocks."), (r"\.norm([12])\.", r".ln_\1."), (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj\.", "attn.out_proj."), (r"mlp\.fc1\.", "mlp.c_fc."), (r"mlp\.fc2\.", "mlp.c_proj."),
        (r"^", "visual."))
TEXT = {"positional_embedding": torch.zeros(7, 4), "token_embedding.weight": torch.zeros(9, 4),
        "transformer.resblocks.0.ln_1.bias": torch.zeros(4), "ln_final.weight": torch.ones(4),
        "text_projection": torch.eye(4), "logit_scale": torch.ones(())}


@pytest.mark.parametrize("name", ["vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224"])
def test_clip(name, tmp_path):
    """openai/CLIP and open_clip: two towers; the projection is no class head."""
    model = source_model(name, 96, num_classes=0)
    theirs = renamed(model.state_dict(), *CLIP)
    theirs["visual.class_embedding"] = theirs["visual.class_embedding"][0, 0]
    theirs["visual.positional_embedding"] = theirs["visual.positional_embedding"][0]
    save_file(theirs | TEXT | {"visual.proj": torch.randn(D, 512)}, tmp_path / "open_clip_model.safetensors")
    b = same(name, tmp_path / "open_clip_model.safetensors", model, 96, "text tower, temperature, projection")
    assert b.num_classes == 0 and b.preprocessing.mean[0] == pytest.approx(.48145466)


def test_the_same_tensors_in_another_architecture_have_another_name():
    """CLIP's two activations share a file's tensors; a plain backbone is named by its tensors alone."""
    from llb.models.weights import content_hash
    plain, quick = (load_backbone(f"vit_base_patch32_clip_{n}224", pretrained=False, image_size=64, num_classes=0)
                    for n in ("", "quickgelu_"))
    quick.vit.load_state_dict(plain.vit.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert not torch.equal(plain(images, 1).tokens, quick(images, 1).tokens)
    assert content_hash(plain.vit.state_dict()) == plain.content_hash() != quick.content_hash()
    gap, par = (load_backbone(f"naflexvit_base_patch16_{n}gap", pretrained=False, image_size=64) for n in ("", "par_"))
    par.vit.load_state_dict(gap.vit.state_dict())
    assert gap.content_hash() != par.content_hash()


def test_siglip_of_open_clip(tmp_path):
    model = source_model("vit_base_patch16_siglip_224", 48)
    theirs = {f"visual.trunk.{k}": v for k, v in model.state_dict().items()}
    theirs |= {"text.transformer.resblocks.0.ln_1.bias": torch.zeros(4), "logit_scale": torch.ones(1),
               "logit_bias": torch.ones(1)}
    save_file(theirs, tmp_path / "open_clip_model.safetensors")
    same("vit_base_patch16_siglip_224", tmp_path / "open_clip_model.safetensors", model, 48, "text tower, temperature")
    # without the pool that attends, the patches are the same
    gap = load_backbone("vit_base_patch16_siglip_gap_224", checkpoint=tmp_path / "open_clip_model.safetensors")
    assert "attention pool" in gap.source and gap.num_prefix == 0


def in_jax(w, heads):
    """Weights of a SigLIP as JAX code has them: matrices as [in,out], attention with an axis for the heads."""
    out = {"embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
           "embedding/bias": w["patch_embed.proj.bias"], "pos_embedding": w["pos_embed"],
           "MAPHead_0/probe": w["attn_pool.latent"]}

    def norm(at, name):
        out.update({f"{at}/scale": w[f"{name}.weight"], f"{at}/bias": w[f"{name}.bias"]})

    def dense(at, name):
        out.update({f"{at}/kernel": w[f"{name}.weight"].T, f"{at}/bias": w[f"{name}.bias"]})

    def attention(at, name, inputs):   # inputs: name of a linear layer -> which of query, key and value it holds
        for layer, parts in inputs.items():
            weights, biases = (np.split(w[f"{name}.{layer}.{kind}"], len(parts)) for kind in ("weight", "bias"))
            for part, weight, bias in zip(parts, weights, biases, strict=True):
                out[f"{at}/{part}/kernel"] = weight.T.reshape(D, heads, -1)
                out[f"{at}/{part}/bias"] = bias.reshape(heads, -1)
        out[f"{at}/out/kernel"] = w[f"{name}.proj.weight"].T.reshape(heads, -1, D)
        out[f"{at}/out/bias"] = w[f"{name}.proj.bias"]

    for at, name in [("MAPHead_0", "attn_pool"), *((f"Transformer/encoderblock_{i}", f"blocks.{i}") for i in LAYERS)]:
        head = name == "attn_pool"
        norm(f"{at}/LayerNorm_0", f"{name}.norm" if head else f"{name}.norm1")
        if not head: norm(f"{at}/LayerNorm_1", f"{name}.norm2")
        attention(f"{at}/MultiHeadDotProductAttention_0", name if head else f"{name}.attn",
                  {"q": ["query"], "kv": ["key", "value"]} if head else {"qkv": ["query", "key", "value"]})
        for i in 0, 1: dense(f"{at}/MlpBlock_0/Dense_{i}", f"{name}.mlp.fc{i + 1}")
    norm("Transformer/encoder_norm", "norm")
    return out


def test_siglip_of_big_vision(tmp_path):
    """google-research/big_vision: a map head instead of a class token, the text tower beside it."""
    model = source_model("vit_base_patch16_siglip_224", 48)
    arrays = in_jax({k: v.numpy() for k, v in model.state_dict().items()}, SMALL["num_heads"])
    file = tmp_path / "webli_en_b16.npz"
    np.savez(file, **{f"params/img/{k}": v for k, v in arrays.items()},
             **{"params/txt/Embed_0/embedding": np.zeros((3, 2), np.float32), "params/t": np.ones(1, np.float32)})
    b = load_backbone("vit_base_patch16_siglip_224", checkpoint=file)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in b.vit.state_dict().items())
    assert b.source == f"{file.name} (without its text tower, temperature)" and b.preprocessing.mean == (.5,) * 3


# ---- EVA and BEiT ----

SWIGLU = ((r"mlp\.fc1_g\.", "mlp.w1."), (r"mlp\.fc1_x\.", "mlp.w2."), (r"mlp\.fc2\.", "mlp.w3."),
          (r"mlp\.norm\.", "mlp.ffn_ln."))


def test_eva02_pretraining(tmp_path):
    """baaivision/EVA: weights inside deepspeed's wrapper, SwiGLU's matrices apart, the norm before the pool."""
    model = source_model("eva02_tiny_patch14_224", 56, num_classes=0)
    theirs = renamed(model.state_dict(), (r"^fc_norm\.", "norm."), *SWIGLU)
    theirs |= {"mask_token": torch.zeros(1, 1, D), "lm_head.weight": torch.zeros(5, D), "rope.freqs_cos": torch.ones(4)}
    torch.save({"module": theirs}, tmp_path / "eva02_Ti_pt_in21k_p14.pt")
    same("eva02_tiny_patch14_224", tmp_path / "eva02_Ti_pt_in21k_p14.pt", model, 56, "mask token, pre-training heads")


def test_eva_clip(tmp_path):
    model = source_model("eva02_base_patch16_clip_224", 48, num_classes=0)
    theirs = renamed(model.state_dict(), *SWIGLU, (r"attn\.norm\.", "attn.inner_attn_ln."),
                     (r"attn\.([qv])_proj\.bias", r"attn.\1_bias"), (r"^", "visual."))
    theirs |= {"visual.head.weight": torch.zeros(512, D), "visual.head.bias": torch.zeros(512),
               "visual.rope.freqs_sin": torch.ones(4), "text.ln_final.weight": torch.ones(4),
               "logit_scale": torch.ones(())}
    file = tmp_path / "EVA02_CLIP_B_psz16_s8B.pt"
    torch.save(theirs, file)
    same("eva02_base_patch16_clip_224", file, model, 48, "text tower, temperature, projection")


def test_beit(tmp_path):
    """microsoft/unilm: fine-tuned, with the index of its relative positions; at another size they follow."""
    model = source_model("beit_base_patch16_224", 64)
    index = {f"blocks.{i}.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.long) for i in LAYERS}
    torch.save({"model": model.state_dict() | index}, tmp_path / "beit_base.pth")
    b = same("beit_base_patch16_224", tmp_path / "beit_base.pth", model, 64)
    assert b.num_classes == 1000
    assert load_backbone("beit_base_patch16_224", checkpoint=tmp_path / "beit_base.pth", image_size=96).grid == (6, 6)


def test_beit_pretraining(tmp_path):
    """One table of relative positions for all blocks; the norm before the pool; heads that predict codes."""
    model = source_model("beit_base_patch16_224", 64, num_classes=0, global_pool="token")
    theirs, name = dict(model.state_dict()), "attn.relative_position_bias_table"
    for i in LAYERS: theirs[f"blocks.{i}.{name}"].copy_(theirs[f"blocks.0.{name}"])
    theirs["rel_pos_bias.relative_position_bias_table"] = [theirs.pop(f"blocks.{i}.{name}") for i in LAYERS][0]
    theirs |= {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long),
               "mask_token": torch.zeros(1, 1, D), "lm_head.weight": torch.zeros(9, D), "lm_head.bias": torch.zeros(9)}
    torch.save({"model": theirs}, tmp_path / "beit_base_pt22k.pth")
    same("beit_base_patch16_224", tmp_path / "beit_base_pt22k.pth", model, 64, "mask token, pre-training heads")


def test_deit3(tmp_path):
    """facebookresearch/deit: LayerScale under its own names."""
    model = source_model("deit3_small_patch16_224", 48)
    torch.save({"model": renamed(model.state_dict(), (r"ls([12])\.gamma", r"gamma_\1"))}, tmp_path / "deit_3_small.pth")
    assert same("deit3_small_patch16_224", tmp_path / "deit_3_small.pth", model, 48).num_classes == 1000


def test_naflexvit_reads_its_own_file(tmp_path):
    model = source_model("naflexvit_base_patch16_gap", 224)
    save_file(model.state_dict(), tmp_path / "naflex.safetensors")
    for size in 48, 96: same("naflexvit_base_patch16_gap", tmp_path / "naflex.safetensors", model, size)


# ---- what is refused ----

@pytest.mark.parametrize("change,words", [
    (lambda s: s | {"mystery.weight": torch.zeros(2)}, "unknown are mystery.weight"),
    (lambda s: {k: v for k, v in s.items() if k != "blocks.1.ls2.gamma"}, "missing are blocks.1.ls2.gamma"),
    (lambda s: s | {"norm.bias": torch.zeros(7)}, r"norm.bias is \[7\] and not \[48\]"),
    (lambda s: s | {"norm.bias": torch.zeros(D, dtype=torch.int8)}, "whole numbers are in norm.bias"),
    (lambda s: s | {"norm.bias": torch.full((D,), float("nan"))}, "NaN or infinite numbers are in norm.bias"),
    (lambda s: s | {"patch_embed.proj.weight": torch.zeros(D, 3, 16, 16)}, "patches of 16 x 16 pixels.*14 x 14"),
    (lambda s: s | {"pos_embed": torch.zeros(1, 8, D)}, "7 patch positions"),
    (lambda s: {"embeddings.patch_embeddings.projection.weight": torch.zeros(2)}, "Hugging Face's transformers"),
    (lambda s: {"radio_model.model.patch_generator.pos_embed": torch.zeros(2)}, "RADIO"),
    (lambda s: {"layer.weight": torch.zeros(2)}, "do not fit"),
])
def test_refused(change, words, tmp_path):
    model = source_model("vit_small_patch14_dinov2", 42)
    torch.save(change(dinov2(model.state_dict())), tmp_path / "theirs.pth")
    with pytest.raises(InputError, match=words):
        load_backbone("vit_small_patch14_dinov2", checkpoint=tmp_path / "theirs.pth")
