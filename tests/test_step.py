"""One training step: fast paths against the plain ones they replace, what they save, gradients that are not finite."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from llb.core.distributed import Runtime
from llb.core.errors import InputError
from llb.models.backbone import load_backbone
from llb.models.llb import LLB
from llb.models.loss import batch_totals, LLBLoss
from llb.models.objects import entropy, LatentObjects
from llb.runs.build import make_backbone, make_model
from llb.runs.config import Config
from llb.training.step import TrainStep

HERE = Path(__file__).parent
SMALL = dict(backbone="test_vit", random_backbone=True, image_size=32, num_layers=3, target_layer=3, batch_size=6,
             num_objects=16)


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
    return [*terms.values(), *(p.detach() for p in step.model.branch.parameters())]


def far(found, wanted):
    "The largest difference, relative to the largest value."
    def one(f, w): return float((f - w).detach().abs().max() / w.detach().abs().max().clamp_min(1e-12))
    return max(one(f, w) for f, w in zip(found, wanted))


# The step that is compared against is itself the same objective

OUR_NAMES = {
    "token": "vit.cls_token", "positions": "vit.pos_embed", "patches": "vit.patch_embed.proj", "vit": "vit.blocks",
    "norm": "vit.norm", "head": "vit.head", "visual_block": "ours.visual_block", "assign": "ours.objects.assigner",
    "embeddings": "ours.objects.embedding.weight", "label_token": "ours.cls_token", "label_norm": "ours.norm",
    "label_blocks": "ours.label_blocks", "label_head": "ours.classifier"}
IN_A_BLOCK = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def our_name(key):
    "What we call a tensor of the plain model."
    first, *rest = key.split(".")
    return ".".join([OUR_NAMES[first], *(IN_A_BLOCK.get(name, name) for name in rest)])


def test_the_plain_step_of_the_benchmarks_is_ours(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent / "benchmarks"))
    from plain import PlainLLB
    torch.manual_seed(0)
    backbone = load_backbone("vit_tiny_patch16_224", pretrained=False, num_classes=7, image_size=32)
    ours = LLB(backbone, num_objects=24, num_layers=3)
    plain = PlainLLB(dim=192, heads=3, image=32, classes=7, objects=24, layers=3)
    theirs = {f"vit.{k}": v for k, v in backbone.vit.state_dict().items()}
    theirs |= {f"ours.{k}": v for k, v in ours.branch.state_dict().items()}
    plain.load_state_dict({k: theirs[our_name(k)] for k in plain.state_dict()})
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    found, wanted = plain(images, labels), LLBLoss()(ours.train()(images), labels)
    assert torch.allclose(found["loss"], wanted["loss"], rtol=1e-5)
    assert torch.allclose(found["visual_logits"], ours.eval()(images).visual_logits, atol=1e-5)
    found["loss"].backward()
    wanted["loss"].backward()
    gradients = {k: p.grad for k, p in plain.named_parameters() if p.requires_grad}
    assert len(gradients) == len(list(ours.branch.parameters()))
    theirs = {f"ours.{k}": p.grad for k, p in ours.branch.named_parameters()}
    for k, g in gradients.items(): assert far([g], [theirs[our_name(k)]]) < 1e-4, k


# Objects in chunks

@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("objects", [40, 5000])
def test_training_without_kept_assignments_gives_the_same_parameters(objects, micro, monkeypatch):
    results = []
    for limit in 10**9, 1:
        monkeypatch.setattr("llb.models.llb.COMPACT", limit)
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
    objects = LatentObjects(24, 300, temperature)
    x, probe = torch.randn(8, 9, 24, requires_grad=True), torch.randn(8, 9, 24)
    def run(decouple):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp): z, mean, h = decouple(x)
        loss = (z.float() * probe).sum() + entropy(mean.mean(0)) + (mean ** 2).sum()
        return [z.float(), mean, h, *torch.autograd.grad(loss, [x, *objects.parameters()])], z.dtype
    (wanted, kind), (found, same_kind) = run(objects.summarise), run(objects.compact)
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
    for decouple in objects.compact, objects.summarise:
        with Largest() as seen:
            z, mean, _ = decouple(x)
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
z, mean, _ = getattr(objects, sys.argv[1])(x)
(z.sum() + mean.square().sum()).backward()
print(peak() - base)
"""


@pytest.mark.slow
def test_peak_memory_with_32768_objects():
    "The assignments alone are 308 MB here; the plain path holds several of that size at once."
    def peak(how):
        done = subprocess.run([sys.executable, "-c", PEAK, how], capture_output=True, text=True, check=True)
        return float(done.stdout)
    plain, compact = peak("summarise"), peak("compact")
    assert plain > 2.5 * 308 and compact < 308 and compact < plain / 3, (plain, compact)


# No waiting in the step

class Syncs(TorchDispatchMode):
    "Counts the reads of a number by the host."
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [dict(), dict(micro_batches=3), dict(num_objects=5000),
                                     dict(opt="SGD", clip_grad=None), dict(amp=True)], ids=str)
def test_the_step_reads_no_number_back(options):
    step, batch = make_step(**options)
    with Syncs() as seen: step(batch, 0, 0.)
    assert seen.count == 0
    with Syncs() as seen: step.refused()
    assert seen.count == 1   # there, on purpose


def test_the_count_of_images_stays_on_the_device():
    totals = batch_totals([torch.ones(2, 4) / 4, torch.ones(3, 4) / 4])
    assert isinstance(totals.num_images, torch.Tensor) and totals.num_images == 5
    assert torch.allclose(totals.mean_assignment, torch.full((4,), .25))


def test_after_a_gradient_that_is_not_finite_nothing_changes():
    step, batch = make_step()
    step(batch, 0, 0.)
    before = [p.detach().clone() for p in step.model.branch.parameters()]
    spoiled = {**batch, "image": batch["image"] * float("nan"), "index": batch["index"] + 10}
    assert not any(step(spoiled, 1, 0.).values()) and not any(step(batch, 2, 0.).values())
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.branch.parameters()))
    number, sentence = step.refused()
    assert number == 1 and "step 2 is not finite" in sentence and str([10, 11, 12, 13, 14, 15]) in sentence


# Compiled, in bf16

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
    # a backbone that a file has keeps the name of that file's weights
    save_file(again.backbone.vit.state_dict(), tmp_path / "t.safetensors")
    plain, half = (load_backbone("test_vit", tmp_path / "t.safetensors", image_size=32) for _ in range(2))
    assert half.to_bfloat16().content_hash() == plain.content_hash()
