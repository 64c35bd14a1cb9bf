"""Label-focused Latent-object Biasing (LLB, ICLR 2024): study, train and extend it.

Public names are imported when first used, so that `import llb` and `llb --help` are instant.
"""
from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "load_backbone": "models.backbone",
    "LLB": "models.llb",
    "LLBLoss": "models.loss",
    "LLBOutput": "models.llb",
    "Config": "runs.config",
    "load_data": "data.splits",
    "load_dataset": "data.datasets",
    "load_reference_checkpoint": "models.release",
    "to_reference_state_dict": "models.release",
    "Trainer": "training.trainer",
    "start": "runs.processes",
    "attach": "runs.processes",
    "RunMonitor": "apps.monitor",
    "Explorer": "apps.explorer",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'llb' has no attribute {name!r}; it offers {', '.join(_HOME)}")
    return getattr(import_module(f"llb.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOME])
