"""Where bad input is tried: small folders to spoil, commands in this process, and a judgement of what came of it."""

import json
import os
import re
import shlex
import shutil
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cached_property
from pathlib import Path

import torch
from conftest import make_images
from running import flags, TINY

from llb import cli
from llb.core.errors import InputError

QUICK = {**TINY, "epochs": 1, "augment": "none"}


class Refused(Exception):
    "A command ended with a status other than 0; the message is all it printed."

    def __init__(self, status, out, err):
        super().__init__(f"{out}{err}".strip())
        self.status, self.err = status, err

    @property
    def sentences(self):
        "Complaints on stderr: our own sentences, those of argparse, and boxes of the parser of flags."
        return len(
            re.findall(
                r"^(error: |[a-z][^:\n]*: error: | *-{20,} *\n(?=.*(pars|nvalid|issing|nrecogn)))",
                self.err,
                re.MULTILINE,
            )
        )


@contextmanager
def _printed(folder):
    "Files that take what is printed: unlike StringIO they have the descriptor that PyTorch asks for."
    with open(folder / "out", "w+") as out, open(folder / "err", "w+") as err:
        with redirect_stdout(out), redirect_stderr(err):
            yield
        for file in out, err:
            file.flush()


class Shared:
    "What all cases share and none may change: made when it is first needed."

    def __init__(self, folder):
        self.folder = Path(folder)

    @cached_property
    def images(self):
        return make_images(self.folder / "shapes", per_class=8)

    @cached_property
    def run(self):
        "The folder of a finished run of two epochs, with an index and what a launcher leaves."
        shop = Workshop(self, self.folder)
        shop.train(epochs=2, save_dir=self.folder / "runs", name="run")
        from llb.analysis.effects import effects_of_run

        folder = self.folder / "runs" / "run"
        for split in "val", "selection":
            effects_of_run(folder, split)
        launch = folder / "launch" / "001"
        launch.mkdir(parents=True)
        shutil.copy(folder / "config.json", launch)
        began = min(json.loads(line)["time"] for line in (folder / "events.jsonl").read_text().splitlines()) - 1
        (launch / "proc.json").write_text(
            json.dumps(
                {
                    "launcher": "torchrun",
                    "mark": "none",
                    "nproc": 1,
                    "agent": 1,
                    "host": os.uname().nodename,
                    "began": began,
                }
            )
        )
        return folder


class Workshop:
    "A fresh folder for one case, and ways to try things."

    def __init__(self, shared, here):
        self.shared, self.here = shared, Path(here)

    @property
    def images(self):
        return self.shared.images

    def copy(self, folder, name="copy"):
        "A copy that may be spoiled."
        return Path(shutil.copytree(folder, self.here / name))

    @cached_property
    def run(self):
        "A finished run that may be spoiled."
        return self.copy(self.shared.run, "run")

    @cached_property
    def model(self):
        "A saved model that may be spoiled."
        return self.copy(self.shared.run / "model", "model")

    def write(self, name, content=""):
        "A file in the folder of this case: text, bytes, or what becomes JSON."
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    def llb(self, command, *words):
        "Run a command as typed, then further words as they are. What it printed; raises `Refused`."
        with tempfile.TemporaryDirectory() as folder:
            folder, status = Path(folder), 0
            with _printed(folder):
                try:
                    cli.main([*shlex.split(command), *map(str, words)])
                except SystemExit as e:
                    status = e.code or 0
            out, err = ((folder / name).read_text(errors="replace") for name in ("out", "err"))
        if status:
            raise Refused(status, out, err)
        return out

    def train(self, *words, **options):
        "Train a tiny model on the shared images. What it printed."
        options = {**QUICK, "data_dir": self.images, "save_dir": self.here / "runs", **options}
        return self.llb("train", *flags(**options), *words)

    def check(self, folder, dataset="ImageFolder"):
        "List a folder and read every image."
        return self.llb("check-data", "--dataset", dataset, "--data_dir", folder)

    def backbone(self, seed=0, **options):
        from llb.models.backbone import load_backbone

        torch.manual_seed(seed)
        return load_backbone("test_vit.r160_in1k", pretrained=False, image_size=32, **options)


def judge(case, shop):
    "What came of a case (see `KINDS`), and what was said."
    act, wanted = case
    try:
        said = act(shop)
    except (InputError, Refused) as e:
        said, refused = str(e), True
        if isinstance(e, Refused) and (e.sentences != 1 if e.status == 2 else "Traceback" in said):
            return "unclear", said
    except AssertionError as e:
        return "accepted wrongly", f"{e}"
    except TypeError as e:
        return ("plain TypeError" if wanted is TypeError else "traceback"), f"TypeError: {e}"
    except Exception as e:  # whatever a person would see as a traceback
        return "traceback", f"{type(e).__name__}: {e}"
    else:
        refused = False
    if wanted is None:
        return ("refused wrongly" if refused else "accepted rightly"), str(said)
    if not refused:
        return "accepted wrongly", str(said)
    if wanted is TypeError or re.search(wanted, said, re.DOTALL):
        return "clear", said
    return "blames another", said


KINDS = [
    "clear",
    "accepted rightly",
    "plain TypeError",  # as it must be
    "unclear",
    "blames another",
    "traceback",
    "accepted wrongly",
    "refused wrongly",
]  # as it must not
GOOD = KINDS[:3]
