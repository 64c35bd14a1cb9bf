"""What a configuration accepts, what a trainer takes from its model, and what a resumed run may change."""
import json
from dataclasses import fields

import pytest
import torch
from torch import nn

from llb.core.errors import InputError
from llb.core.options import RANGES, check_option, in_words
from llb.data.splits import load_data
from llb.models.backbone import load_backbone
from llb.models.heads import HeadModel, HeadOutput
from llb.models.llb import LLB
from llb.runs.build import complete_config, make_backbone, make_model
from llb.runs.config import NEEDS, PARTS, Config, ModelConfig, OptimConfig, RunConfig
from llb.runs.folder import check_resumable, describe_data, read_events
from llb.training.evaluate import evaluate, format_table, metric_rows
from llb.training.trainer import Trainer

SMALL = dict(backbone="test_vit", random_backbone=True, image_size=32, num_layers=3, target_layer=3, num_objects=16,
             batch_size=6)
FIELDS = {f.name: f for part in PARTS.values() for f in fields(part)}

WRONG_TYPES = [("cache", "no"), ("augment", "auto"), ("lr_scheduler", "cosine"), ("backbone_dtype", "float16"),
               ("lr", True), ("lr", "1e-3"), ("epochs", 1.5), ("epochs", True), ("epochs", "x"), ("milestones", ["a"]),
               ("milestones", 3.0), ("timeout", "x"), ("seed", 1.5), ("cache", 2), ("dataset", 3), ("name", 5),
               ("opt", "Lion"), ("image_size", "64"), ("random_backbone", "false"), ("alpha", "x"),
               ("loggers", ["tensorboards"])]
WRONG_VALUES = [("clip_grad", -1), ("clip_grad", 0), ("warmup_epochs", float("inf")), ("t_max", -1), ("t_max", 0),
                ("temperature", float("inf")), ("gamma", float("inf")), ("visual_lr", float("inf")), ("num_classes", 0),
                ("save_every", -1), ("timeout", -1), ("timeout", float("nan")), ("momentum", -1), ("lr", float("nan")),
                ("num_layers", 1), ("alpha", 2), ("device", "tpu"), ("device", ""), ("data_dir", ""),
                ("data_dir", "x" * 300), ("checkpoint", "a/" + "x" * 300), ("name", " "), ("auto_augment", "rand-zz"),
                ("name", "a\nb"),
                ("name", "x" * 300), ("save_dir", "a\0b"), ("seed", 10**20), ("cutmix", float("inf")), ("drop_path", 2)]
WITHOUT_EFFECT = [dict(step_size=3), dict(t_max=3, lr_scheduler="none"), dict(momentum=.5), dict(mixup=.3),
                  dict(cache_views=2), dict(cache_views=2, cache=True, augment="none"), dict(save=False, save_every=1),
                  dict(eval=True, resume=True), dict(resume=True, overwrite=True), dict(gamma=.5),
                  dict(refit=True, last_epoch=True, alpha=.8), dict(refit=True, last_epoch=True, objective="visual")]


@pytest.mark.parametrize("name,value", WRONG_TYPES + WRONG_VALUES, ids=str)
def test_a_wrong_value_is_refused_wherever_it_comes_from(name, value, tmp_path):
    with pytest.raises(InputError, match=f"^{name} is .*, but .*\\.$"): Config.of(**{name: value})
    (tmp_path / "config.json").write_text(json.dumps({"config": {name: value}}))
    with pytest.raises(InputError, match=name): Config.from_file(tmp_path / "config.json")


@pytest.mark.parametrize("values", WITHOUT_EFFECT, ids=str)
def test_what_has_no_effect_is_refused(values):
    with pytest.raises(InputError): Config.of(**values)


UNSETTLED = [(dict(), "add --last_epoch and --alpha A"), (dict(alpha=.8), "add --last_epoch"),
             (dict(last_epoch=True), "add --alpha A"), (dict(refit=True), "add --last_epoch and --alpha A"),
             (dict(objective="visual"), "add --last_epoch")]


@pytest.mark.parametrize("values,missing", UNSETTLED, ids=str)
def test_nothing_can_be_chosen_where_no_image_is_held_out(values, missing):
    with pytest.raises(InputError, match=f"selection_fraction is 0: .* {missing}\\.$"):
        Config.of(selection_fraction=0, **values)


NOT_DEFAULT = {  # a right value for options whose default says nothing about others
    "alpha": .3, "nv_weights": "x", "backbone_dtype": "bfloat16", "auto_augment": "", "t_max": 3., "milestones": (3.,),
    "drop_path": .1, "lr_min": 5e-5, "head": "vt", "control": "hard", "undecided_weight": .1,
    "warmup_epochs": 1., "opt": "Adam", "lr_scheduler": "none"}
MET = {"above 0": .1}
UNMET = {"objective": {"llb": "visual", "visual": "llb"}, "head": {"llb": "knn"}, "control": {"none": "gelu"},
         "opt": {"SGD": "Adam"}, "augment": {"randaugment": "none"},
         "lr_scheduler": dict.fromkeys(["CosineAnnealingLR", "StepLR", "MultiStepLR", "ExponentialLR"], "none"),
         "checkpoint": {None: "w.pth"}, "diversity_weight": {"above 0": 0.}, "weight_decay": {"above 0": 0.}}


def other_than_default(name):
    "A value that an option may have and does not have by itself."
    default = FIELDS[name].default
    if name in NOT_DEFAULT: return NOT_DEFAULT[name]
    return not default if isinstance(default, bool) else default + 1 if isinstance(default, int) else default / 2


def test_every_option_says_what_it_needs_and_what_numbers_it_takes():
    assert set(NEEDS) == set(FIELDS), "declare a new option in NEEDS; {} when it always has an effect"
    numeric = {name for name, f in FIELDS.items() if "number" in in_words(f.type)}
    assert numeric == set(RANGES), "declare the range of a new option in llb.core.options"
    for name, f in FIELDS.items(): Config.of(**{name: f.default})   # a default always fits


@pytest.mark.parametrize("name,other", [(n, o) for n, needs in NEEDS.items() for o in needs])
def test_an_option_without_effect_is_refused(name, other):
    "Each option with each of its needs unmet, the others met; and accepted when all are met."
    met = {o: MET.get(w[0], w[0]) for o, w in NEEDS[name].items()}
    if met.get("lr_scheduler") == "MultiStepLR": met["milestones"] = (3.,)
    value = {name: other_than_default(name)}
    assert Config.of(**{**met, **value})
    wanted = NEEDS[name][other][0]
    unmet = {other: not wanted if isinstance(wanted, bool) else UNMET[other][wanted]}
    with pytest.raises(InputError, match=f"no effect here.*--{other}"):
        Config.of(**{**met, **unmet, **value})
    assert Config.of(**{**unmet, name: FIELDS[name].default}), "the default may be given"


@pytest.mark.parametrize("wrong", [dict(num_objects=1), dict(num_objects=10**12), dict(num_objects="16"),
                                   dict(num_layers=True), dict(drop_path=2), dict(num_classes=-1), dict(num_classes=0),
                                   dict(temperature=float("nan")), dict(alpha=float("inf")), dict(target_layer="3")],
                         ids=str)
def test_a_wrong_value_is_refused_in_python_as_well(wrong):
    backbone = load_backbone("test_vit", pretrained=False, image_size=32, num_classes=3)
    with pytest.raises(InputError, match=f"^{next(iter(wrong))} is .*, but .*\\.$"):
        LLB(backbone, **{**dict(num_objects=8, num_layers=2, target_layer=3), **wrong})


SOME = dict(zip(("nan", "inf", "-1", "0", "1.5"), (float("nan"), float("inf"), -1, 0, 1.5)))
ZERO = {"drop_path", "alpha", "cache_views", "workers", "weight_decay", "momentum", "lr_min", "warmup_epochs",
        "diversity_weight", "undecided_weight", "backbone_drop_path", "random_erasing", "mixup", "cutmix", "smoothing",
        "save_every", "seed", "selection_fraction"}
ABOVE_1 = {"temperature", "lr", "visual_lr", "lr_min", "weight_decay", "t_max", "step_size", "milestones",
           "warmup_epochs", "clip_grad", "diversity_weight", "undecided_weight", "mixup", "cutmix", "timeout"}
MAY_BE = {"nan": set(), "inf": set(), "-1": {"seed"}, "0": ZERO, "1.5": ABOVE_1}


@pytest.mark.parametrize("some", SOME)
def test_every_numeric_option_takes_what_it_can_use(some):
    "Each with nan, inf, -1, 0 and 1.5; those that are not in the list are refused by name."
    for name in RANGES:
        value = (SOME[some],) if name == "milestones" else SOME[some]
        try: check_option(name, value, FIELDS[name].type)
        except InputError as e: assert str(e).startswith(f"{name} is ") and name not in MAY_BE[some], e
        else: assert name in MAY_BE[some], name


def test_names_are_unique_and_unknown_ones_get_hints():
    assert len(FIELDS) == sum(len(fields(part)) for part in PARTS.values())
    with pytest.raises(InputError, match="opjects .did you mean num_objects"): Config.of(opjects=3)


BAD_FILES = {"syntax": "epochs = ", "encoding": "epochs = '\xff'", "table": "[model]\nnum_objects = 3"}


@pytest.mark.parametrize("text", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_cannot_be_read_is_named(text, tmp_path):
    (tmp_path / "x.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError): Config.from_file(tmp_path / "x.toml")


@pytest.fixture
def model():
    config = Config.of(**SMALL)
    torch.manual_seed(0)
    return make_model(config.model, make_backbone(config.model, 3), 3)


def test_what_a_model_fixes_is_read_from_it(model, images):
    data = load_data(images)
    config = complete_config(None, model, data, optim=OptimConfig(epochs=7), run=RunConfig(seed=3))
    assert (config.model.num_objects, config.model.num_layers, config.model.target_layer) == (16, 3, 3)
    assert config.model.image_size == 32 and config.model.backbone == "test_vit"
    assert config.data.dataset == "ImageFolder" and config.data.data_dir == str(images.resolve())
    assert config.optim.epochs == 7 and config.run.seed == 3
    assert complete_config(config, model, data) == config


@pytest.mark.parametrize("values", [dict(num_objects=64), dict(num_layers=2), dict(temperature=.3), dict(image_size=64),
                                    dict(data_dir="/elsewhere")], ids=str)
def test_a_configuration_that_contradicts_the_model_or_the_data_is_refused(values, model, images):
    with pytest.raises(InputError, match="give it once"): Trainer(model, load_data(images), Config.of(**values))


def test_a_model_for_other_classes_is_refused(images):
    config = Config.of(**SMALL)
    other = make_model(config.model, make_backbone(config.model, 5), 5)
    with pytest.raises(InputError, match="5 classes"): Trainer(other, load_data(images), config)


def test_what_is_held_out_is_said_once(model, images):
    settled = dict(alpha=.8, last_epoch=True)
    for data, config in ((load_data(images), Config.of(selection_fraction=0, **settled)),
                         (load_data(images, 0), Config.of(**settled))):
        with pytest.raises(InputError, match="images out for choices; load them with the same"):
            Trainer(model, data, config)


class Linear(nn.Module):
    "A head without a visual prediction."
    def __init__(self, backbone, num_classes):
        super().__init__()
        self.classifier = nn.Linear(backbone.dim, num_classes)

    def forward(self, features): return HeadOutput(None, self.classifier(features.tokens.mean(1)))


def test_a_head_without_a_visual_prediction_is_trained_and_evaluated_by_its_own(images, tmp_path):
    "And an epoch-end measure of one's own is written into the epochs' events."
    backbone = load_backbone("test_vit", pretrained=False, image_size=32)
    data = load_data(images)
    config = Config.of(epochs=1, batch_size=12, workers=0, augment="none", save_dir=str(tmp_path))
    model = HeadModel(backbone, Linear, num_classes=3, target_layer=3)
    metrics = Trainer(model, data, config, measures={"n": lambda model, scores, usage: len(scores.index)}).fit()
    assert set(metrics) >= {"label", "seen"} and not {"visual", "fused", "alpha"} & set(metrics)
    assert metrics["chosen_epoch"]["by"] == "lowest label NLL on the selection split"
    assert [row[0] for row in metric_rows(metrics)[1]] == ["label-focused"] and "n = 12" in format_table(metrics)
    run, = tmp_path.iterdir()
    assert "Linear" in run.name and read_events(run, "epoch")[0]["measures"] == {"n": len(data.selection)}
    again = evaluate(model, data)
    assert again.metrics["label"] == metrics["label"] and "label-focused" in again._repr_html_()


def saved_state(data, config, without=()):
    about = describe_data(data)
    before = {name: value for name, value in json.loads(json.dumps(config.to_dict())).items() if name not in without}
    return about, {"config": before, "classes": about["classes"], "images": about["train_names"],
                   "fingerprint": about["splits"]["train"]["fingerprint"]}


def test_a_resumed_run_may_change_what_changes_no_result(images):
    data, config = load_data(images), Config.of(**SMALL)
    about, saved = saved_state(data, config, without=("compile", "cache_views"))   # options that came later
    free = dict(), dict(cache_images=True), dict(epochs=9), dict(workers=0), dict(name="b"), dict(micro_batches=2)
    for change in free:
        check_resumable(saved, config.but(**change), about)
    for change in dict(compile=True), dict(backbone_dtype="bfloat16"), dict(lr=.5), dict(seed=1), dict(num_objects=3):
        with pytest.raises(InputError, match=next(iter(change))): check_resumable(saved, config.but(**change), about)


def test_defaults_are_the_papers():
    model = ModelConfig()
    assert (model.num_objects, model.num_layers, model.target_layer, model.temperature) == (2048, 6, 11, .1)
