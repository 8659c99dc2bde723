"""Fixtures of the tests of Hugging Face checkpoints."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import CASES, SHAPE, SHARDED, Pretrained


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """A model of transformers and the checkpoint that it was saved to, by its name in `CASES`."""
    transformers = pytest.importorskip("transformers", reason="transformers writes the checkpoints")
    made: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in made:
            family, changes, shard = CASES[name]
            torch.manual_seed(len(made))
            kind = getattr(transformers, f"{family}ForCausalLM")
            model = kind(kind.config_class(**{**SHAPE, **changes})).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:  # norms and biases, so that a test sees them
                        parameter.add_(0.2 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp("pretrained")
            model.save_pretrained(folder, max_shard_size=shard)
            assert (shard == SHARDED) == (folder / "model.safetensors.index.json").is_file()
            made[name] = model, folder
        return made[name]

    return make


@pytest.fixture
def checkpoint(pretrained: Pretrained, tmp_path: Path) -> Path:
    """A sharded checkpoint that a test may damage."""
    return Path(shutil.copytree(pretrained("llama, one key head, sharded")[1], tmp_path / "checkpoint"))
