"""`llb evaluate` and `llb train --eval`: a head is scored with what it was trained with, or refused."""
import csv
import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import draw, make_images
from running import flags, TINY
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo

import llb
from llb.cli import main
from llb.core.errors import InputError
from llb.data.images import scan_folder
from llb.models.backbone import load_backbone
from llb.models.llb import LLB, to_reference_state_dict
from llb.training.evaluations import COLUMNS, evaluate_runs
from llb.training.evaluate import evaluate

SYNSETS = ImageNetInfo("imagenet-1k").label_names()
CLASSES = "circle", "square", "triangle"


def train(*words, **options):
    "The training command in this process."
    from llb.train import main as command
    command([*flags(**{**TINY, "epochs": 1, "image_size": 32, **options}), *words])


def numbers(run, name): return json.loads((run / "evaluations" / name / "metrics.json").read_text())


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    "The same images in class folders of other names or another order, some of them missing; keyed by what they are."
    root = tmp_path_factory.mktemp("shapes")
    make_images(root / "same", 6)
    for name in "reordered", "foreign", "subset": shutil.copytree(root / "same", root / name)
    for i, c in enumerate(CLASSES): (root / "foreign" / c).rename(root / "foreign" / f"z{i}")
    shutil.rmtree(root / "subset" / "square")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory, shapes):
    "A finished run on the images, which has a head of its own and a backbone with a head."
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    backbone = load_backbone("test_vit.r160_in1k", pretrained=False, image_size=32, num_classes=3)
    save_file(backbone.state(), folder / "right.safetensors")
    other = load_backbone("test_vit.r160_in1k", pretrained=False, image_size=32, num_classes=3)
    save_file(other.state(), folder / "wrong.safetensors")
    train(data_dir=shapes / "same", save_dir=folder, name="run", random_backbone=None,
          checkpoint=folder / "right.safetensors")
    return folder / "run"


@pytest.fixture
def copy(run, tmp_path):
    "A copy of the run, to write into."
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


# The matrix

def images_of(shapes, classes):
    "Images whose labels count the class folders in another order than their names have, for `reordered`."
    images = scan_folder(shapes / classes)
    if classes != "reordered": return images
    from dataclasses import replace
    order = images.classes[::-1]
    return replace(images, classes=order, labels=tuple(order.index(images.classes[y]) for y in images.labels))


def of_evaluate(run, backbone, layer, images):
    "What `llb train --eval` does with a run, on given images."
    from llb.runs.config import Config
    from llb.training.evaluations import subject_of
    record = json.loads((run / "config.json").read_text())["config"]
    config = Config.of(**record).but(checkpoint=str(run.parent / f"{backbone}.safetensors"), target_layer=layer)
    return evaluate(subject_of(config).model, images)


def of_nv_weights(run, backbone, layer, images):
    "A model on a backbone, filled with trained weights."
    from llb.runs.config import ModelConfig
    from llb.runs.build import make_backbone, make_model
    config = ModelConfig(backbone="test_vit.r160_in1k", checkpoint=str(run.parent / f"{backbone}.safetensors"),
                         image_size=32, num_objects=8, num_layers=2, target_layer=layer, nv_weights=str(run / "model"))
    return evaluate(make_model(config, make_backbone(config, 3), 3), images)


def of_from_pretrained(run, backbone, layer, images):
    "A saved model on a given backbone; its layer is its own, whatever one would like."
    given = load_backbone("test_vit.r160_in1k", run.parent / f"{backbone}.safetensors", 3, 32)
    model = LLB.from_pretrained(run / "model", backbone=given)
    assert model.target_layer == 3
    return evaluate(model, images)


WAYS = {"evaluate": of_evaluate, "nv_weights": of_nv_weights, "from_pretrained": of_from_pretrained}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("classes", ["same", "reordered", "subset", "foreign"])
@pytest.mark.parametrize("layer", [3, 2], ids=["right layer", "wrong layer"])
@pytest.mark.parametrize("backbone", ["right", "wrong"])
def test_a_number_is_right_or_there_is_none(backbone, layer, classes, way, run, shapes):
    images, task = images_of(shapes, classes), lambda: WAYS[way](run, backbone, layer, images_of(shapes, classes))
    wrong_layer = layer != 3 and way != "from_pretrained"
    refusal = ("backbone weights" if backbone == "wrong" else "target_layer 3, not 2" if wrong_layer
               else "classes that the model does not know: 'z0'" if classes == "foreign" else None)
    if refusal:
        with pytest.raises(InputError, match=refusal): task()
        return
    found, wanted = task(), evaluate(LLB.from_pretrained(run / "model"), scan_folder(shapes / "same"))
    names = [images.classes[y] for y in images.labels]
    assert [CLASSES[y] for y in found.scores.label] == names
    kept = np.isin(wanted.scores.label, found.scores.label)
    assert np.array_equal(found.scores.label_probability, wanted.scores.label_probability[kept])
    assert ("masked" in found.metrics) == (classes == "subset")


def test_checkpoints_of_the_release_are_refused_on_another_backbone(run, tmp_path):
    model = LLB.from_pretrained(run / "model")
    torch.save({"model": to_reference_state_dict(model, "vit")}, tmp_path / "llb.pth")
    options = dict(data_dir=run.parent.parent, save_dir=tmp_path, eval=True, nv_weights=tmp_path / "llb.pth",
                   random_backbone=None)
    wrongs = ("wrong", {}, "backbone weights"), ("right", {"num_objects": 9}, "num_objects 8, not 9")
    for backbone, sizes, words in wrongs:
        with pytest.raises(InputError, match=words):
            score(**options, **sizes, checkpoint=run.parent / f"{backbone}.safetensors")


def score(**options):
    "What `llb train --eval` does, with its errors."
    from llb.runs.config import parse_command
    from llb.train import train as task
    return task(parse_command(flags(**{**TINY, **options})))


def test_a_checkpoint_of_the_release_scores_as_its_model(run, shapes, tmp_path):
    model = LLB.from_pretrained(run / "model")
    torch.save({"model": to_reference_state_dict(model, "vit")}, tmp_path / "llb.pth")
    found = score(data_dir=shapes / "same", save_dir=tmp_path, eval=True, nv_weights=tmp_path / "llb.pth",
                  random_backbone=None, checkpoint=run.parent / "right.safetensors", alpha=.3)
    assert found["label"] == pytest.approx(evaluate(model, scan_folder(shapes / "same")).metrics["label"])
    assert found["classes"]["matched"].startswith("by position") and found["data"]["split"] == "all"
    assert len(list(tmp_path.glob("evaluations/*llb.pth/same-all/metrics.json"))) == 1


# --eval

def test_eval_takes_the_runs_own_configuration_and_refuses_flags_that_contradict_it(copy, capsys):
    from llb.train import main as command
    words = ["--eval", "--name", copy.name, "--save_dir", str(copy.parent), "--device", "cpu"]
    command(words)
    reported = json.loads((copy / "metrics.json").read_text())
    found = numbers(copy, "same-val")
    assert all(found[name] == reported[name] for name in ("visual", "label", "fused", "seen"))
    assert load_arrays(copy / "evaluations/same-val/predictions.safetensors")["index"].tolist() == list(range(3))
    wrongs = {"--target_layer": ("2", "target_layer 3, not 2"), "--temperature": ("5", "temperature 0.1, not 5"),
              "--num_objects": ("9", "num_objects 8, not 9"), "--num_classes": ("7", "num_classes 3, not 7"),
              "--image_size": ("64", "image_size"), "--checkpoint": (str(copy / "none.safetensors"), "no weights file")}
    for flag, (value, sentence) in wrongs.items():
        capsys.readouterr()
        with pytest.raises(SystemExit) as e: command([*words, flag, value])
        assert e.value.code == 2 and sentence in capsys.readouterr().err, flag


def test_training_does_not_start_from_a_head_of_other_classes_or_another_backbone(run, shapes, tmp_path, capsys):
    options = dict(save_dir=tmp_path, name="next", random_backbone=None, nv_weights=run / "model")
    right = dict(data_dir=shapes / "same", checkpoint=run.parent / "right.safetensors")
    wrongs = {"backbone weights": {**right, "checkpoint": run.parent / "wrong.safetensors"},
              "other classes": {**right, "data_dir": shapes / "foreign"}, "target_layer": {**right, "target_layer": 2}}
    for words, wrong in wrongs.items():
        with pytest.raises(SystemExit): train(**options, **wrong)
        assert words in capsys.readouterr().err and not (tmp_path / "next").exists()


# llb evaluate

def test_a_run_is_scored_on_its_own_split_and_other_folders_whole(copy, shapes, tmp_path, capsys):
    (tmp_path / "valonly").mkdir()
    shutil.copytree(shapes / "same", tmp_path / "valonly/val")
    for words, name, count in (((), "same-val", 3), (("--data_dir", shapes / "reordered"), "reordered-all", 18),
                               (("--data_dir", tmp_path / "valonly"), "valonly-val", 18),
                               (("--split", "train"), "same-train", 12), (("--split", "all"), "same-all", 18)):
        main(["evaluate", str(copy), *map(str, words), "--device", "cpu"])
        assert numbers(copy, name)["seen"]["scored"] == count
    said = capsys.readouterr().out
    assert "was trained on images of this split" in said and "on reordered-all" in said


def test_a_subset_is_scored_with_and_without_the_absent_classes(run, shapes, capsys):
    found = llb.evaluate(LLB.from_pretrained(run / "model"), scan_folder(shapes / "subset"))
    assert found.metrics["classes"] == {"matched": "by name", "known": 3, "present": 2}
    assert found.metrics["masked"]["label"]["top1"] >= found.metrics["label"]["top1"]
    assert "label-focused, masked" in repr(found) and "the other 1 cannot be predicted" in repr(found)
    assert "top5" not in found.metrics["label"]


def test_an_evaluation_replaces_one_of_the_same_images_and_no_other(copy, shapes, capsys):
    other = ["evaluate", str(copy), "--data_dir", str(shapes / "subset"), "--name", "mine", "--device", "cpu"]
    main(["evaluate", str(copy), "--name", "mine", "--device", "cpu"])
    main(["evaluate", str(copy), "--name", "mine", "--alpha", "1", "--device", "cpu"])
    assert numbers(copy, "mine")["alpha"] == {"value": 1.0, "chosen": "was given"}
    with pytest.raises(SystemExit): main(other)
    assert "holds the numbers of other images" in capsys.readouterr().err
    assert numbers(copy, "mine")["seen"]["scored"] == 3


def test_results_are_appended_in_timms_columns_and_ours(copy, shapes, tmp_path):
    table = tmp_path / "results.csv"
    words = copy, copy / "model", "--data_dir", shapes / "subset", "--results", table, "--device", "cpu"
    for _ in range(2): main(["evaluate", *map(str, words)])
    with open(table, newline="") as f: rows = list(csv.DictReader(f))
    assert len(rows) == 4 and list(rows[0]) == COLUMNS and rows[0] | {"model": ""} == rows[1] | {"model": ""}
    fused = numbers(copy, "subset-all")["fused"]
    assert float(rows[0]["top1"]) == pytest.approx(100 * fused["top1"], abs=1e-3) and rows[0]["top5"] == ""
    assert rows[0]["n"] == "12" and rows[0]["img_size"] == "32" and rows[0]["masked_top1"] != ""


def test_a_run_of_the_visual_objective_is_scored_by_itself(shapes, tmp_path):
    from llb.runs.folder import RunReader
    options = {"num_objects": None, "num_layers": None, "target_layer": None}
    train(data_dir=shapes / "same", save_dir=tmp_path, name="v", objective="visual", augment="none", **options)
    main(["evaluate", str(tmp_path / "v"), "--device", "cpu"])
    found = numbers(tmp_path / "v", "same-val")
    assert found["visual"] == pytest.approx(RunReader(tmp_path / "v").metrics["visual"]) and "label" not in found


# ImageNet and its relatives

@pytest.fixture(scope="module")
def thousand():
    "An untrained model of ImageNet's classes."
    torch.manual_seed(0)
    model = LLB(load_backbone("test_vit", pretrained=False, image_size=32), num_objects=4, num_layers=2, target_layer=1)
    model.classes = list(SYNSETS)
    return model


def tree(root, folders, each=1):
    "A few images in each of some class folders."
    rng = random.Random(0)
    for name in folders:
        (root / name).mkdir(parents=True)
        for i in range(each): draw("circle", rng, 32).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize("layout", ["v2", "a", "sketch", "described", "unnamed"])
def test_imagenets_relatives_are_matched_from_their_folders(layout, thousand, tmp_path):
    some, known = [2, 10, 100, 999], thousand.classes
    described = ["great_white_shark", "brambling", "black swan", "toilet tissue"]
    names = {"v2": [str(i) for i in some], "described": described}
    folders = names.get(layout, [SYNSETS[i] for i in some])
    root = tree(tmp_path / layout / ("sketch" if layout == "sketch" else "."), folders)
    from llb.data.datasets import load_split
    images, split = load_split("ImageFolder", tmp_path / layout)
    try:
        if layout == "unnamed": thousand.classes = None
        found = evaluate(thousand, images)
    finally: thousand.classes = known
    wanted = {name: i for name, i in zip(folders, some)}
    assert split == "all" and len(images) == 4 and root.is_dir()
    assert found.scores.label.tolist() == [wanted[f.split("/")[-2]] for f in images.files]
    assert found.metrics["classes"]["present"] == 4 and "top5" not in found.metrics["masked"]["label"]
    assert "top5" in found.metrics["label"]


def test_a_model_of_described_classes_takes_wordnet_ids(thousand, tmp_path):
    known, info = thousand.classes, ImageNetInfo("imagenet-1k")
    images = scan_folder(tree(tmp_path, [SYNSETS[5], SYNSETS[0]]))
    try:
        thousand.classes = info.label_descriptions()
        assert evaluate(thousand, images).scores.label.tolist() == [0, 5]
    finally: thousand.classes = known


# Bad input

def refused(capsys, *words):
    with pytest.raises(SystemExit) as e: main(["evaluate", *map(str, words), "--device", "cpu"])
    assert e.value.code in (1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_bad_input_is_answered_with_a_sentence(copy, shapes, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.csv").write_text("name,score\n")
    assert "There is no folder" in refused(capsys, tmp_path / "no where")
    assert "class folders" in refused(capsys, copy, "--data_dir", tmp_path / "empty")
    assert "no folder" in refused(capsys, copy, "--data_dir", tmp_path / "nowhere")
    assert "alpha is 2" in refused(capsys, copy, "--alpha", 2)
    assert "for --results" in refused(capsys, copy, "--results", tmp_path / "nowhere/results.csv")
    assert "other columns" in refused(capsys, copy, "--results", tmp_path / "other.csv")
    assert "no split 'test'" in refused(capsys, copy, "--data_dir", shapes / "same", "--split", "test")
    assert "'z0', 'z1', 'z2'" in refused(capsys, copy, "--data_dir", shapes / "foreign")
    assert "name is '../x'" in refused(capsys, copy, "--name", "../x")
    assert "name some with --data_dir" in refused(capsys, copy / "model")
    shutil.rmtree(copy / "evaluations")
    (copy / "evaluations").write_text("in the way")
    assert "cannot be written" in refused(capsys, copy)


def test_a_run_that_left_no_model_and_an_image_that_cannot_be_read_are_named(copy, shapes, tmp_path, capsys):
    broken = shutil.copytree(shapes / "same", tmp_path / "broken")
    (broken / "circle/00.png").write_bytes(b"no image")
    assert "00.png cannot be decoded" in refused(capsys, copy, "--data_dir", broken)
    main(["evaluate", str(copy), "--data_dir", str(broken), "--skip_unreadable", "--device", "cpu"])
    assert numbers(copy, "broken-all")["data"]["left_out"] == 1 and numbers(copy, "broken-all")["seen"]["scored"] == 17
    shutil.rmtree(copy / "model")
    assert "holds no trained model" in refused(capsys, copy)


def test_a_model_with_weights_that_are_not_finite_gets_no_table(copy, capsys):
    file = copy / "model/model.safetensors"
    weights = load_file(file)
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, file)
    assert "not finite" in refused(capsys, copy)
    assert not (copy / "evaluations").exists()


def test_predictions_that_are_not_finite_are_refused(thousand, tmp_path):
    images = scan_folder(tree(tmp_path, SYNSETS[:2]))
    bias = thousand.branch.classifier.bias
    try:
        bias.data[0] = float("nan")
        with pytest.raises(FloatingPointError, match="2 of 2 images are not finite"): evaluate(thousand, images)
    finally: bias.data[0] = 0


@pytest.mark.slow
def test_several_processes_score_each_image_once(copy, forked):
    options = dict(eval=True, save_dir=copy.parent, name=copy.name)
    from running import Forked
    from llb.train import main as command
    words = flags(**options, device="cpu", timeout=60)
    both = Forked(copy.parent / "log.txt", *[(command, words)] * 2)
    assert both.finish() == [0, 0], both.text
    found, reported = numbers(copy, "same-val"), json.loads((copy / "metrics.json").read_text())
    assert found["seen"] == reported["seen"] and both.text.count("n = 3 images") == 1
    for name in "visual", "label", "fused": assert found[name] == pytest.approx(reported[name], abs=1e-6)


def test_python_and_the_command_agree(copy, shapes):
    from llb.core.distributed import Runtime
    found, = evaluate_runs([str(copy)], Runtime(torch.device("cpu")), data_dir=str(shapes / "subset"))
    model = LLB.from_pretrained(copy / "model")
    assert evaluate(model, scan_folder(shapes / "subset")).metrics["masked"] == found.metrics["masked"]
