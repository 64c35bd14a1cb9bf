"""Configuration files, names, devices, resuming, evaluating and predicting."""

import json
import math

from conftest import make_images

from llb.models.llb import LLB
from llb.runs.config import Config, parse_command
from llb.training.evaluate import evaluate

from .weights import cut, gone, nan_head, put, tensors


def toml(text, then=None, name="c.toml"):
    "Read a configuration file."

    def act(shop):
        path = shop.write(name, text)
        found = Config.from_file(path)
        assert then is None or then(found), found
        return str(found)

    return act


def train_toml(text):
    return lambda s: s.llb("train --config", s.write("c.toml", text))


def words(*given):
    return lambda s: s.train(*given)


def flags(command):
    return lambda s: s.train(*command.split())


def refused_in_toml(name):
    return rf"\b{name}\b"


TOML = {
    "a syntax error": "epochs = ",
    "two values": "epochs = 1\nepochs = 2",
    "binary": b"\xff\xfe\0\0",
    "old encoding": b"name = '\xe9'",
    "an unknown name": "epoch = 3",
    "a table": "[model]\nnum_objects = 3",
}
WRONG = [
    ("epochs", '"x"'),
    ("epochs", "true"),
    ("epochs", "1.5"),
    ("epochs", "[1]"),
    ("lr", '"1e-3"'),
    ("lr", "true"),
    ("lr", "inf"),
    ("lr", "nan"),
    ("alpha", '"x"'),
    ("alpha", "2"),
    ("dataset", "3"),
    ("name", "5"),
    ("name", '""'),
    ("name", '"a/b"'),
    ("name", '".."'),
    ("opt", '"Lion"'),
    ("random_backbone", '"false"'),
    ("image_size", '"64"'),
    ("cache", '"no"'),
    ("cache", "2"),
    ("augment", '"auto"'),
    ("lr_scheduler", '"cosine"'),
    ("backbone_dtype", '"float16"'),
    ("milestones", '["a"]'),
    ("milestones", "3.0"),
    ("timeout", '"x"'),
    ("seed", "1.5"),
    ("seed", "99999999999999999999"),
    ("loggers", '["paper"]'),
    ("data_dir", '""'),
    ("name", '"a\\ntouch PWNED\\n#"'),
    ("save_dir", '"a\\u0000b"'),
    ("num_objects", "1000000000000"),
    ("image_size", "100000000"),
    ("epochs", "1979-05-27"),
    ("device", "0"),
]
FILES = {
    "no such file": (lambda s: s.llb("train --config /nope.toml"), "/nope.toml"),
    "a folder": (lambda s: s.llb("train --config", s.here), "file"),
    "an empty file": (toml("", lambda c: c == Config()), None),
    "an unknown recipe": (lambda s: s.llb("train --recipe democracy"), "democracy"),
    "a recipe and a file": (lambda s: s.llb("train --recipe demo --config", s.write("c.toml")), "config|recipe"),
    "--config without a name": (lambda s: s.llb("train --config"), "config"),
    "config.json empty": (toml("", name="config.json"), "config.json"),
    "config.json broken": (toml("{", name="config.json"), "config.json"),
    "config.json without config": (toml("{}", name="config.json"), "config.json"),
    "config.json a list": (toml("[]", name="config.json"), "config.json"),
    "config.json of a list": (toml('{"config": []}', name="config.json"), "config.json"),
    "config.json of a number": (toml('{"config": 3}', name="config.json"), "config.json"),
    "config.json of strange names": (toml('{"config": {"colour": 3}}', name="config.json"), "colour"),
    "config.json of a wrong type": (toml('{"config": {"epochs": "3"}}', name="config.json"), "epochs"),
    "config.json of null": (toml('{"config": {"epochs": null}}', name="config.json"), "epochs"),
    **{
        f"TOML: {name}": (train_toml(text) if isinstance(text, str) else toml(text), r"c\.toml|epoch|Unknown|model")
        for name, text in TOML.items()
    },
    **{
        f"TOML: {name} = {value}"[:60]: (
            train_toml(f"{name} = {value}\ndevice = 'cpu'\n" if name != "device" else f"{name} = {value}"),
            rf"\b{name}\b",
        )
        for name, value in WRONG
    },
    "Python: an unknown name": (lambda s: str(Config.of(opjects=3)), "opjects"),
    "Python: a path as folder": (lambda s: str(Config.of(save_dir=s.here)), None),
    "Python: None": (lambda s: str(Config.of(lr=None)), "lr"),
}

NAMES = {
    "a slash": (flags("--name a/b"), "name"),
    "dots": (flags("--name .."), "name"),
    "one dot": (flags("--name ."), "name"),
    "empty": (words("--name", ""), "name"),
    "NUL": (words("--name", "a\0b"), "name"),
    "a line break": (words("--name", "a\nb"), "name"),
    "300 letters": (flags(f"--name {'x' * 300}"), "name"),
    "escape": (words("--name", "a\x1b[31mb"), "name"),
    "letters of the world": (words("--name", "лось é 日"), None),
    "a dash first": (words("--name=-x"), "name"),
    "save_dir a file": (lambda s: s.train(save_dir=s.write("file", "x")), "file"),
    "save_dir below a file": (lambda s: s.train(save_dir=s.write("file", "x") / "runs"), "file"),
    "save_dir in /proc": (flags("--save_dir /proc/nope"), "/proc/nope"),
    "a folder that holds something else": (
        lambda s: s.write("runs/run/thesis.tex", "x") and s.train("--overwrite"),
        "holds no run",
    ),
    "a run that is there": (lambda s: s.run and s.train(save_dir=s.here), "--resume"),
    "a run folder that is a file": (lambda s: s.write("runs/run", "x") and s.train(), "run"),
}

DEVICES = {
    name: (words("--device", name), "device|CUDA|cuda")
    for name in ("tpu", "", "meta", "banana", "cuda:99", "cuda:-1", "cuda:", "cpu:x", "mps", "CPU")
}

FLAGS = {
    "an unknown flag": (flags("--num_object 3"), "num_object"),
    "a flag of nothing": (flags("--qwertz"), "qwertz"),
    "a word too many": (flags("banana"), "banana"),
    "a flag without value": (flags("--lr"), "lr"),
    "a value without need": (words("--amp=3"), "amp|3"),
    "a letter": (flags("--lr abc"), "lr"),
    "two numbers": (flags("--lr 1 2"), "2|lr"),
    "a dash": (flags("-x 3"), "-x"),
    "an unknown command": (lambda s: s.llb("trian"), "trian.*train"),
    "no optimizer of that name": (flags("--opt Lion"), "Lion"),
    "no such schedule": (flags("--lr_scheduler cosine"), "cosine"),
    "release: --gpu": (flags("--gpu 0"), "gpu"),
    "release: --encoder resnet": (flags("--encoder resnet"), "resnet"),
    "release: --method NViT": (lambda s: s.train("--method", "NViT", backbone=None, random_backbone=None), "NViT"),
    "release: --vit_size alone": (flags("--vit_size Base"), "vit_size"),
    "release: --initialize one_hot": (flags("--initialize one_hot"), "one_hot"),
    "resume and overwrite": (flags("--resume --overwrite"), "resume"),
    "mixup of the other objective": (flags("--mixup 0.3"), "mixup"),
    "objects of the other objective": (lambda s: s.train("--objective", "visual", num_objects=8), "num_objects"),
    "MultiStepLR without epochs": (flags("--lr_scheduler MultiStepLR"), "milestones"),
    "more micro-batches than images": (flags("--micro_batches 99"), "micro_batches"),
    "a logger that is not there": (flags("--loggers paper"), "paper"),
    "a logger that is not installed": (flags("--loggers wandb"), "wandb"),
    "more objects than memory": (lambda s: s.train(num_objects=10**12), "num_objects"),
    "a larger image than memory": (lambda s: s.train(image_size=10**8), "image_size|100000000"),
    "more workers than a machine has": (lambda s: str(parse_command(["--workers", "1000000"])), "workers"),
}


def damaged(*spoils, **options):
    "Spoil a run of two epochs, then resume it."

    def act(shop):
        for spoil in spoils:
            spoil(shop.run)
        return resume(shop, **options)

    return act


def resume(shop, *words, **options):
    return shop.train("--resume", *words, **{"epochs": 3, "save_dir": shop.run.parent, **options})


def at_all_checkpoints(spoil):
    def act(run):
        for folder in (run / "checkpoints").glob("step-*"):
            spoil(folder)

    return act


def at_newest(spoil):
    return lambda run: spoil(sorted((run / "checkpoints").glob("step-*"))[-1])


def without(*names):
    "Take names out of the newest checkpoint's record, with a manifest that fits."

    def spoil(folder):
        from llb.core.files import file_hash

        path = folder / "state.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in names}))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sha256"]["state.json"] = file_hash(path)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return spoil


def fewer_epochs(shop):
    "The finished run stays as it is."
    before = {name: (shop.run / name).read_bytes() for name in ("config.json", "metrics.json")}
    try:
        return resume(shop, epochs=1)
    finally:
        assert before == {name: (shop.run / name).read_bytes() for name in before}, "the run was changed"


def begins_again(then):
    "Without checkpoints it begins again, and says so."

    def act(shop):
        printed = damaged(gone("checkpoints"), then)(shop)
        assert "begins again at step 0" in printed, printed
        return printed

    return act


RESUME = {
    "no run": (lambda s: s.train("--resume"), "resume"),
    "a folder of something else": (lambda s: s.write("runs/run/a.txt", "x") and s.train("--resume"), "resume|no run"),
    "more epochs": (lambda s: resume(s), None),
    "no more epochs": (lambda s: resume(s, epochs=2), None),
    "fewer epochs than it has": (fewer_epochs, "epochs"),
    "another lr": (damaged(lr=0.5), "lr"),
    "other objects": (damaged(num_objects=9), "num_objects"),
    "another seed": (damaged(seed=3), "seed"),
    "another target_layer": (damaged(target_layer=2), "target_layer"),
    "another backbone": (damaged(backbone="test_vit2"), "backbone"),
    "other images": (lambda s: resume(s, data_dir=make_images(s.here / "other", 7)), "data_dir|images"),
    "other classes": (
        lambda s: resume(s, data_dir=make_images(s.here / "other", 8, ("circle", "square"))),
        "data_dir|class",
    ),
    "no checkpoints": (begins_again(lambda r: None), None),
    "checkpoints an empty folder": (begins_again(lambda r: (r / "checkpoints").mkdir()), None),
    "checkpoints a file": (damaged(gone("checkpoints"), put("checkpoints")), "checkpoint"),
    "the newest checkpoint cut off": (damaged(at_newest(cut("state.safetensors"))), None),
    "the newest checkpoint empty": (damaged(at_newest(put("state.json"))), None),
    "all checkpoints cut off": (damaged(at_all_checkpoints(cut("state.safetensors"))), "damaged"),
    "a checkpoint without best": (damaged(at_newest(without("best"))), "checkpoint"),
    "a checkpoint without history": (damaged(at_newest(without("history"))), "checkpoint"),
    "a checkpoint without config": (damaged(at_newest(without("config"))), "checkpoint"),
    "events.jsonl a folder": (damaged(gone("events.jsonl"), lambda r: (r / "events.jsonl").mkdir()), "events.jsonl"),
    "events.jsonl cut off": (damaged(cut("events.jsonl")), None),
    "events.jsonl of other things": (damaged(put("events.jsonl", b"\xff\n[]\n{}\n3\nnull\n")), None),
    "no events.jsonl": (damaged(gone("events.jsonl")), None),
    "config.json a folder": (damaged(gone("config.json"), lambda r: (r / "config.json").mkdir()), "config.json"),
    "config.json broken": (damaged(put("config.json", b"{")), None),
    "no config.json": (damaged(gone("config.json")), None),
    "a folder that may not be written": (lambda s: s.train("--resume", save_dir="/proc", name="self"), "/proc"),
    "--eval and --resume": (lambda s: s.train("--eval", "--resume", save_dir=s.run.parent), "resume"),
}


def evaluated(spoil, *words):
    def act(shop):
        spoil(shop.run)
        return shop.llb("evaluate", shop.run, *words)

    return act


def nan_model(run):
    tensors(nan_head)(run / "model")


def on_folder(make, *words):
    "Evaluate on another folder."

    def act(shop):
        root = shop.here / "other"
        make(root)
        return shop.llb("evaluate", shop.run, "--dataset", "ImageFolder", "--data_dir", root, *words)

    return act


def finite(shop):
    metrics = json.loads((shop.run / "metrics.json").read_text())
    assert math.isfinite(metrics["label"]["nll"])
    return str(metrics["label"])


def predicted(*words):
    return lambda s: s.llb("predict", s.shared.run, *(w(s) if callable(w) else w for w in words))


def eval_flags(**options):
    return lambda s: s.train("--eval", save_dir=s.shared.run.parent, **options)


def evaluate_images(shop, names):
    return shop.train("--eval", save_dir=shop.run.parent, data_dir=make_images(shop.here / "other", 6, names))


EVALUATE = {
    "no such run": (lambda s: s.llb("evaluate /nope"), "/nope"),
    "no run at all": (lambda s: s.llb("evaluate"), "RUN"),
    "an empty folder": (lambda s: s.llb("evaluate", s.here), "config.json|run"),
    "a file": (lambda s: s.llb("evaluate", s.write("x")), "/x"),
    "without model": (evaluated(gone("model")), "model"),
    "a cut off model": (evaluated(lambda r: cut("model.safetensors")(r / "model")), "model.safetensors"),
    "a model of NaNs": (evaluated(nan_model), "finite|NaN|nan"),
    "alpha a word": (lambda s: s.llb("evaluate", s.shared.run, "--alpha", "half"), "alpha"),
    "alpha 2": (lambda s: s.llb("evaluate", s.shared.run, "--alpha", "2"), "alpha"),
    "device banana": (lambda s: s.llb("evaluate", s.shared.run, "--device", "banana"), "banana"),
    "config.json broken": (evaluated(put("config.json", b"{")), "config.json"),
    "an unknown split": (lambda s: s.llb("evaluate", s.shared.run, "--split", "best"), "split"),
    "another folder of the same classes": (on_folder(lambda r: make_images(r, 3)), None),
    "a folder of other classes": (on_folder(lambda r: (make_images(r, 3) / "circle").rename(r / "zebra")), "zebra"),
    "no such folder": (
        lambda s: s.llb("evaluate", s.shared.run, "--data_dir /nope --dataset ImageFolder".split()[1], "/nope"),
        "nope",
    ),
    "--eval with other objects": (eval_flags(num_objects=9), "9"),
    "--eval with another layer": (eval_flags(target_layer=2), "target_layer|layer"),
    "--eval with another temperature": (eval_flags(temperature=5), "temperature"),
    "--eval with another backbone": (eval_flags(seed=99), "backbone|content"),
    "--eval with another size": (eval_flags(image_size=48), "image_size|48"),
    "--eval of nothing": (lambda s: s.train("--eval"), "nv_weights|no trained model"),
    "--eval on some of the classes": (lambda s: evaluate_images(s, ("circle", "square")), None),
    "--eval on unknown classes": (lambda s: evaluate_images(s, ("circle", "zebra")), "zebra"),
    "--eval as it was": (eval_flags(), None),
    "--eval and --overwrite": (lambda s: s.train("--eval", "--overwrite", save_dir=s.shared.run.parent), "overwrite"),
    "Python: alpha 2": (
        lambda s: str(evaluate(LLB.from_pretrained(s.shared.run / "model"), __import__("llb").load_data(s.images), 2)),
        "alpha",
    ),
    "predict: no such run": (lambda s: s.llb("predict /nope", s.images / "circle/00.png"), "/nope"),
    "predict: no images": (predicted(), "IMAGES"),
    "predict: no such image": (predicted("/nope.png"), "/nope.png"),
    "predict: an empty folder": (predicted(lambda s: s.write("e/x").parent), "e"),
    "predict: text": (predicted(lambda s: s.write("x.png", "hello")), "x.png"),
    "predict: alpha 2": (predicted(lambda s: s.images / "circle/00.png", "--alpha", "2"), "alpha"),
    "predict: a folder": (predicted(lambda s: s.images / "circle"), None),
    "predict: a model of NaNs": (
        lambda s: nan_model(s.run) or s.llb("predict", s.run, s.images / "circle/00.png"),
        "finite|NaN|nan",
    ),
    "a finished run": (finite, None),
}

CASES = {
    **FILES,
    **{f"name: {n}": c for n, c in NAMES.items()},
    **{f"device: {n!r}": c for n, c in DEVICES.items()},
    **{f"flags: {n}": c for n, c in FLAGS.items()},
    **{f"resume: {n}": c for n, c in RESUME.items()},
    **{f"evaluate: {n}": c for n, c in EVALUATE.items()},
}
