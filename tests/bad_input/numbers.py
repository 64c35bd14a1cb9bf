"""Every numeric option with values that are none, have no end, are negative, zero or broken."""

import math

from llb.runs.config import parse_command

VALUES = "nan", "inf", "-1", "0", "1.5"
OPTIONS = {  # option: (those of VALUES that it takes, what else must be said)
    "alpha": ("0", ""),
    "backbone_drop_path": ("0", "--objective visual"),
    "batch_size": ("", ""),
    "cache_views": ("0", ""),
    "clip_grad": ("1.5", ""),
    "cutmix": ("0 1.5", "--objective visual"),
    "diversity_weight": ("0 1.5", ""),
    "drop_path": ("0", ""),
    "epochs": ("", ""),
    "gamma": ("", "--lr_scheduler StepLR"),
    "image_size": ("", ""),
    "layer_decay": ("", "--objective visual"),
    "log_every": ("", ""),
    "lr": ("1.5", ""),
    "lr_min": ("0", ""),
    "micro_batches": ("", ""),
    "milestones": ("1.5", "--lr_scheduler MultiStepLR"),
    "mixup": ("0 1.5", "--objective visual"),
    "momentum": ("0", "--opt SGD"),
    "num_classes": ("", ""),
    "num_layers": ("", ""),
    "num_objects": ("", ""),
    "random_erasing": ("0", "--objective visual"),
    "save_every": ("0", ""),
    "seed": ("-1 0", ""),
    "selection_fraction": ("", ""),
    "smoothing": ("0", "--objective visual"),
    "step_size": ("1.5", "--lr_scheduler StepLR"),
    "t_max": ("1.5", ""),
    "target_layer": ("", ""),
    "temperature": ("1.5", ""),
    "timeout": ("1.5", ""),
    "visual_lr": ("1.5", ""),
    "warmup_epochs": ("0 1.5", ""),
    "weight_decay": ("0 1.5", ""),
    "workers": ("0", ""),
}
ELSEWHERE = {  # numbers of other commands: (command, those of VALUES that it takes)
    "alpha of evaluate": ("evaluate {run} --alpha", "0"),
    "alpha of predict": ("predict {run} {images}/circle/00.png --alpha", "0"),
    "nproc": ("launch start --nproc {value} -- --device cpu --save_dir {here}", ""),
    "grace": ("launch stop {run} --grace", "0 1.5"),
    "nodes": ("launch sbatch --nodes {value} -- --save_dir {here}", ""),
    "gpus": ("launch sbatch --gpus {value} -- --save_dir {here}", ""),
    "cpus": ("launch sbatch --cpus {value} -- --save_dir {here}", ""),
}


def _parsed(option, value, more):
    "The option has the value; training with it is another test's."

    def act(shop):
        found = vars_of(parse_command([f"--{option}", value, *more.split()]))[option]
        assert found == float(value) or found == (float(value),), found

    return act


def vars_of(config):
    return config.to_dict()


def _train(option, value, more):
    return lambda shop: shop.train(*more.split(), **{option: value})


def _command(command, value):
    def act(shop):
        words = command if "{value}" in command else f"{command} {{value}}"
        names = {"value": value, "here": shop.here, "images": shop.images}
        if "{run}" in command:
            names["run"] = shop.run
        return shop.llb(words.format(**names))

    return act


CASES = {}
for _option, (_taken, _more) in OPTIONS.items():
    for _value in VALUES:
        _accepted = _value in _taken.split()
        _act = _parsed if _accepted else _train
        CASES[f"--{_option} {_value}"] = (_act(_option, _value, _more), None if _accepted else rf"\b{_option}\b")
for _name, (_words, _taken) in ELSEWHERE.items():
    for _value in VALUES:
        _accepted = _value in _taken.split()
        CASES[f"{_name} {_value}"] = (_command(_words, _value), None if _accepted else _name.split()[0])


def is_finite(numbers):
    "Whether a nested dictionary holds no number that is none."
    if isinstance(numbers, dict):
        return all(map(is_finite, numbers.values()))
    return not isinstance(numbers, float) or math.isfinite(numbers)
