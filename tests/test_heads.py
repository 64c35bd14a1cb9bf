"""Rival heads are heads like LLB: their sizes, and the way from flags to a saved model that somebody else reads."""
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from llb.core.distributed import Runtime
from llb.core.errors import InputError
from llb.data.splits import load_data
from llb.models.backbone import BackboneOutput, load_backbone
from llb.models.heads import HeadModel
from llb.models.llb import make_branch
from llb.models.loss import LLBLoss
from llb.models.rivals import (AttentionPool, CONTROLS, control_name, EfficientProbe, FittedHead, head_name, HEADS,
                               make_head_model)
from llb.runs.build import complete_config, make_backbone, make_model
from llb.runs.config import FITTED, NEEDS, Config, ModelConfig, options_of_head, parse_command
from llb.runs.cost import config_cost, preview
from llb.runs.folder import RunReader
from llb.train import train
from llb.training.evaluate import evaluate
from llb.training.inputs import features_of, scoring_loader
from llb.training.step import make_loss
from llb.training.trainer import Trainer

SMALL = dict(num_objects=6, num_layers=2, target_layer=3)
RUN = dict(backbone="test_vit", random_backbone=True, image_size=32, dataset="ImageFolder", batch_size=12, workers=0)


def config_of(head, **values):
    "A configuration with those small values that the head has."
    own = {name: SMALL[name] for name in options_of_head(head) if name in SMALL}
    return Config.of(**{**RUN, **own, **({} if head in FITTED else {"epochs": 1}), "head": head, **values})


@pytest.fixture(params=[3, 0], ids=["own-scores", "visual-head"])
def backbone(request):
    torch.manual_seed(0)
    return load_backbone("test_vit", pretrained=False, image_size=32, num_classes=request.param)


def small_head(name, backbone):
    own = {option: SMALL[option] for option in options_of_head(name) if option in SMALL}
    torch.manual_seed(1)
    return make_head_model(name, backbone, 3, **own)


def fit_on_noise(model):
    if isinstance(model.branch, FittedHead):
        n, width = 30, model.backbone.num_features
        draw = torch.Generator().manual_seed(0)
        model.branch.fit(torch.randn(n, width, generator=draw), torch.arange(n) % 3,
                         torch.randn(n, width, generator=draw), torch.arange(n) % 3)
    return model


# Sizes

D, C, L, K = 384, 10, 2, 64
BLOCK = 12 * D**2 + 13 * D
PUBLISHED = {   # at D=384 and C=10: what the formula gives, and the number it was checked with
    "linear": ({}, D * C + C, 3_850),
    "ep": ({}, D**2 + 32 * D + D * C + C, 163_594),
    "aim": ({}, 2 * D**2 + D + D * C + C, 299_146),
    "alf": ({}, 8 * D**2 + 10 * D + D * C + C, 1_187_338),
    "vjepa2": ({"num_layers": 4}, 3 * BLOCK + 11 * D**2 + 13 * D + D * C + C, 6_954_250),
    "vt": ({"num_layers": L}, L * BLOCK + 3 * D + D * C + C, 3_553_930),
    "llb": ({"num_layers": L, "num_objects": K}, L * BLOCK + 2 * D * K + K + 3 * D + D * C + C, 3_603_146)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_head_has_as_many_parameters_as_its_formula_says(name):
    options, formula, known = PUBLISHED[name]
    with torch.device("meta"):
        small = load_backbone("vit_small_patch14_dinov2", pretrained=False, image_size=56, num_classes=C)
        head = HEADS[name](small, C, **options)
    assert sum(p.numel() for p in head.parameters()) == formula == known


def test_variants_of_efficient_probing_have_their_sizes():
    with torch.device("meta"):
        small = load_backbone("vit_small_patch14_dinov2", pretrained=False, image_size=56, num_classes=C)
        found = [sum(p.numel() for p in EfficientProbe(small, C, *o).parameters()) for o in ((12, 1), (32, 2))]
        base = load_backbone("vit_base_patch16_224", pretrained=False)
        found.append(sum(p.numel() for p in EfficientProbe(base, 1000).parameters()))
    assert found == [155_914, 87_946, 1_383_400]


def test_pooling_heads_equal_their_formulas_in_training_too():
    "Written out with einsum, with the statistics of the batch."
    torch.manual_seed(0)
    backbone = load_backbone("vit_tiny_patch16_224", pretrained=False, image_size=64, num_classes=5)
    features = BackboneOutput(torch.randn(6, 1 + 16, 192, dtype=torch.float64), (4, 4), 1)
    def standard(x): return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt()
    ep, x = EfficientProbe(backbone, 5, 8).double().train(), features.patches
    a = torch.einsum("md,bnd->bmn", ep.queries, x).div(192**.5).softmax(-1)
    v = torch.einsum("bnd,mcd->bnmc", x, ep.values.weight.view(8, 24, 192))
    y = standard(torch.einsum("bmn,bnmc->bmc", a, v).flatten(1))
    assert torch.allclose(ep(features).label_logits, ep.classifier(y), rtol=1e-9, atol=1e-12)
    aim = AttentionPool(backbone, 5).double().train()
    x = standard(x.flatten(0, 1)).view_as(x)
    k, v = (torch.einsum("bnd,hcd->bnhc", x, w.view(12, 16, 192)) for w in aim.attend.kv.weight.chunk(2))
    a = torch.einsum("hc,bnhc->bhn", aim.attend.latent.view(12, 16), k).div(4).softmax(-1)
    pooled = torch.einsum("bhn,bnhc->bhc", a, v).flatten(1)
    assert torch.allclose(aim(features).label_logits, aim.classifier(pooled), rtol=1e-9, atol=1e-12)


# By name

def test_a_name_is_a_head_of_the_command():
    assert {*HEADS, "own"} == set(NEEDS["lr"]["head"]) | set(FITTED)
    classes = {name: make for name, make in HEADS.items() if isinstance(make, type)}
    assert {name for name, make in classes.items() if issubclass(make, FittedHead)} == set(FITTED)


@pytest.mark.parametrize("head", HEADS)
def test_a_configuration_makes_the_head_it_names(head):
    config = config_of(head)
    model = make_model(config.model, make_backbone(config.model, 3), 3)
    assert head_name(model) == head and not model.training
    cost = config_cost(config.model, 3)
    assert cost.trained == sum(p.numel() for p in model.branch.parameters()) or head == "knn"
    words = preview(cost, config, 60, 10)
    assert ("fitted to 60 images and chosen by 10" in words) == (head in FITTED)
    assert (cost.train > 0) == (head not in FITTED)


@pytest.mark.parametrize("values", [dict(head="knn", lr=.1), dict(head="logistic", epochs=3),
                                    dict(head="ep", num_objects=3), dict(head="alf", target_layer=3),
                                    dict(head="vjepa2", drop_path=.1),
                                    dict(head="vt", temperature=.2), dict(head="linear", num_layers=3),
                                    dict(head="vt", diversity_weight=.1), dict(head="aim", nv_weights="x")], ids=str)
def test_an_option_of_another_head_is_refused(values):
    with pytest.raises(InputError, match="no effect here: it needs --head"): Config.of(**values)


def test_a_batch_norm_is_not_cut_into_micro_batches():
    for head in "ep", "aim", "alf":
        with pytest.raises(InputError, match="batch norm"): Config.of(head=head, micro_batches=2)
    assert Config.of(head="vt", micro_batches=2)


def test_what_is_chosen_by_held_out_images_needs_some():
    with pytest.raises(InputError, match="held out"): Config.of(head="knn", selection_fraction=0., alpha=.5)


def test_a_head_somebody_wrote_is_not_made_by_the_command():
    with pytest.raises(InputError, match="somebody wrote"): make_model(ModelConfig(head="own"), None, 3)


@pytest.mark.parametrize("control", [name for name in CONTROLS if name != "none"])
def test_a_control_is_trained_by_flags_and_read_back(control, images, tmp_path):
    config = config_of("llb", data_dir=images, save_dir=tmp_path, augment="none", control=control)
    assert control in config.run_folder.name
    metrics = train(config)
    model = RunReader(config.run_folder).load_model()
    assert control_name(model) == control and evaluate(model, load_data(images)).metrics["label"] == metrics["label"]
    assert isinstance(make_loss(model, config.optim), LLBLoss) == (control != "gelu")
    assert complete_config(None, model, load_data(images)).model.control == control


def test_mutual_information_is_a_flag():
    config = config_of("llb", undecided_weight=.5)
    model = make_model(config.model, make_backbone(config.model, 3), 3)
    assert make_loss(model, config.optim).weights == {"entropy": -.5, "visual_cross_entropy": 1., "undecided": .5}
    with pytest.raises(InputError, match="no effect"): Config.of(control="gelu", undecided_weight=.5)


# What they read

@pytest.mark.parametrize("name", HEADS)
def test_cached_features_give_the_same_predictions(name, backbone, images, tmp_path, monkeypatch):
    monkeypatch.setenv("LLB_CACHE", str(tmp_path))
    model, few = fit_on_noise(small_head(name, backbone)), load_data(images).val
    scores = []
    for cache in False, True:
        loader = scoring_loader(model, few, Config.of(workers=0, cache=cache))
        with torch.no_grad():
            out = model.branch(features_of(model, next(iter(loader)), Runtime(torch.device("cpu"))))
        scores.append(out.label_logits)
    assert torch.allclose(*scores, rtol=.05, atol=.05)


def test_a_head_reads_visual_features_beside_scores_for_other_classes(images, tmp_path, monkeypatch):
    "The cache holds the backbone's own scores, and what the head reads besides."
    monkeypatch.setenv("LLB_CACHE", str(tmp_path))
    backbone = load_backbone("test_vit", pretrained=False, image_size=32, num_classes=5)
    found = evaluate(make_head_model("linear", backbone, 3), load_data(images), config=Config.of(workers=0, cache=True))
    assert {"visual", "label", "fused"} <= found.metrics.keys()


# The whole way

@pytest.mark.parametrize("head", ["linear", "knn", "logistic", "ep", "aim", "alf", "vjepa2", "vt"])
def test_a_rival_is_trained_scored_saved_and_read_back(head, images, tmp_path):
    config = config_of(head, data_dir=images, save_dir=tmp_path, name="run", augment="none")
    metrics = train(config)
    run = RunReader(tmp_path / "run")
    model = run.load_model()
    assert head_name(model) == head and run.config.model.head == head and not metrics["objects"]
    again = evaluate(model, run.load_data(), config=run.config)
    assert abs(again.metrics["label"]["nll"] - metrics["label"]["nll"]) < 1e-6
    assert len(model.predict(images / "circle")) == 20
    assert train(config.but(eval=True))["label"]["top1"] == metrics["label"]["top1"]
    assert train(config.but(resume=True))["label"] == metrics["label"]
    assert ("fit" in metrics) == (head in FITTED) and (tmp_path / "run" / "checkpoints").is_dir()
    from llb.apps.report import write_figures, write_report
    with pytest.raises(InputError, match="no latent objects"): write_report(run)
    with pytest.raises(InputError, match="no latent objects"): write_figures(run)


def test_a_saved_head_is_read_by_a_program_that_knows_nothing_of_it(tmp_path):
    torch.manual_seed(0)
    backbone = load_backbone("test_vit", pretrained=False, image_size=32, num_classes=3)
    make_head_model("ep", backbone, num_queries=8).save_pretrained(tmp_path / "ep")
    fit_on_noise(make_head_model("knn", backbone)).save_pretrained(tmp_path / "knn")
    program = (f"import llb; from pathlib import Path; folder = Path({str(tmp_path)!r})\n"
               "for name in 'ep', 'knn': print(type(llb.HeadModel.from_pretrained(folder / name).branch))")
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert "EfficientProbe" in found.stdout and "NearestNeighbours" in found.stdout, found.stderr


def test_own_heads_are_called_so_in_the_record(backbone, images, tmp_path):
    class Mean(nn.Module):
        def __init__(self, backbone, num_classes):
            super().__init__()
            self.classifier, self.visual_head = nn.Linear(backbone.dim, num_classes), None

        def forward(self, features):
            from llb.models.heads import HeadOutput
            return HeadOutput(None, self.classifier(features.tokens.mean(1)))

    bare = load_backbone("test_vit", pretrained=False, image_size=32)
    model = HeadModel(bare, Mean, num_classes=3, target_layer=3)
    config = Config.of(epochs=1, batch_size=12, workers=0, augment="none", save_dir=tmp_path)
    Trainer(model, load_data(images), config).fit()
    run, = tmp_path.iterdir()
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["head"] == "own" and config["target_layer"] == 3 and "Mean" in run.name


@pytest.mark.slow
@pytest.mark.parametrize("head", ["knn", "logistic", "ep", "alf"])
def test_two_processes_train_a_rival(head, forked, images, tmp_path):
    unknown = dict.fromkeys(("num_objects", "num_layers", "target_layer"))
    own = {name: SMALL[name] for name in options_of_head(head) if name in SMALL}
    more = dict.fromkeys(("epochs", "lr")) if head in FITTED else {"epochs": 2}
    run = forked(2, head=head, data_dir=images, save_dir=tmp_path, **unknown | own | more)
    assert run.finish() == [0, 0], run.text
    metrics = RunReader(tmp_path / "run").metrics
    assert metrics["seen"]["unique"] == 12 and ("fit" in metrics) == (head in FITTED)
    if head in FITTED:   # the same images, whoever has read them
        config = config_of(head, data_dir=images, save_dir=tmp_path, name="alone", augment="none")
        assert train(config)["fit"] == pytest.approx(metrics["fit"], rel=1e-3)


def test_flags_name_a_head():
    assert parse_command(["--head", "vt", "--num_layers", "3"]).model.head == "vt"
    assert make_branch is HEADS["llb"]
