"""A model folder ready to read with: the model, its tokenizer, and the tokens that end a text."""

import importlib.resources
from pathlib import Path

import torch

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.pretrained_metadata import end_tokens
from ttt_e2e.model.checkpoint import load_transformer
from ttt_e2e.model.transformer import Transformer


def shipped_model() -> Path:
    """The folder of the model that comes with the package. Raises UserError if this installation lacks it."""
    folder = Path(str(importlib.resources.files("ttt_e2e"))) / "shipped"
    if not (folder / "config.json").is_file():
        raise UserError(
            "This installation comes without the shipped model; name a model folder with --model, or reinstall."
        )
    return folder


def load_model(folder: str | Path | None = None, device: str | torch.device = "cpu") -> tuple[Transformer, Tokenizer]:
    """The model in `folder` (None: the shipped one), ready to read with, and its tokenizer.

    Raises UserError if the folder is not a model, or has no tokenizer of the same vocabulary.
    """
    folder = shipped_model() if folder is None else Path(folder)
    model = load_transformer(folder, device).eval().requires_grad_(False)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; put the tokenizer that made its training tokens there.")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens, but its model has a vocabulary of "
            f"{model.config.vocab_size}; put the tokenizer that made its training tokens there."
        )
    tokenizer.end_ids = end_tokens(folder, tokenizer)
    return model, tokenizer
