"""The command line: our flags are frozen here, and so is what each flag of the release means."""
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from llb.cli import COMMANDS, main
from llb.core.errors import InputError, command
from llb.models.zoo import METHODS
from llb.runs.config import RECIPE_COSTS, RECIPES, Config, parse_command, recipe_file
from llb.runs.release_flags import translate
from llb.train import train
from test_datasets import SYNSETS, imagenet, inat, lists

ROOT = Path(__file__).parent.parent
FACTS = json.loads((Path(__file__).parent / "release.json").read_text())

OURS = set("""alpha amp augment backbone batch_size cache checkpoint clip_grad data_dir dataset decay_all device
diversity_weight drop_path epochs eval gamma image_size last_epoch local_diversity log_every loggers lr lr_min
lr_scheduler micro_batches milestones momentum name num_classes num_layers num_objects nv_weights objective opt
overwrite random_backbone refit resume save save_dir save_every seed selection_fraction skip_unreadable step_size t_max
target_layer temperature timeout visual_lr warmup_epochs weight_decay workers""".split())

RELEASE = {  # the release's flag, as typed: what it sets here, or None where it describes what is always done
    "--device cpu": {"device": "cpu"},
    "--seed 3": {"seed": 3},
    "--start_epoch 0": None,
    "--epochs 7": {"epochs": 7},
    "--loss cross_entropy": None,
    "--opt sgd": {"opt": "SGD"},
    "--lr 0.01": {"lr": 0.01},
    "--opt sgd --momentum 0.8": {"opt": "SGD", "momentum": 0.8},
    "--wd 0.1": {"weight_decay": 0.1},
    "--weight_decay 0.1": {"weight_decay": 0.1},
    "--lr_scheduler steplr": {"lr_scheduler": "StepLR"},
    "--lr_scheduler steplr --lr_step 4": {"lr_scheduler": "StepLR", "step_size": 4},
    "--lr_scheduler multisteplr --lr_steps 1 2": {"lr_scheduler": "MultiStepLR", "milestones": (1, 2)},
    "--lr_scheduler steplr --lr_gamma 0.5": {"lr_scheduler": "StepLR", "gamma": 0.5},
    "--warmup": {"warmup_epochs": 2},
    "--t_max 10": {"t_max": 10},
    "--eta_min 0.00005": {"lr_min": 0.00005},
    "--last_epoch -1": None,   # where its schedule starts; ours has no value
    "--save_dir out": {"save_dir": "out"},
    "--save": {"save": True},
    "--resume True": {"resume": True},
    "--resume False": {"resume": False},
    "--test-only": {"eval": True},
    "--eval": {"eval": True},
    "--method mae_in1k_ft_in1k --vit_size LARGE": {"backbone": "mae_in1k_ft_in1k/Large"},
    "--amp": {"amp": True},
    "--encoder ViT": None,
    "--transfer": None,
    "--encoder_weight w.pth": {"checkpoint": "w.pth"},
    "--dist-url env://": None,
    "--dataset imageet": {"dataset": "imageet"},
    "--data_dir d": {"data_dir": "d"},
    "--class_num 5": {"num_classes": 5},
    "-b 8": {"batch_size": 8},
    "--batch_size 8": {"batch_size": 8},
    "--num_workers 1": {"workers": 1},
    "--norm": None,
    "--vit_resolution 384": {"image_size": 384},
    "--vit_ft False": None,
    "--object_size 9": {"num_objects": 9},
    "--num_nvit_layers 4": {"num_layers": 4},
    "--target_layer 9": {"target_layer": 9},
    "--initialize xavier": None,
    "--train_emb": None,
    "--nv_weights x": {"nv_weights": "x"},
    "--freeze": None,
    "--alpha 0.8": {"alpha": 0.8},
    "--wandb": {"loggers": ("wandb",)},
    "--temperature 0.2": {"temperature": 0.2},
}
REFUSED = ["--gpu 0,1", "--world-size 4", "--local_rank 0", "--sync-bn", "--rep", "--method NViT",
           "--initialize one_hot", "--encoder resnet", "--loss focal", "--start_epoch 3", "--vit_ft True"]


def changed(**values):
    "The README's command with other values."
    words = FACTS["command"].split()
    for name, value in values.items(): words[words.index(f"--{name}") + 1] = str(value)
    return words


def test_our_flags_are_frozen():
    assert set(Config().to_dict()) >= OURS


@pytest.mark.parametrize("flags", RELEASE)
def test_a_flag_of_the_release_is_honoured(flags):
    assert parse_command(flags.split()) == Config.of(**(RELEASE[flags] or {}))


@pytest.mark.parametrize("flags", REFUSED)
def test_a_flag_that_cannot_be_honoured_is_refused_with_a_sentence(flags):
    with pytest.raises(InputError, match=flags.split()[0].replace("-", "[-_]")):
        translate(flags.split())


def test_the_readme_command_sets_what_it_says():
    assert parse_command(FACTS["command"].split()) == Config.of(
        amp=True, seed=123, backbone="timm_augreg_in21k_ft_in1k/Base", alpha=0.8, num_layers=6, target_layer=11,
        num_objects=2048, dataset="ImageNet", batch_size=128, epochs=70, lr_scheduler="CosineAnnealingLR", opt="Adam")


MISSPELT = {"--num_objekts 3": "--num_objects", "--cahce": "--cache", "--lrr .1": "--lr"}


@pytest.mark.parametrize("words,near", MISSPELT.items())
def test_an_unknown_flag_names_its_near_matches(words, near):
    with pytest.raises(InputError, match=f"did you mean .*{near}"): parse_command(words.split())


def test_an_unknown_command_names_its_near_matches(capsys):
    with pytest.raises(SystemExit): main(["evalaute"])
    assert "did you mean evaluate?" in capsys.readouterr().err


def test_help_shows_flags_by_owner_and_needs_no_pytorch():
    program = ("import sys; from llb.train import main\n"
               "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for owner in "model", "data", "optim", "visual", "run": assert f" {owner} options " in done.stdout


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_parses(path):
    assert parse_command(["--recipe", path.stem]) == Config.from_file(path)


def test_a_recipe_that_is_not_there_names_those_that_are():
    with pytest.raises(InputError, match="augreg-b-in1k"):
        recipe_file("nope")


def test_flags_change_a_recipe():
    config = parse_command("--recipe augreg-b-in1k --object_size 64 --epochs 1".split())
    assert (config.model.num_objects, config.optim.epochs, config.model.num_layers) == (64, 1, 6)


def test_the_readme_shows_only_flags_and_commands_that_exist():
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"torchrun .*? -m|llb launch .*? -- |llb (predict|evaluate|compare) .*", "", text)   # flags of these
    shown = {f.replace("-", "_") for f in re.findall(r"--([a-z][a-z_-]+)", text)} - {"help", "recipe"}
    assert shown and shown <= set(Config().to_dict())
    assert set(re.findall(r"(?<!from )\bllb ([a-z-]+)(?= [-A-Z]|`)", text)) <= set(COMMANDS)


@pytest.mark.slow
def test_the_release_command_runs_on_an_imagenet_layout(tmp_path):
    classes = [f"n{i:08d}" for i in range(5)]
    for split in "train", "val":
        for i, name in enumerate(classes):
            (tmp_path / "imagenet" / split / name).mkdir(parents=True)
            for j in range(4):
                image = Image.new("RGB", (40, 30), (50 * i, 30 * j, 90))
                image.save(tmp_path / "imagenet" / split / name / f"{split}_{i}_{j}.JPEG")
    smaller = dict(vit_size="Tiny", num_nvit_layers=2, object_size=16, batch_size=4, epochs=2)
    words = changed(**smaller)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "llb.train",
           *words, "--random_backbone", "--class_num", "5", "--data_dir", str(tmp_path / "imagenet"), "--workers", "0",
           "--save_dir", str(tmp_path / "runs"), "--name", "r"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "randomly initialised" in done.stdout
    about = json.loads((tmp_path / "runs/r/config.json").read_text())
    assert about["backbone"]["source"] == "random" and about["processes"] == 2 and about["global_batch"] == 8
    metrics = json.loads((tmp_path / "runs/r/metrics.json").read_text())
    assert metrics["seen"]["unique"] == 20 and metrics["alpha"] == {"value": 0.8, "chosen": "was given"}


def layouts(folder):
    "The README's spelling of each data set -> a folder as it is distributed, and its classes."
    return {"imageet": (imagenet(folder / "i", SYNSETS[:5]), 5), "places365": (lists(folder / "p")[0], 7),
            "inaturalist2018": (inat(folder / "n"), 6)}


@pytest.mark.slow
def test_every_method_data_set_and_flag_of_the_release_s_readme_trains(tmp_path, monkeypatch, capsys):
    "The README's command, each method in place of its own, on tiny random backbones in place of large ones."
    folders, methods = layouts(tmp_path), FACTS["methods"]
    assert set(folders) == set(FACTS["datasets"]) == set(methods.values()) and len(methods) == 7
    for key, method in METHODS.items():
        monkeypatch.setitem(METHODS, key, replace(method, architecture="vit_tiny_patch16_224"))
    for method, dataset in methods.items():
        folder, classes = folders[dataset]
        size = FACTS["sizes"][method.split("_")[0]][0]
        words = changed(method=method, vit_size=size, dataset=dataset, epochs=1, batch_size=8, num_nvit_layers=2,
                        object_size=8, target_layer=2)
        more = dict(data_dir=folder, class_num=classes, vit_patch=16, vit_resolution=32, num_workers=0,
                    save_dir=tmp_path, name=method)
        words += [word for name, value in more.items() for word in (f"--{name}", str(value))]
        metrics = train(parse_command([*words, "--random_backbone"]))
        about = json.loads((tmp_path / method / "config.json").read_text())
        assert metrics["seen"]["unique"] == {"imageet": 5, "places365": 14, "inaturalist2018": 12}[dataset]
        assert about["config"]["backbone"] == f"{method}/{size}" and len(about["classes"]) == classes


@pytest.mark.parametrize("method", FACTS["methods"])
def test_every_size_of_a_method_is_known(method):
    for size in FACTS["sizes"][method.split("_")[0]]:
        patch = "14" if size == "Huge" else "16"
        words = ["--method", method, "--vit_size", size.lower(), "--vit_patch"]
        assert parse_command([*words, patch]).model.backbone == f"{method}/{size}"
        with pytest.raises(InputError, match=f"are {patch} pixels wide"): parse_command([*words, "32"])


def test_an_unknown_method_names_the_seven():
    with pytest.raises(InputError) as refused: parse_command(["--method", "NViT"])
    assert all(method in str(refused.value) for method in FACTS["methods"])


WRITTEN_OUT = {"--epo 3": "--epochs 3", "--epo=3": "--epochs 3", "-b16": "-b 16", "-b=16": "-b 16",
               "--num_obj 9": "--num_objects 9", "--object_s 9": "--object_size 9", "--rec demo": "--recipe demo",
               "--no-sav": "--no_save", "--vit_res 64": "--vit_resolution 64", "--warmup": "--warmup_epochs 2",
               "--image_si 64 96": "--image_size 64 96"}


@pytest.mark.parametrize("words", WRITTEN_OUT)
def test_abbreviations_are_written_out(words):
    assert parse_command(words.split()) == parse_command(WRITTEN_OUT[words].split()) != Config()


AMBIGUOUS = {"--lr_st 3": "--lr_step, --lr_steps", "--num 3": "--num_objects", "--save_ x": "--save_dir, --save_every",
             "--object 3": "--object_size, --objective"}


@pytest.mark.parametrize("words,some", AMBIGUOUS.items())
def test_an_ambiguous_abbreviation_names_what_it_could_be(words, some):
    with pytest.raises(InputError, match=f"could be .*{some}"): parse_command(words.split())


def test_a_pair_is_an_image_size_wherever_it_comes_from(tmp_path):
    (tmp_path / "x.toml").write_text("image_size = [64, 96]")
    (tmp_path / "x.json").write_text(json.dumps({"config": Config.of(image_size=(64, 96)).to_dict()}))
    for words in ["--image_size", "64", "96"], ["--config", f"{tmp_path}/x.toml"], ["--config", f"{tmp_path}/x.json"]:
        assert parse_command(words).model.image_size == (64, 96)
    with pytest.raises(SystemExit): parse_command("--image_size 64 96 32".split())


@pytest.fixture
def run(tmp_path):
    "The folder of a run that was left after 20 steps."
    folder = tmp_path / "r"
    for step in 10, 20: (folder / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (folder / "events.jsonl").touch()
    config = Config.of(num_objects=9, save_dir="elsewhere", overwrite=True, save_every=1)
    (folder / "config.json").write_text(json.dumps({"config": config.to_dict()}))
    return folder


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/step-00000020"])
def test_resume_takes_a_run_folder_or_what_is_in_it(run, inside):
    config = parse_command(["--resume", str(run / inside), "--epochs", "60"])
    assert config.run_folder == run and config.run.resume and not config.run.overwrite
    assert (config.model.num_objects, config.optim.epochs) == (9, 60)
    assert parse_command(["--recipe", "demo", "--resume", str(run)]).model.num_objects == 128


def test_resume_refuses_what_it_cannot_continue(run):
    for words, advice in {"nowhere.pth": "--save_dir and --name", str(run.parent): "--save_dir and --name",
                          f"{run}/checkpoints/step-00000010": "newest checkpoint"}.items():
        with pytest.raises(InputError, match=advice): parse_command(["--resume", words])
    with pytest.raises(InputError, match="leave --name"): parse_command(["--resume", str(run), "--name", "x"])


def test_a_run_s_configuration_can_be_evaluated(run):
    config = parse_command(["--config", f"{run}/config.json", "--eval"])
    assert config.run.eval and not config.run.overwrite


LIGHT = """
import contextlib, io, sys
from llb.cli import COMMANDS, main
for words in [[], *([name] for name in COMMANDS if name != "recipes"), ["launch", "start"], ["launch", "status"]]:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit): main([*words, "--help"])
    assert said.getvalue().startswith("usage: llb"), words
main(["recipes"])
heavy = {"torch", "timm", "numpy", "matplotlib", "IPython", "ipywidgets", "sklearn"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_and_lists_import_nothing_heavy():
    "No time is measured: it is these imports that take seconds."
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(path.stem in done.stdout for path in RECIPES.glob("*.toml"))


@pytest.mark.slow
def test_the_recipes_kept_costs_are_what_is_counted():
    from llb.runs.cost import recipe_cost
    kept = json.loads(RECIPE_COSTS.read_text())
    assert set(kept) == {path.stem for path in RECIPES.glob("*.toml")}
    for name, cost in kept.items():
        counted = recipe_cost(name)
        assert counted.pop("image_size") == cost.pop("image_size")
        assert counted == pytest.approx(cost, rel=.01), f"{name}: call llb.runs.cost.write_recipe_costs()"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["llb", "llb.cli"])
def test_the_package_is_the_command(module):
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage: llb COMMAND") and done.stderr == ""
    done = subprocess.run([sys.executable, "-m", module, "trian"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "did you mean train?" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", ["", "recipes", "train --help", "report --help"])
def test_a_reader_who_has_seen_enough_ends_a_command_quietly(words):
    "Its end of the pipe is closed before anything is written."
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        program = [sys.executable, "-m", "llb", *words.split()]
        done = subprocess.run(program, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.stderr == "" and done.returncode in (128 + 13, 0)   # argparse itself passes over it


def test_another_broken_pipe_is_no_quiet_end():
    @command
    def main(argv): raise BrokenPipeError("a worker has died")
    with pytest.raises(BrokenPipeError): main([])
