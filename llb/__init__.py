"""Label-focused Latent-object Biasing (LLB, ICLR 2024): study, train and extend it.

Public names are imported when first used, so that `import llb` and `llb --help` are instant.
"""
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0.dev0"

# each imports from its left
ROOMS = ("core", "data", "models", "runs", "training", "analysis", "plots", "study", "apps")

_HOME = {
    "load_backbone": "models.backbone",
    "list_backbones": "models.backbone",
    "HeadModel": "models.heads",
    "LLB": "models.llb",
    "LLBOutput": "models.llb",
    "LLBLoss": "models.loss",
    "load_reference_checkpoint": "models.llb",
    "to_reference_state_dict": "models.llb",
    "load_data": "data.splits",
    "load_dataset": "data.datasets",
    "Config": "runs.config",
    "evaluate": "training.evaluate",
    "compare": "study.compare",
    "start": "runs.processes",
    "attach": "runs.processes",
    "Trainer": "training.trainer",
    "RunMonitor": "apps.monitor",
    "Explorer": "apps.explorer",
    "InputError": "core.errors",
}
__all__ = list(_HOME)

if TYPE_CHECKING:   # what an editor reads; a test compares it with _HOME
    from .apps.explorer import Explorer as Explorer
    from .apps.monitor import RunMonitor as RunMonitor
    from .core.errors import InputError as InputError
    from .data.datasets import load_dataset as load_dataset
    from .data.splits import load_data as load_data
    from .models.backbone import list_backbones as list_backbones
    from .models.backbone import load_backbone as load_backbone
    from .models.heads import HeadModel as HeadModel
    from .models.llb import LLB as LLB
    from .models.llb import LLBOutput as LLBOutput
    from .models.llb import load_reference_checkpoint as load_reference_checkpoint
    from .models.llb import to_reference_state_dict as to_reference_state_dict
    from .models.loss import LLBLoss as LLBLoss
    from .runs.config import Config as Config
    from .runs.processes import attach as attach
    from .runs.processes import start as start
    from .study.compare import compare as compare
    from .training.evaluate import evaluate as evaluate
    from .training.trainer import Trainer as Trainer


def __getattr__(name: str):
    if name in ROOMS:
        return import_module(f"llb.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'llb' has no attribute {name!r}; it offers {', '.join(_HOME)}")
    return getattr(import_module(f"llb.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOME, *ROOMS])
