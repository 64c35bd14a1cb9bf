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
from llb.models.backbone import BackboneOutput, load_backbone
from llb.models.heads import Head, HeadModel, HeadOutput, make_visual_head
from llb.models.llb import LabelBranch, LLB
from llb.models.loss import HeadLoss, LLBLoss, undecided
from llb.models.objects import (BorrowedAssignments, COMPACT, entropy, GeluScores, HardAssigner, LatentObjects,
                                match_temperature, mean_patches, MeanTable, ObjectTable, PermutedTable, replaced,
                                set_centres, SoftmaxAssigner, UniformAssigner)
from llb.models.rivals import bag_of_objects
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


# Controls

FROZEN = {"E": ("embedding",), "W": ("visual_block", "assigner"), "both": ("visual_block", "assigner", "embedding")}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_a_frozen_part_stays_as_it_was_in_training_and_the_rest_does_not(frozen, make_llb):
    torch.manual_seed(0)
    model = make_llb(frozen=frozen)
    before = {name: p.detach().clone() for name, p in model.branch.named_parameters()}
    step = TrainStep(model.train(), Config.of(lr=1e-2), CPU)
    for number in range(2): step(batch_of(7) | {"image": batch_of(7)["image"].float()}, number, 0.)
    changed = {name for name, p in model.branch.named_parameters() if not torch.equal(p, before[name])}
    fixed = {name for name in before if name.removeprefix("objects.").startswith(frozen)}
    assert fixed and not changed & fixed and {"cls_token", "classifier.weight", "norm.bias"} <= changed
    assert ("objects.embedding.weight" in changed) == ("embedding" not in frozen)


def test_a_hidden_layer_in_place_of_assignments_has_the_size_of_llb_and_trains_by_cross_entropy(make_llb):
    torch.manual_seed(0)
    plain, hidden = make_llb(), make_llb(assigner=GeluScores)
    count = [sum(p.numel() for p in model.branch.parameters()) for model in (plain, hidden)]
    assert count[0] == count[1] and (hidden(torch.randn(2, 3, 32, 32)).assignments < 0).any()
    terms, _ = one_step(hidden, 1, loss=HeadLoss())
    assert list(terms) == ["loss", "cross_entropy", "visual_cross_entropy"]


def test_a_hard_choice_goes_forward_and_the_softmax_goes_backward(make_llb):
    torch.manual_seed(0)
    soft, hard = SoftmaxAssigner(8, 5).double(), HardAssigner(8, 5).double()
    hard.load_state_dict(soft.state_dict())
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(hard(x), nn.functional.one_hot(soft(x).argmax(-1), 5).double(), atol=1e-12)
    weights = torch.randn(5, dtype=torch.float64)
    def gradients(assign): return torch.autograd.grad((assign(x) * weights).sum(), [x, assign.weight, assign.bias])
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(gradients(soft), gradients(hard)))


@pytest.mark.parametrize("target", [.05, .7, 1.5])
def test_k_means_is_as_soft_as_it_is_told_to_be(target):
    torch.manual_seed(0)
    assign, patches = SoftmaxAssigner(16, 6), 20 * torch.randn(8, 10, 16)
    set_centres(assign, patches[0, :6])
    assert match_temperature(assign, patches, target) == assign.temperature
    assert abs(entropy(assign(patches)).mean().item() - target) < 1e-3
    order = torch.cdist(patches, patches[0, :6]).argmin(-1)
    assert torch.equal(assign(patches).argmax(-1), order)


def test_an_object_without_patches_has_no_mean():
    a = torch.tensor([[[1., 0, 0], [0, 1, 0]]])
    rows = mean_patches([(a, torch.tensor([[[2., 4], [6, 8]]])), (a, torch.tensor([[[4., 4], [6, 8]]]))])
    assert rows.tolist() == [[3, 4], [6, 8], [0, 0]]


def test_information_needs_kept_assignments(make_llb):
    loss = LLBLoss(terms={"undecided": (.5, undecided)})
    torch.manual_seed(0)
    (whole, _), (split, _) = (one_step(make_llb(), micro, loss=loss) for micro in (1, 1))
    assert "undecided" in whole and torch.isclose(whole["undecided"], whole["patch_entropy"], rtol=1e-6)
    backbone = load_backbone("test_vit", pretrained=False, image_size=32, num_classes=3)
    many = LLB(backbone, num_objects=COMPACT, num_layers=2, target_layer=3).train()
    with pytest.raises(InputError, match="fewer objects"): loss(many(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1]))


def planted(n, seed):
    "Tokens of 4 prototypes; the class says whether the two prototypes of an image are of the same pair: xor."
    draw = torch.Generator().manual_seed(seed)
    looks = 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    first, second = torch.randint(2, (n,), generator=draw), torch.randint(2, (n,), generator=draw)
    which = torch.stack([first, 2 + second], 1).repeat_interleave(4, 1)   # [n,8]
    tokens = looks[which] + .3 * torch.randn(n, 8, 32, generator=draw)
    return BackboneOutput(tokens, (2, 4), 0), first ^ second


def test_without_its_objects_a_trained_model_knows_nothing():
    torch.manual_seed(0)
    branch = LabelBranch(32, 4, 2, num_objects=16, num_layers=3).train()
    optimizer, loss = torch.optim.AdamW(branch.parameters(), 2e-3), LLBLoss()
    for step in range(60):
        features, labels = planted(64, step)
        loss(branch(features), labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    branch.eval()
    (features, labels), (others, _), objects = planted(400, 1000), planted(400, 1001), branch.objects
    @torch.no_grad()
    def right(): return (branch(features).label_logits.argmax(-1) == labels).float().mean().item()
    assert right() > .95
    with torch.no_grad(): a, elsewhere = branch(features).assignments, branch(others).assignments
    with replaced(objects, UniformAssigner(16)): assert abs(right() - .5) < .1
    with replaced(objects, embedding=MeanTable(objects.embedding, a.mean((0, 1)))): assert abs(right() - .5) < .1
    with replaced(objects, BorrowedAssignments(elsewhere)): assert abs(right() - .5) < .1
    permuted = []
    for seed in range(8):
        with replaced(objects, embedding=PermutedTable(objects.embedding, seed)): permuted.append(right())
    assert abs(sum(permuted) / 8 - .5) < .2 and right() > .95, "and it is itself again"


def test_a_bag_of_objects_is_fitted_by_the_trainer_and_read_back(make_llb, images, tmp_path):
    torch.manual_seed(0)
    bag, data = bag_of_objects(make_llb()), load_data(images)
    config = Config.of(batch_size=12, workers=0, augment="none", save_dir=tmp_path, name="bag")
    metrics = Trainer(bag, data, config).fit()
    again = HeadModel.from_pretrained(tmp_path / "bag" / "model")
    assert metrics["fit"]["cells"] == 45 and again.metrics["label"] == metrics["label"]
    photo = images / "circle" / "00.png"
    assert torch.equal(again.predict(photo).probabilities["label"], bag.predict(photo).probabilities["label"])
    with pytest.raises(InputError, match="another assigner"): bag_of_objects(make_llb(assigner=HardAssigner))


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
