"""The command line: our flags are frozen here, and so is what each flag of the release means."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llb.cli import COMMANDS, main
from llb.core.errors import InputError
from llb.runs.config import RECIPES, Config, parse_command, recipe_file
from llb.runs.release_flags import translate

ROOT = Path(__file__).parent.parent

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
REFUSED = ["--gpu 0,1", "--world-size 4", "--local_rank 0", "--sync-bn", "--rep", "--vit_patch 16",
           "--initialize one_hot", "--encoder resnet", "--loss focal", "--start_epoch 3", "--vit_ft True"]
README = ("--amp --seed 123 --save --method timm_augreg_in21k_ft_in1k --encoder ViT --vit_size Base --transfer "
          "--freeze --alpha 0.8 --num_nvit_layers 6 --target_layer 11 --object_size 2048 --dataset ImageNet "
          "--batch_size 128 --epochs 70 --lr_scheduler CosineAnnealingLR --opt Adam")


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
    assert parse_command(README.split()) == Config.of(
        amp=True, seed=123, backbone="timm_augreg_in21k_ft_in1k/Base", alpha=0.8, num_layers=6, target_layer=11,
        num_objects=2048, dataset="ImageNet", batch_size=128, epochs=70, lr_scheduler="CosineAnnealingLR", opt="Adam")


MISSPELT = {"--num_object 3": "--num_objects", "--cahce": "--cache", "--lrr .1": "--lr"}


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
    text = re.sub(r"torchrun .*? -m|llb launch .*? -- |llb predict .*", "", text)   # flags of these
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
    smaller = {"--vit_size": "Tiny", "--num_nvit_layers": "2", "--object_size": "16", "--batch_size": "4",
               "--epochs": "2"}
    words = README.split()
    for flag, value in smaller.items(): words[words.index(flag) + 1] = value
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
