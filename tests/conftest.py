"""What several tests share: small models, and the reference numbers of the official implementation."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors import safe_open
from safetensors.numpy import save_file

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.data.prepare import prepare
from ttt_e2e.model.transformer import Transformer

settings.register_profile("ours", deadline=None)  # a busy machine is no failure
settings.load_profile("ours")

# Small tensors: threads would only wait for each other.
torch.set_num_threads(1)

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    if not GOLDEN.is_dir():
        pytest.skip("the official implementation's reference tensors (../shared/golden) are not here")
    return GOLDEN


def small_config(**changes: object) -> ModelConfig:
    """A model of four blocks, two of them suffix, that runs in milliseconds."""
    values: dict = dict(
        vocab_size=50,
        width=16,
        layers=4,
        heads=2,
        mlp_width=24,
        suffix_layers=2,
        window=12,
        mini_batch=5,
        init_std=0.3,
    )
    return ModelConfig(**{**values, **changes})


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> Transformer:
    """`small_config` as a model; norms are moved off one, additions of low rank off zero, so that a test sees them."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(small_config(**changes), generator).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or ".fast.up_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


@contextmanager
def plain_twins() -> Iterator[None]:
    """The plain twins of all operators, as a compiler is given them."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("attention", "elementwise"):
            patch.setattr(f"ttt_e2e.ops.{module}.is_compiling", lambda: True)
        yield


def made_up_tokens(folder: Path, documents: int) -> Path:
    """Little documents of made-up sentences, prepared in `folder`; a tenth of them is held out."""
    choices = random.Random(0)
    words = ["red", "green", "blue", "fish", "bird", "tree", "sings", "swims", "grows"]
    lines = [" ".join(choices.choices(words, k=choices.randint(5, 60))) for _ in range(documents)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    prepare([folder / "texts.jsonl"], folder / "tokens", vocab_size=272, val_share=0.1, progress=False)
    return folder / "tokens"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """So small a model only waits for a second thread, whatever a run has set before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_fact(path: Path, name: str, value: Any) -> None:
    """Alter what a session file says of itself, as somebody who means harm might."""
    with safe_open(path, "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        facts = json.loads(file.metadata()["session"])
    save_file(tensors, path, {"session": json.dumps(facts | {name: value})})
