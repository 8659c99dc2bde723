"""End-to-end test-time training: a language model that keeps learning while it reads.

The names below are the public ones. They are imported when they are first used, so that `import ttt_e2e` needs no
PyTorch. `__init__.pyi` says the same to type checkers.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "ModelConfig",
    "Notebook",
    "RunConfig",
    "Session",
    "SessionPool",
    "TrainConfig",
    "Transformer",
    "UserError",
    "evaluate_documents",
    "load_model",
    "override",
    "preset",
    "read_mini_batch",
    "sequence_loss",
    "train",
]

_MODULES = {
    "ModelConfig": "config.schema",
    "Notebook": "retrieval.notebook",
    "RunConfig": "config.schema",
    "Session": "inference.session",
    "SessionPool": "inference.session_pool",
    "TrainConfig": "config.schema",
    "Transformer": "model.transformer",
    "UserError": "errors",
    "evaluate_documents": "evaluation.documents",
    "load_model": "inference.load",
    "override": "config.parse",
    "preset": "config.presets",
    "read_mini_batch": "inference.streaming",
    "sequence_loss": "inner_loop.meta_loss",
    "train": "training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
