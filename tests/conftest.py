"""What the tests share: folders of small images, trained runs, and ways to run the training command."""
import os
import random
import resource
import runpy
import sys
import tracemalloc
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before anything imports torch, here and in what is started

import pytest  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

pytest.register_assert_rewrite("browser", "running")
from browser import chromium, lab  # noqa: E402, F401  (fixtures of the browser tests)
from running import Command, flags, forked_training, OPTIONS, results, tiny, TINY  # noqa: E402

ROOT = Path(__file__).parent.parent
def draw(shape, rng, size=40):
    "An image of a circle, square or triangle in random colours."
    colour = lambda: tuple(rng.randrange(256) for _ in range(3))
    image = Image.new("RGB", (size, size), colour())
    pen, fill = ImageDraw.Draw(image), colour()
    x, y = rng.randrange(2, size // 2 - 2), rng.randrange(2, size // 2 - 2)
    box = [x, y, x + size // 2, y + size // 2]
    if shape == "circle": pen.ellipse(box, fill=fill)
    if shape == "square": pen.rectangle(box, fill=fill)
    corners = [(x, y + size // 2), (x + size // 2, y + size // 2), (x + size // 4, y)]
    if shape == "triangle": pen.polygon(corners, fill=fill)
    return image


def make_images(root, per_class=20, classes=("circle", "square", "triangle")):
    "A folder of class folders; the same bytes each time."
    rng = random.Random(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class): draw(name, rng).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    "60 small images in 3 class folders; not to be changed."
    return make_images(tmp_path_factory.mktemp("images") / "shapes")


@pytest.fixture(scope="session")
def clipart():
    "The images of the bundled validation split."
    from llb.data.splits import load_data
    return load_data(ROOT / "data" / "openclipart").val


NASTY = "<img src=x onerror=alert(1)>", "$a$ & \"b\"", "c" * 200, "d\u0000e"   # class names from anyone


@pytest.fixture(scope="session")
def small_llb():
    "An untrained LLB of 12 objects on 3 x 5 patches."
    import torch

    from llb.models.backbone import load_backbone
    from llb.models.llb import LLB
    torch.manual_seed(0)
    backbone = load_backbone("vit_tiny_patch16_224", pretrained=False, image_size=(48, 80), num_classes=0)
    return LLB(backbone, num_objects=12, num_layers=2, target_layer=3, num_classes=4).eval()


@pytest.fixture(scope="session")
def nasty_index(small_llb, tmp_path_factory):
    "Its index of 60 drawings whose four classes have nasty names, with effects beside it."
    from dataclasses import replace

    import torch

    from llb.analysis.build import build_index
    from llb.analysis.effects import build_effects
    from llb.core.distributed import Runtime
    from llb.data.splits import load_data
    from llb.training.inputs import scoring_loader
    runtime = Runtime(torch.device("cpu"))
    few = load_data(ROOT / "data/openclipart").val.take(range(0, 600, 10))
    few = replace(few, labels=tuple(i % 4 for i in range(len(few))), classes=NASTY)
    loader = scoring_loader(small_llb, few, batch_size=16)
    index = build_index(small_llb, loader, tmp_path_factory.mktemp("run") / "objects" / "val", runtime)
    build_effects(small_llb, loader, index, runtime, 3)
    return index


@pytest.fixture(scope="session")
def big_index(tmp_path_factory):
    "A synthetic index of 50,000 images, 2,048 objects and 1,000 classes, as the benchmark of the explorer makes it."
    make = runpy.run_path(str(ROOT / "benchmarks/explorer.py"))["synthetic_index"]
    return make(tmp_path_factory.mktemp("big") / "index")


def peak_memory(task):
    "The most MB of Python objects while a task runs, and of this process so far."
    tracemalloc.start()
    task()
    most = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return most, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.fixture
def start():
    "Start a program; what is left of it after the test is killed."
    commands = []
    def make(*words, **kwargs):
        commands.append(Command(*words, **kwargs))
        return commands[-1]
    yield make
    for command in commands: command.kill()


@pytest.fixture
def train(start):
    "Start `python -m llb.train`, or torchrun with several processes."
    def make(processes=1, torchrun=(), env=(), **options):
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
        launcher = words if processes > 1 else []
        return start(sys.executable, *launcher, "-m", "llb.train", *flags(**tiny(**options)), env=env)
    return make


@pytest.fixture
def forked(tmp_path):
    "Run the training command in forked processes."
    runs = []
    def make(processes=1, **options):
        runs.append(forked_training(tmp_path / f"log{len(runs)}.txt", processes, **options))
        return runs[-1]
    yield make
    for run in runs:
        for process in run.ranks:
            if process.is_alive(): process.kill()


@pytest.fixture(scope="session")
def whole(tmp_path_factory, images):
    "A folder of uninterrupted runs, named 1 and 2 by their number of processes; not to be changed."
    folder = tmp_path_factory.mktemp("whole")
    for processes in 1, 2:
        options = OPTIONS | {"batch_size": 6 // processes}
        options = dict(data_dir=images, save_dir=folder, name=str(processes), **options)
        run = forked_training(folder / "log.txt", processes, **options)
        assert run.finish() == [0] * processes, run.text
    return folder


@pytest.fixture(scope="session")
def wanted(whole):
    "The results of uninterrupted runs of 1 and 2 processes."
    return {processes: results(whole / str(processes)) for processes in (1, 2)}


@pytest.fixture(scope="session")
def visual_run(tmp_path_factory, images):
    "The folder of a finished run that fine-tuned a backbone; not to be changed."
    folder = tmp_path_factory.mktemp("visual")
    options = dict(objective="visual", epochs=2, batch_size=12)
    run = forked_training(folder / "log.txt", data_dir=images, save_dir=folder, **options)
    assert run.finish() == [0], run.text
    return folder / TINY["name"]
