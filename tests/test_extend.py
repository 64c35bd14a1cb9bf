"""What people add: heads, assigners, embeddings and loss terms go through training, saving and loading like ours."""
import json
import os

import pytest
import torch
from conftest import make_images
from PIL import Image
from torch import nn

from llb.core.distributed import Runtime
from llb.core.errors import InputError
from llb.data.splits import load_data
from llb.models.backbone import load_backbone
from llb.models.heads import Head, HeadModel, HeadOutput, make_visual_head
from llb.models.llb import LLB
from llb.models.loss import HeadLoss, LLBLoss
from llb.models.objects import LatentObjects, ObjectTable, SoftmaxAssigner
from llb.runs.config import Config
from llb.training.step import TrainStep
from llb.training.trainer import Trainer

CPU = Runtime(torch.device("cpu"))


class Probe(Head):
    "A linear classifier of the mean patch."
    def __init__(self, backbone, num_classes):
        super().__init__()
        self.classifier = nn.Linear(backbone.dim, num_classes)
        own = backbone.num_classes == num_classes
        self.visual_head = make_visual_head(0 if own else backbone.num_features, num_classes)

    def forward(self, features):
        label_logits = self.classifier(self.patches(features).mean(1))
        return HeadOutput(self.visual_logits(features), label_logits, alpha=self.alpha)


class NoisyAssigner(SoftmaxAssigner):
    "Gumbel noise on the scores in training: another draw at each call."
    def forward(self, patches):
        noise = -torch.empty(*patches.shape[:-1], self.out_features, dtype=patches.dtype).exponential_().log()
        return (super().forward(patches).log() + noise).softmax(-1)


class NormalisedTable(ObjectTable):
    def forward(self): return nn.functional.normalize(self.weight, dim=-1)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return load_backbone("test_vit", pretrained=False, image_size=32, num_classes=5)


@pytest.fixture
def make_llb(backbone):
    def make(**options):
        return LLB(backbone, num_objects=6, num_layers=2, target_layer=3, num_classes=3, **options)
    return make


def batch_of(n):
    images = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"image": images, "label": torch.arange(n) % 3, "index": torch.arange(n)}


def one_step(model, micro, **more):
    "Terms of a step and the parameters after it."
    config = Config.of(opt="SGD", lr=.1, clip_grad=None, micro_batches=micro)
    terms = TrainStep(model.double().train(), config, CPU, **more)(batch_of(7), 0, 0.)
    return terms, [p.detach() for p in model.branch.parameters()]


@pytest.mark.parametrize("classes", [5, 3], ids=["own-scores", "visual-head"])
def test_micro_batches_do_not_change_the_step_of_any_head(classes, backbone):
    results = []
    for micro in 1, 3:
        torch.manual_seed(0)
        results.append(one_step(HeadModel(backbone, Probe, num_classes=classes, target_layer=3), micro))
    (terms, whole), (terms3, split) = results
    assert list(terms) == ["loss", "cross_entropy", "visual_cross_entropy"][:2 + (classes == 3)] == list(terms3)
    assert all(torch.allclose(terms[k], terms3[k], rtol=1e-9) for k in terms)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(whole, split, strict=True))


def test_a_term_is_a_mean_over_the_images_of_a_step(make_llb):
    loss = LLBLoss(terms={"square": (.5, lambda out, labels: out.label_logits.square().mean(-1) * (labels + 1))})
    results = []
    for micro in 1, 2:
        torch.manual_seed(0)
        results.append(one_step(make_llb(), micro, loss=loss)[0])
    assert list(results[0]) == ["loss", "cross_entropy", "entropy", "patch_entropy", "visual_cross_entropy", "square"]
    assert all(torch.allclose(results[0][k], results[1][k], rtol=1e-9) for k in results[0])
    with pytest.raises(InputError, match="'entropy'"): HeadLoss(terms={"entropy": loss.terms["square"]})


def test_random_numbers_of_an_assigner_are_the_same_when_assignments_are_made_again(monkeypatch):
    "Else the gradient would belong to another loss than the one that was computed."
    monkeypatch.setattr("llb.models.objects.CHUNK", 2 * 5 * 6)
    torch.manual_seed(0)
    objects = LatentObjects(8, 6, assigner=NoisyAssigner, embedding=NormalisedTable).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    def loss(x):
        torch.manual_seed(1)
        z, means, _ = objects.compact(x)
        return z.square().mul(torch.arange(8)).sum() + means.square().sum()
    gradient, = torch.autograd.grad(loss(x), x)
    step = torch.randn_like(x) * 1e-6
    with torch.no_grad(): change = loss(x + step) - loss(x)
    assert torch.isclose(change, (gradient * step).sum(), rtol=1e-3)


@pytest.mark.parametrize("parts", [dict(assigner=lambda d, k: nn.Linear(d, k + 1)),
                                   dict(embedding=lambda d, k: ObjectTable(d + 1, k))], ids=["assigner", "embedding"])
def test_a_part_of_another_shape_is_refused(parts, make_llb):
    with pytest.raises(InputError, match=f"The {next(iter(parts))} gives a tensor of shape"): make_llb(**parts)


# Saved and loaded

def test_parts_are_found_by_name_or_passed(make_llb, tmp_path):
    model, images = make_llb(assigner=SoftmaxAssigner, embedding=NormalisedTable), torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path / "classes")
    again = LLB.from_pretrained(tmp_path / "classes")
    assert torch.equal(again(images).label_logits, model(images).label_logits)
    assert type(again.branch.objects.embedding) is NormalisedTable
    made = make_llb(assigner=lambda d, k: SoftmaxAssigner(d, k, temperature=.5))
    made.save_pretrained(tmp_path / "made")
    with pytest.raises(InputError, match="assigner .*function.* is not at hand"): LLB.from_pretrained(tmp_path / "made")
    again = LLB.from_pretrained(tmp_path / "made", assigner=lambda d, k: SoftmaxAssigner(d, k, temperature=.5))
    assert torch.equal(again(images).label_logits, made(images).label_logits)


def test_a_head_is_trained_scored_saved_and_read(backbone, images, tmp_path):
    data = load_data(images)
    model = HeadModel(backbone, Probe, num_classes=3, target_layer=3)
    config = Config.of(epochs=2, batch_size=8, lr=1e-2, save_dir=tmp_path, name="run")
    metrics = Trainer(model, data, config).fit()
    assert metrics["seen"]["unique"] == len(data.val) and {"visual", "label", "fused"} <= set(metrics)
    again = HeadModel.from_pretrained(tmp_path / "run" / "model")
    assert again.classes == list(data.classes) and again.metrics["fused"] == metrics["fused"]
    with pytest.raises(InputError, match="of kind HeadModel, not LLB"): LLB.from_pretrained(tmp_path / "run" / "model")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"| fused | {metrics['fused']['top1']:.1%} |" in card and "circle, square, triangle" in card


def damage(folder, how):
    if how.startswith("no "): (folder / how[3:]).unlink()
    elif how.startswith("cut "): os.truncate(folder / how[4:], 200)
    else:
        config = json.loads((folder / "config.json").read_text())
        if how == "version 0.1": del config["format"], config["llb"]
        if how == "other shape": config["model"]["num_objects"] = 9
        if how == "other backbone": config["frozen"]["content_hash"] = "0" * 16
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("how,words", [
    ("no model.safetensors", "holds no model.safetensors"), ("no config.json", "holds no config.json"),
    ("cut config.json", "is damaged"), ("cut model.safetensors", "does not hold this model's weights"),
    ("no backbone.safetensors", "trained with backbone weights"), ("cut backbone.safetensors", "backbone.safetensors"),
    ("version 0.1", "format 1 by llb 0.1"),
    ("other shape", "does not hold this model's weights"), ("other backbone", "trained with backbone weights")])
def test_a_folder_that_is_no_whole_model_is_refused(how, words, make_llb, tmp_path):
    make_llb().save_pretrained(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(InputError, match=words): LLB.from_pretrained(tmp_path)


def test_what_is_neither_folder_nor_repository_is_refused(tmp_path):
    for source in tmp_path / "nowhere", "no such/name/at all":
        with pytest.raises(InputError, match="There is no folder"): LLB.from_pretrained(source)


# Predictions

def test_predictions_of_files_folders_and_images(make_llb, tmp_path):
    folder, model = make_images(tmp_path / "shapes", 2), make_llb()
    model.classes = ["circle", "square", "triangle"]
    found = model.predict(folder)
    assert found.images == [str(folder / name / f"{i:02}.png") for name in model.classes for i in (0, 1)]
    assert all(torch.allclose(p.sum(-1), torch.ones(6)) and p.shape == (6, 3) for p in found.probabilities.values())
    files = sorted(folder.rglob("*.png"))
    for same in files, [str(f) for f in files], [Image.open(f) for f in files], [folder / "circle", files[2:]]:
        again = model.predict(same, batch_size=4)
        assert torch.allclose(again.probabilities["fused"], found.probabilities["fused"], atol=1e-6)
    assert torch.equal(model.predict(folder, alpha=1).probabilities["fused"], found.probabilities["visual"])
    one = model.train().predict(files[0])
    assert model.training and one.top(2)[0][0][0] in model.classes
    assert files[0].name in repr(one) and "<td>" in one._repr_html_()
    with pytest.raises(InputError, match="no image or folder"): model.predict(tmp_path / "none.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"): model.predict(tmp_path / "empty")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be decoded"): model.predict(tmp_path / "broken.png")


def test_everything_shown_says_what_it_is(backbone, make_llb):
    model = make_llb()
    out = model(torch.randn(2, 3, 32, 32))
    for shown, words in (backbone, "test_vit"), (model, "num_objects 6"), (out, "2 x 2"):
        assert words in repr(shown) and type(shown).__name__ in repr(shown) and "<table" in shown._repr_html_()
        assert len(repr(shown)) < 400
