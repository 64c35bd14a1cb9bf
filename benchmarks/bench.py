"""Step time, images/s, peak memory and input speed, each against a plain version, measured side by side in one run.

    python benchmarks/bench.py                # the table (`make bench`); --device cuda on a GPU (`make bench-gpu`)
    python benchmarks/bench.py --sweep        # how a step grows with K, L, N and batch
    python benchmarks/bench.py --ddp          # one process, two processes, and two that exchange nothing
    python benchmarks/bench.py --show FILE    # the tables of a result that was kept

Each variant lives in a process of its own, so that its peak memory is its own; the processes take turns, one
measurement each, and wait while another one works. A ratio is formed within a round, between neighbours in time; median
and quartiles over the rounds are shown. Where a machine has other work, wall time tells of that too: CPU seconds are
kept beside it.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

MODEL = dict(backbone="vit_base_patch16_224", random_backbone=True, num_objects=2048, num_layers=6, target_layer=11,
             opt="Adam", clip_grad=None)
CLASSES = 1000
MEAN, STD = (.485, .456, .406), (.229, .224, .225)
STEPS = {   # the variants of a training step: options of llb's configuration, and of the measurement
    "plain": dict(),
    "eager": dict(config={}),
    "eager, 2 micro-batches": dict(config=dict(micro_batches=2)),
    "compiled": dict(config=dict(compile=True)),
    "bf16": dict(config=dict(amp=True, backbone_dtype="bfloat16")),
    "bf16+compiled": dict(config=dict(amp=True, backbone_dtype="bfloat16", compile=True)),
    "cached": dict(config={}, cached=True),
    "cached+compiled": dict(config=dict(compile=True), cached=True),
    "cached+bf16+compiled": dict(config=dict(amp=True, compile=True), cached=True),
}
INPUTS = {   # the variants of the input; each gives [3,224,224]
    "plain": "the release's choice of operations on each image, one after another",
    "oracle": "the plain path of `llb`: the same, with random numbers that depend on nothing but seed, epoch and image",
    "files": "what a run does without a store: the same pixels, augmented as planes of bytes, "
             "which the device normalises",
    "store, normalised here": "images from the pixel store, augmented, and made float32 on this core",
    "store": "the same, left as bytes: the device normalises them (what a loader worker does)",
}
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}   # dense, per second


# Workers: a process each

def served(measure):
    "Answer each line of standard input with one measurement."
    print("ready", flush=True)
    for line in sys.stdin: print(json.dumps(measure(json.loads(line))), flush=True)


def elapsed(began, cpu, count):
    "Seconds and CPU seconds since the two clocks were read, for each of `count` things."
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": seconds / count, "cpu_seconds": cpu_seconds / count}


def peak_mb(device):
    if device.startswith("cuda"):
        import torch
        return torch.cuda.max_memory_allocated() / 2**20
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def make_step(name, device, batch=8, image=224, objects=2048, layers=6, backbone=MODEL["backbone"]):
    "A training step as a function without arguments, and the GFLOPs that one image needs."
    import torch
    from llb.runs.config import Config; from llb.runs.build import make_backbone, make_model
    from llb.runs.cost import config_cost
    from llb.core.distributed import Runtime, pick_device
    from llb.training.step import TrainStep
    torch.manual_seed(0)
    place, variant = pick_device(device), STEPS[name]
    images, labels = torch.randn(batch, 3, image, image, device=place), torch.arange(batch, device=place) % CLASSES
    sizes = {"num_objects": objects, "num_layers": layers, "image_size": image, "batch_size": batch}
    config = Config.of(**{**MODEL, "backbone": backbone, **sizes, **variant.get("config", {})})
    gflops = config_cost(config.model, CLASSES).train
    if "config" not in variant:
        from plain import PlainLLB, plain_step
        model = PlainLLB(image=image, objects=objects, layers=layers).to(place)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, config.optim.lr, weight_decay=config.optim.weight_decay)
        return lambda: plain_step(model, optimizer, images, labels, amp=place.type == "cuda"), gflops
    model = make_model(config.model, make_backbone(config.model, CLASSES), CLASSES).to(place).train()
    step = TrainStep(model, config, Runtime(place, amp=config.run.amp))
    data = {"image": images, "label": labels, "index": torch.arange(batch)}
    if variant.get("cached"):
        features = model.features(images)
        del data["image"]
        data |= {"tokens": features.tokens.bfloat16(), "visual_logits": torch.zeros(batch, CLASSES, device=place)}
        model.backbone.vit.cpu()
    run = lambda: step(data, 0, 0.0)
    run.step = step
    return run, gflops


def step_worker(name, device, **size):
    import torch
    from llb.training.step import TrainStep  # noqa: F401, so that imports are in `before`
    before = peak_mb(device)
    step, gflops = make_step(name, device, **size)
    step()
    step()
    def measure(request):
        wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
        wait()
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(request["steps"]): step()
        wait()
        took = elapsed(began, cpu, request["steps"])
        return {**took, "peak_mb": peak_mb(device), "before_mb": before, "gflops": gflops}
    served(measure)


def make_jpegs(folder, count, side=512):
    """Images with the spectrum of photographs (amplitude 1/f).

    At quality 90 they take about 170 kB each, as many bytes a pixel as ImageNet's have.
    """
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij"))
    f[0, 0] = 1
    for i in range(count):
        target = folder / f"c{i % 2}"
        target.mkdir(parents=True, exist_ok=True)
        amplitude = rng.normal(size=(3, *f.shape))
        phase = np.exp(2j * np.pi * rng.random((3, *f.shape)))
        noise = np.fft.irfft2(amplitude * phase / f, s=(side, side))
        mixed = noise.mean(0) * 1.5 + noise * .5
        scaled = (mixed / mixed.std() * 55 + 120).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(scaled).save(target / f"{i:05}.jpg", quality=90)
    return folder


def plain_transform():
    "What a first program writes: the release's choice of operations, one after another, on each image."
    from torchvision import transforms as t
    return t.Compose([t.Resize(256), t.CenterCrop(224), t.RandAugment(3, 9), t.ToTensor(), t.Normalize(MEAN, STD)])


def make_dataset(name, folder):
    "Training images under keys (epoch, index), read the way `name` says."
    from llb.data.augment import RandAugment
    from llb.data.preprocessing import Preprocessing
    from llb.data.batches import ImageDataset; from llb.data.images import scan_folder
    from llb.data.preprocessing import Geometry; from llb.data.image_cache import StoredImages, build_images
    images, geometry = scan_folder(folder), Preprocessing((224, 224), MEAN, STD, "bilinear", 224 / 256)
    if name == "plain": return PlainImages(images, plain_transform())
    if name == "oracle": return ImageDataset(images, geometry.transform(train=True))
    if not name.startswith("store"): return StoredImages(images, Geometry(geometry), RandAugment())
    store = build_images(images, geometry, Path(folder).parent / "stores" / str(os.getpid()))
    return StoredImages(images, store, RandAugment())


class PlainImages:
    "What a first program writes; its random numbers depend on the order of work."
    def __init__(self, images, transform): self.images, self.transform = images, transform

    def __len__(self): return len(self.images)

    def __getitem__(self, key):
        from PIL import Image
        index = key[1]
        path = self.images.root / self.images.files[index]
        with Image.open(path) as opened: image = self.transform(opened.convert("RGB"))
        return {"index": index, "label": self.images.labels[index], "image": image}


class Repeated:
    "A data set again and again, as a longer one."
    def __init__(self, dataset, length): self.dataset, self.length = dataset, length

    def __len__(self): return self.length

    def __getitem__(self, key): return self.dataset[key[0], key[1] % len(self.dataset)]


def input_worker(name, folder):
    import torch
    torch.set_num_threads(1)
    from llb.data.preprocessing import Preprocessing
    dataset, done = make_dataset(name, Path(folder)), 0
    n, normalise = len(dataset), Preprocessing((224, 224), MEAN, STD).normalise
    def load(i):
        image = dataset[divmod(i, n)]["image"]
        return normalise(image) if "normalised" in name else image
    load(0)
    def measure(request):
        nonlocal done
        began, cpu = time.perf_counter(), time.process_time()
        for i in range(request["images"]): load(done + i)
        done += request["images"]
        return elapsed(began, cpu, request["images"])
    served(measure)


def loop_worker(name, folder, device):
    "Training on real JPEGs with loader workers: images/s and the share of time that the loop waits for data."
    import torch
    from llb.data.batches import TrainBatches, make_loader
    cuda = device.startswith("cuda")
    batch, cores = (128, max(1, os.cpu_count() - 1)) if cuda else (8, 1)
    step = make_step("bf16+compiled" if cuda else "eager", device, batch=batch)[0].step
    dataset = make_dataset(name, Path(folder))
    def measure(request):
        length = batch * request["steps"]
        loader = make_loader(Repeated(dataset, length), TrainBatches(length, batch, 0), cores, pin_memory=cuda)
        waited, batches = 0., iter(loader)
        step(next(batches), 0, 0.)   # the workers have started
        if cuda: torch.cuda.synchronize()
        began = time.perf_counter()
        for number in range(1, request["steps"]):
            before = time.perf_counter()
            data = next(batches)
            waited += time.perf_counter() - before
            step(data, number, 0.)
        if cuda: torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        per_image = seconds / (request["steps"] - 1) / batch
        return {"seconds": per_image, "cpu_seconds": time.process_time(), "data_wait": waited / seconds,
                "loader_workers": cores}
    served(measure)


# The conductor

class Worker:
    "One variant in its process."
    def __init__(self, *words, env=()):
        command = [sys.executable, __file__, *map(str, words)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, **dict(env)})
        while (line := self.process.stdout.readline().strip()) != "ready":
            if not line and self.process.poll() is not None: raise SystemExit(f"the worker {words} ended")

    def measure(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def interleave(workers, rounds, **request):
    "Measurements of each worker, taken in turns: name -> list."
    found = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items(): found[name].append(worker.measure(**request))
    for worker in workers.values(): worker.close()
    return found


def spread(values):
    "Median and quartiles."
    low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": median(values), "low": low, "high": high}


def summary(found, base, per=1):
    "Seconds, images/s and the ratio to a base, by variant."
    rows = {}
    for name, values in found.items():
        ratios = lambda key, values=values: spread([b[key] / v[key] for b, v in zip(found[base], values)])
        seconds = spread([v["seconds"] for v in values])
        cpu_seconds = spread([v["cpu_seconds"] for v in values])
        rows[name] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "images_per_s": per / seconds["median"],
                      "speed_ratio": ratios("seconds"), "cpu_speed_ratio": ratios("cpu_seconds")}
        if "peak_mb" in values[0]:
            peak = max(v["peak_mb"] for v in values)
            base_peak, before = max(v["peak_mb"] for v in found[base]), values[0]["before_mb"]
            own_ratio = (peak - before) / (base_peak - found[base][0]["before_mb"])
            rows[name] |= {"peak_mb": peak, "memory_ratio": peak / base_peak, "before_mb": before,
                           "gflops_per_image": values[0]["gflops"], "own_memory_ratio": own_ratio}
    return rows


def matmul_rates(device):
    "GFLOP/s of one layer's product, which says what half precision can give on this machine."
    import torch
    rates, wait = {}, torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for dtype in torch.float32, torch.bfloat16:
        x, w = torch.randn(1576, 768, device=device, dtype=dtype), torch.randn(3072, 768, device=device, dtype=dtype)
        times = []
        for _ in range(15):
            wait(); began = time.perf_counter()
            torch.nn.functional.linear(x, w)
            wait(); times.append(time.perf_counter() - began)
        rates[str(dtype).split(".")[1]] = 2 * 1576 * 768 * 3072 / min(times) / 1e9
    return rates


def machine(device):
    "Where and with what it was measured."
    import timm, torch, torchvision
    from PIL import __version__ as pillow
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    field = lambda key: next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith(key)), "")
    flags = set(field("flags").split())
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, cwd=HERE).stdout.strip()
    return {"cpu": field("model name") or platform.processor(),
            "cores": os.cpu_count(),
            "instructions": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni"}),
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
            "threads": torch.get_num_threads(),
            "load_before": os.getloadavg(),
            "matmul_gflops_per_s": matmul_rates(device),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "pillow": pillow,
            "commit": git("rev-parse", "HEAD"),
            "changed_since_commit": bool(git("status", "--porcelain", "llb")),
            "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}


# What is measured

def bench_steps(args):
    "The table of training steps."
    base, *others = [n for n in STEPS if not args.only or n in args.only.split(";")]
    rows, batch = {}, 128 if args.device.startswith("cuda") else 8
    for i in range(0, len(others), 3):   # no more at a time, for each takes 2 GB; each group has its own base
        workers = {n: Worker("--step", n, "--device", args.device, "--batch", batch) for n in (base, *others[i:i + 3])}
        found = interleave(workers, args.rounds, steps=10 if args.device.startswith("cuda") else 1)
        rows = {**summary(found, base, per=batch), **rows}
    return {n: rows[n] for n in (base, *others)}


def bench_input(args, folder):
    "The table of input pipelines, on one core each."
    env = {"OMP_NUM_THREADS": "1", "LLB_CACHE": str(folder / "cache")}
    workers = {n: Worker("--input", n, "--folder", folder, env=env.items()) for n in INPUTS}
    return summary(interleave(workers, args.rounds, images=32), "plain")


def ddp_rank(args):
    "One of the processes of `bench_ddp`: steps with and without exchange of gradients in turn, and the exchange alone."
    import torch
    import torch.distributed as dist
    from contextlib import nullcontext
    from llb.runs.config import Config; from llb.runs.build import make_backbone, make_model
    from llb.core.distributed import barrier, start_runtime
    from llb.training.step import TrainStep
    with start_runtime(args.device) as runtime:
        torch.manual_seed(0)
        config = Config.of(**{**MODEL, "batch_size": 4})
        model = make_model(config.model, make_backbone(config.model, CLASSES), CLASSES).to(runtime.device).train()
        step = TrainStep(model, config, runtime)
        images, labels = torch.randn(4, 3, 224, 224, device=runtime.device), torch.arange(4, device=runtime.device)
        batch = {"image": images, "label": labels, "index": torch.arange(4)}
        gradient = torch.zeros(sum(p.numel() for p in step.model.branch.parameters()), device=runtime.device)
        exchange = step.exchange
        alone = lambda last: step.branch.no_sync() if runtime.world_size > 1 else nullcontext()
        found = {"exchanging": [], "not exchanging": [], "exchange alone": []}
        for i in range(args.rounds + 1):
            for name in found:
                step.exchange = alone if name == "not exchanging" else exchange
                barrier()
                began = time.perf_counter()
                if name != "exchange alone": step(batch, 0, 0.)
                elif runtime.world_size > 1: dist.all_reduce(gradient)
                if runtime.device.type == "cuda": torch.cuda.synchronize()
                if i: found[name].append(time.perf_counter() - began)
        result = {"processes": runtime.world_size, "gradient_mb": gradient.nbytes / 1e6}
        result |= {k: spread(v) for k, v in found.items()}
        if runtime.is_main: print("RESULT " + json.dumps(result))


def bench_ddp(args):
    "Steps of 4 images a process, one thread each: with one process and with two."
    rows = []
    for n in 1, 2:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        command = [*launch, __file__, "--ddp-rank", "--device", args.device, "--rounds", str(args.rounds)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode: raise SystemExit(done.stderr)
        result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
        rows.append(json.loads(result.removeprefix("RESULT ")))
    return rows


def bench_loop(args, folder):
    "Training from files: as a first program reads them, as we do, and from the store."
    names = ["plain", "files", "store"]
    workers = {n: Worker("--loop", n, "--folder", folder, "--device", args.device) for n in names}
    found = interleave(workers, min(3, args.rounds), steps=40 if args.device.startswith("cuda") else 4)
    rows = {}
    for n, values in found.items():
        waits = spread([v["data_wait"] for v in values])
        rows[n] = {**summary({n: values}, n)[n], "data_wait": waits, "loader_workers": values[0]["loader_workers"]}
    return rows


SWEEP = {"objects": [512, 2048, 8192, 32768], "layers": [2, 6, 10], "image": [160, 224, 320], "batch": [2, 8, 16]}

def bench_sweep(args):
    "Our step on a ViT-S/16, K = 2048, L = 6, 224 pixels, 8 images, as one of these changes: rows by size and value."
    rows, found = {}, {}
    for size, value in [(size, value) for size, values in SWEEP.items() for value in values]:
        key = tuple(sorted({**{k: v[-2] for k, v in SWEEP.items()}, "objects": 2048, size: value}.items()))
        if key not in found:
            worker = Worker("--step", "eager", "--device", args.device, "--backbone", "vit_small_patch16_224",
                            f"--{size}", value)
            found[key] = interleave({"eager": worker}, args.rounds, steps=10 if args.device.startswith("cuda") else 1)
        rows[f"{size} {value}"] = summary(found[key], "eager", per=value if size == "batch" else 8)["eager"]
    return rows


# Tables

def cell(s, form="{:.2f}"): return f"{form.format(s['median'])} ({form.format(s['low'])}-{form.format(s['high'])})"


def table(heads, rows):
    "Markdown: a line of headings, and a line of cells for each row."
    line = lambda cells: "|" + "".join(f" {c} |" if c else " |" for c in cells)
    return "\n".join([line(heads), "|" + "---|" * len(heads), *map(line, rows)])


def step_table(rows, peak=None):
    "Markdown."
    heads = ["training step", "s a step", "images/s", "times plain", "times plain, CPU seconds", "peak MB",
             "share of plain", "without imports"]
    def cells(name, r):
        speed = [cell(r["seconds"]), f"{r['images_per_s']:.2f}", cell(r["speed_ratio"]), cell(r["cpu_speed_ratio"])]
        memory = [f"{r['peak_mb']:.0f}", f"{r['memory_ratio']:.2f}", f"{r['own_memory_ratio']:.2f}"]
        mfu = [f"{r['gflops_per_image'] * 1e9 * r['images_per_s'] / peak:.1%}"] if peak else []
        return [name, *speed, *memory, *mfu]
    return table(heads + (["MFU"] if peak else []), [cells(n, r) for n, r in rows.items()])


def input_table(rows):
    "Markdown."
    heads = ["input, one core", "ms of CPU an image", "images/s and core", "times plain, CPU seconds",
             "times plain, wall"]
    def cells(name, r):
        cpu = r["cpu_seconds"]["median"]
        ratios = [cell(r["cpu_speed_ratio"], "{:.1f}"), cell(r["speed_ratio"], "{:.1f}")]
        return [name, f"{cpu * 1e3:.2f}", f"{1 / cpu:.0f}", *ratios]
    return table(heads, [cells(n, r) for n, r in rows.items()])


def loop_table(rows):
    "Markdown."
    heads = ["training from", "images/s", "waiting for data", "loader workers"]
    def cells(name, r):
        speed = f"{1 / r['seconds']['median']:.1f}"
        return [name, speed, cell(r["data_wait"], "{:.1%}"), str(r["loader_workers"])]
    return table(heads, [cells(n, r) for n, r in rows.items()])


def sweep_table(rows):
    "Markdown."
    heads = ["", "GFLOPs an image", "CPU seconds a step", "MB above imports"]
    def cells(name, r):
        memory = f"{r['peak_mb'] - r['before_mb']:.0f}"
        return [name, f"{r['gflops_per_image']:.1f}", cell(r["cpu_seconds"]), memory]
    return table(heads, [cells(n, r) for n, r in rows.items()])


def show(result):
    "All tables of a result."
    m = result["machine"]
    peak = next((v for k, v in PEAK_BF16.items() if k in m["device"]), None)
    rates = ", ".join(f"{k} {v:.0f}" for k, v in m["matmul_gflops_per_s"].items())
    place = f"{m['cpu']}, {m['cores']} cores, {m['device']}; load {m['load_before'][0]:.1f} before"
    print(f"{place}; matmul GFLOP/s: {rates}; torch {m['torch']}; commit {m['commit'][:8]}; {m['time']}\n")
    if "steps" in result: print(step_table(result["steps"], peak), "\n")
    if "input" in result: print(input_table(result["input"]), "\n")
    if "loop" in result: print(loop_table(result["loop"]), "\n")
    for row in result.get("ddp", []):
        print(", ".join(f"{k} {cell(v) if isinstance(v, dict) else v}" for k, v in row.items()))
    if "sweep" in result: print(sweep_table(result["sweep"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="",
                        help="variants of the step, with semicolons between them; the first is the base")
    parser.add_argument("--out", type=Path, help="where the result is kept as JSON")
    parser.add_argument("--show", type=Path)
    for part in "sweep", "ddp", "ddp-rank", "no-steps", "no-input", "no-loop":
        parser.add_argument(f"--{part}", action="store_true")
    for role in "step", "input", "loop", "folder":
        parser.add_argument(f"--{role}", help=argparse.SUPPRESS)
    parser.add_argument("--backbone", help=argparse.SUPPRESS)
    for size in "batch", "image", "objects", "layers":
        parser.add_argument(f"--{size}", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.show: return show(json.loads(args.show.read_text()))
    size_names = "batch", "image", "objects", "layers", "backbone"
    sizes = {k: v for k, v in vars(args).items() if k in size_names and v}
    if args.step: return step_worker(args.step, args.device, **sizes)
    if args.input: return input_worker(args.input, args.folder)
    if args.loop: return loop_worker(args.loop, args.folder, args.device)
    if args.ddp_rank: return ddp_rank(args)
    result = {"machine": machine(args.device)}
    if args.ddp: result["ddp"] = bench_ddp(args)
    elif args.sweep: result["sweep"] = bench_sweep(args)
    else:
        if not args.no_steps: result["steps"] = bench_steps(args)
        with tempfile.TemporaryDirectory() as folder:
            if not (args.no_input and args.no_loop): images = make_jpegs(Path(folder) / "images", 64)
            if not args.no_input: result["input"] = bench_input(args, images)
            if not args.no_loop: result["loop"] = bench_loop(args, images)
    result["machine"]["load_after"] = os.getloadavg()
    if args.out: args.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__": main()
