"""Every fast path against the plain one it replaces: the same numbers, and what it saves. How fast it is, `benchmarks/` says."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import equal, spoil_step

from llb.core.distributed import Runtime
from llb.core.errors import InputError
from llb.data.splits import load_data
from llb.runs.config import Config
from llb.runs.folder import check_resumable, read_events

HERE = Path(__file__).parent
SMALL = dict(backbone="test_vit", random_backbone=True, image_size=32, num_layers=3, target_layer=3, batch_size=6, num_objects=16)
CPU = Runtime(torch.device("cpu"))


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


def test_a_run_of_before_these_options_can_be_resumed(images):
    data, config = load_data(images), Config.of(**SMALL)
    new = ("compile", "backbone_dtype", "cache_views", "cache_images")
    saved = {"config": {k: v for k, v in json.loads(json.dumps(config.to_dict())).items() if k not in new}, "classes": list(data.classes),
             "images": data.train.fingerprint(sizes=False), "fingerprint": data.train.fingerprint()}
    check_resumable(saved, config, data)
    check_resumable(saved, config.but(cache_images=True), data)
    for change in dict(compile=True), dict(backbone_dtype="bfloat16"):
        with pytest.raises(InputError, match=next(iter(change))): check_resumable(saved, config.but(**change), data)
