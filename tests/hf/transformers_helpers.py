"""What the tests of the models in the transformers library share."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import small_model

from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.streaming import forward
from ttt_e2e.model.transformer import Transformer

LENGTHS = (3, 17, 33, 6, 33)  # of mini-batches of 5 tokens, and a window of 12
TEXT = "The street was still wet; the rain had stopped. A bird sang in the tree, and another answered. " * 4


def learning_model(**changes: Any) -> Transformer:
    return small_model(**{"inner_loop.lr": 0.3, **changes}).eval().requires_grad_(False)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(1, 50, length) for length in lengths]


def padded(rows: list[np.ndarray], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length in one batch, padded on the left, and its mask."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.from_numpy(row), 1
    return ids, mask


def generated(model: Transformer, prompt: np.ndarray, count: int, learn: bool = True, **options: Any) -> list[int]:
    return list(Session(model, learn=learn).generate_tokens(prompt, max_tokens=count, temperature=0, **options))


def last_logits(model: Transformer, text: np.ndarray, learn: bool = True) -> torch.Tensor:
    """The logits after `text`, as a session has them that has read it."""
    session = Session(model, learn=learn)
    session.read(text)
    state, _, pending = session.state()
    return forward(model, state, torch.from_numpy(pending)[None])[0][0, -1]


def load(folder: Path) -> Transformer:
    return load_model(folder)[0]
