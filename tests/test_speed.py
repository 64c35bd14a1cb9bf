"""Every fast path against the plain one it replaces: the same numbers, and what it saves. How fast it is, `benchmarks/` says."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_images
from safetensors.torch import load_file, save_file
from test_train import equal, spoil_step
from torch.utils._python_dispatch import TorchDispatchMode

from llb.core.distributed import Runtime
from llb.core.errors import InputError
from llb.data.splits import load_data
from llb.models.backbone import load_backbone
from llb.models.llb import LLB
from llb.models.loss import batch_totals, LLBLoss
from llb.models.objects import entropy, LatentObjects
from llb.models.token_cache import token_layout
from llb.runs.build import make_backbone, make_model
from llb.runs.config import Config
from llb.runs.folder import read_events
from llb.training.step import TrainStep
from llb.training.trainer import check_resumable

HERE = Path(__file__).parent
SMALL = dict(backbone="test_vit", random_backbone=True, image_size=32, num_layers=3, target_layer=3, batch_size=6, num_objects=16)
CPU = Runtime(torch.device("cpu"))


def make_step(dtype=torch.float32, **options):
    "A training step and a batch for it."
    torch.manual_seed(0)
    config = Config.of(**{**SMALL, **options})
    model = make_model(config.model, make_backbone(config.model, 3), 3).to(dtype).train()
    batch = {"image": torch.randn(6, 3, 32, 32, dtype=dtype), "label": torch.arange(6) % 3, "index": torch.arange(6)}
    return TrainStep(model, config, Runtime(torch.device("cpu"), amp=config.run.amp)), batch


def after_steps(step, batch, count=2):
    "Terms of the last of some steps, and the parameters then."
    for number in range(count): terms = step(batch, number, 0.)
    return [terms, *(p.detach() for p in step.model.branch.parameters())]


def far(found, wanted):
    "The largest difference, relative to the largest value."
    return max(float((f - w).detach().abs().max() / w.detach().abs().max().clamp_min(1e-12)) for f, w in zip(found, wanted))


# The step that is compared against is itself the same objective

def test_the_plain_step_of_the_benchmarks_is_ours(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent / "benchmarks"))
    from plain import PlainLLB
    torch.manual_seed(0)
    ours = LLB(load_backbone("vit_tiny_patch16_224", pretrained=False, num_classes=7, image_size=32), num_objects=24, num_layers=3, target_layer=11)
    plain = PlainLLB(dim=192, heads=3, image=32, classes=7, objects=24, layers=3)
    names = {"token": "vit.cls_token", "positions": "vit.pos_embed", "patches": "vit.patch_embed.proj", "norm": "vit.norm", "head": "vit.head"}
    theirs = {f"vit.{k}": v for k, v in ours.backbone.vit.state_dict().items()} | {f"ours.{k}": v for k, v in ours.branch.state_dict().items()}
    def source(key):
        key = key.replace("fc1", "mlp.fc1").replace("fc2", "mlp.fc2").replace("qkv", "attn.qkv")
        part, _, rest = key.partition(".")
        if part in names: return f"{names[part]}.{rest}".rstrip(".")
        key = key.replace(".proj", ".attn.proj")
        if part == "vit": return f"vit.blocks.{rest.replace('.proj', '.attn.proj')}"
        return "ours." + key.replace("assign", "objects.assign").replace("embeddings", "objects.embeddings").replace("label_token", "cls_token").replace(
            "label_norm", "norm").replace("label_head", "classifier")
    plain.load_state_dict({k: theirs[source(k)] for k in plain.state_dict()})
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    found, wanted = plain(images, labels), LLBLoss()(ours.train()(images), labels)
    assert torch.allclose(found["loss"], wanted.loss, rtol=1e-5) and torch.allclose(found["visual_logits"], ours.eval()(images).visual_logits, atol=1e-5)
    found["loss"].backward()
    wanted.loss.backward()
    gradients = {k: p.grad for k, p in plain.named_parameters() if p.requires_grad}
    assert len(gradients) == len(list(ours.branch.parameters()))
    theirs = {f"ours.{k}": p.grad for k, p in ours.branch.named_parameters()}
    for k, g in gradients.items(): assert far([g], [theirs[source(k)]]) < 1e-4, k


# Objects in chunks

@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("objects", [40, 5000])
def test_training_without_kept_assignments_gives_the_same_parameters(objects, micro, monkeypatch):
    results = []
    for limit in 10**9, 1:
        monkeypatch.setattr("llb.training.step.COMPACT", limit)
        step, batch = make_step(num_objects=objects, opt="SGD", lr=.1, micro_batches=micro)
        assert step.model.branch.compact == (limit == 1)
        results.append(after_steps(step, batch))
    assert far(results[1], results[0]) < 1e-5


def test_from_4096_objects_on_assignments_are_not_kept():
    assert [make_step(num_objects=k)[0].model.branch.compact for k in (2048, 4096)] == [False, True]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("temperature", [.02, .1, 2.])
def test_chunks_agree_with_the_plain_path(temperature, amp, monkeypatch):
    "Values and gradients to 1e-5; with bf16 autocast to bf16's rounding, of which each path has its own."
    monkeypatch.setattr("llb.models.objects.CHUNK", 3 * 9 * 300)
    torch.manual_seed(0)
    objects, x, probe = LatentObjects(24, 300, temperature), torch.randn(8, 9, 24, requires_grad=True), torch.randn(8, 9, 24)
    def run(decouple):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp): z, mean, h = decouple(x)
        loss = (z.float() * probe).sum() + entropy(mean.mean(0)) + (mean ** 2).sum()
        return [z.float(), mean, h, *torch.autograd.grad(loss, [x, *objects.parameters()])], z.dtype
    def plain(x):
        z, a = objects(x)
        return z, a.mean(1), entropy(a.detach())
    (wanted, kind), (found, same_kind) = run(plain), run(objects.compact)
    assert kind == same_kind == (torch.bfloat16 if amp else torch.float32)
    assert far(found, wanted) < (2e-2 if amp else 1e-5)


class Largest(TorchDispatchMode):
    "Remembers the most elements that a tensor had."
    elements = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor): self.elements = max(self.elements, t.numel())
        return out


def test_no_tensor_is_as_large_as_the_assignments(monkeypatch):
    monkeypatch.setattr("llb.models.objects.CHUNK", 2 * 49 * 1000)
    objects, x = LatentObjects(8, 1000), torch.randn(16, 49, 8, requires_grad=True)
    sizes = []
    for compact in True, False:
        with Largest() as seen:
            if compact: z, mean, _ = objects.compact(x)
            else: z, mean = (lambda z, a: (z, a.mean(1)))(*objects(x))
            (z.sum() + mean.square().sum()).backward()
        sizes.append(seen.elements)
    assert sizes == [2 * 49 * 1000, 16 * 49 * 1000]


PEAK = """
import sys, torch
from llb.models.objects import LatentObjects
torch.manual_seed(0)
objects, x = LatentObjects(64, 32768), torch.randn(12, 196, 64, requires_grad=True)
# in MB; not ru_maxrss, which begins with the peak of the process that started this one
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
base = peak()
if sys.argv[1] == "plain": z, a = objects(x); mean = a.mean(1)
else: z, mean, _ = objects.compact(x)
(z.sum() + mean.square().sum()).backward()
print(peak() - base)
"""


@pytest.mark.slow
def test_peak_memory_with_32768_objects():
    "The assignments alone are 308 MB here; the plain path holds several of that size at once."
    plain, compact = (float(subprocess.run([sys.executable, "-c", PEAK, how], capture_output=True, text=True, check=True).stdout) for how in ("plain", "compact"))
    assert plain > 2.5 * 308 and compact < 308 and compact < plain / 3, (plain, compact)


# No waiting in the step

class Syncs(TorchDispatchMode):
    "Counts the reads of a number by the host."
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [dict(), dict(micro_batches=3), dict(num_objects=5000), dict(opt="SGD", clip_grad=None), dict(amp=True)], ids=str)
def test_the_step_reads_no_number_back(options):
    step, batch = make_step(**options)
    with Syncs() as seen: step(batch, 0, 0.)
    assert seen.count == 0
    with Syncs() as seen: step.refused()
    assert seen.count == 1   # there, on purpose


def test_the_count_of_images_stays_on_the_device():
    totals = batch_totals([torch.ones(2, 3, 4) / 4, torch.ones(3, 4) / 4])
    assert isinstance(totals.num_images, torch.Tensor) and totals.num_images == 5 and torch.allclose(totals.mean_assignment, torch.full((4,), .25))


def test_after_a_gradient_that_is_not_finite_nothing_changes():
    step, batch = make_step()
    step(batch, 0, 0.)
    before = [p.detach().clone() for p in step.model.branch.parameters()]
    spoiled = {**batch, "image": batch["image"] * float("nan"), "index": batch["index"] + 10}
    assert step(spoiled, 1, 0.).eq(0).all() and step(batch, 2, 0.).eq(0).all()
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.branch.parameters()))
    number, sentence = step.refused()
    assert number == 1 and "step 2 is not finite" in sentence and str([10, 11, 12, 13, 14, 15]) in sentence


@pytest.mark.slow
def test_a_run_that_looks_rarely_stops_at_the_same_step(images, tmp_path, forked):
    "The host learns of it up to `log_every` steps later; step, state and sentence are the same."
    states, errors = [], []
    for log_every in 1, 5:
        run = forked(data_dir=images, save_dir=tmp_path, name=f"every{log_every}", log_every=log_every, augment="randaugment", patch=(spoil_step, 3))
        assert run.finish(120) == [1], run.text
        folder = tmp_path / f"every{log_every}"
        assert read_events(folder)[-1]["step"] == 3
        states.append(load_file(folder / "checkpoints/step-00000003/state.safetensors"))
        errors += [line for line in run.text.splitlines() if line.startswith("error")]
    assert equal(*states) and len(errors) == 2 and errors[0] == errors[1]


# Compiled, in bf16, in shares

@pytest.mark.slow
def test_compiled_steps_are_the_same_and_names_stay():
    steps = [make_step(opt="SGD", lr=.1, compile=c, drop_path=0.) for c in (False, True)]
    names = [list(s.model.state_dict()) for s, _ in steps]
    assert names[0] == names[1]
    plain, compiled = (after_steps(*s) for s in steps)
    assert far(compiled, plain) < 1e-4
    from torch._dynamo.utils import counters
    assert counters["stats"]["unique_graphs"] > 0   # it was compiled


def test_a_missing_compiler_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="no-such-compiler"): make_step(compile=True)


def test_a_backbone_in_bf16_keeps_its_name_and_can_be_saved(tmp_path):
    config = Config.of(**SMALL, backbone_dtype="bfloat16")
    backbone = make_backbone(config.model, 3)
    assert backbone.dtype == torch.bfloat16
    model = make_model(config.model, backbone, 3).eval()
    batch = torch.randn(4, 3, 32, 32)
    out = model(batch)
    model.save_pretrained(tmp_path)
    again = LLB.from_pretrained(tmp_path)
    assert again.backbone.content_hash() == backbone.content_hash() and again.backbone.dtype == torch.float32
    assert far([out.label_logits, out.visual_logits.float()], [(w := again(batch)).label_logits, w.visual_logits]) < .1
    assert torch.equal(again.backbone.vit.blocks[0].mlp.fc1.weight, backbone.vit.blocks[0].mlp.fc1.weight.float())
    save_file(again.backbone.vit.state_dict(), tmp_path / "t.safetensors")   # a backbone that a file has keeps the name of that file's weights
    plain, half = (load_backbone("test_vit", tmp_path / "t.safetensors", image_size=32) for _ in range(2))
    assert half.to_bfloat16().content_hash() == plain.content_hash()
    images = load_data(make_images(tmp_path / "p")).val
    assert token_layout(half, 3, images) != token_layout(plain, 3, images)   # but not its features


@pytest.fixture
def backbone_file(tmp_path):
    torch.manual_seed(0)
    save_file(load_backbone("test_vit", pretrained=False, image_size=32, num_classes=3).vit.state_dict(), tmp_path / "backbone.safetensors")
    return tmp_path / "backbone.safetensors"


def say_share():
    "In the training process: what it holds of the backbone when training starts."
    from llb.training.trainer import Trainer
    fit = Trainer.fit
    def wrapped(self):
        local = sum(getattr(p, "_local_tensor", p).numel() for p in self.model.backbone.vit.parameters())
        print(f"SHARE {local / sum(p.numel() for p in self.model.backbone.vit.parameters()):.2f}", flush=True)
        return fit(self)
    Trainer.fit = wrapped


def model_and_data(images):
    config = Config.of(**SMALL)
    return make_model(config.model, make_backbone(config.model, 3), 3), load_data(images)


def test_a_run_of_before_these_options_can_be_resumed(images):
    data, config = load_data(images), Config.of(**SMALL)
    new = ("compile", "backbone_dtype", "cache_views", "cache_images")
    saved = {"config": {k: v for k, v in json.loads(json.dumps(config.to_dict())).items() if k not in new}, "classes": list(data.classes),
             "images": data.train.fingerprint(sizes=False), "fingerprint": data.train.fingerprint()}
    check_resumable(saved, config, data)
    check_resumable(saved, config.but(cache_images=True), data)
    for change in dict(compile=True), dict(backbone_dtype="bfloat16"):
        with pytest.raises(InputError, match=next(iter(change))): check_resumable(saved, config.but(**change), data)
