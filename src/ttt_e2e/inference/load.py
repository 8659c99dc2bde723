"""A model folder ready to read with: the model, its tokenizer, the tokens that end a text, and the chat template."""

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ttt_e2e.data.text import read_text
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.files import read_json
from ttt_e2e.model.checkpoint import (
    CHAT_TEMPLATE,
    GENERATION,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    load_transformer,
)
from ttt_e2e.model.transformer import Transformer


def shipped_model() -> Path:
    """The folder of the model that comes with the package. Raises UserError if this installation lacks it."""
    folder = Path(str(importlib.resources.files("ttt_e2e"))) / "shipped"
    if not (folder / "config.json").is_file():
        raise UserError(
            "This installation comes without the shipped model; name a model folder with --model, or reinstall."
        )
    return folder


def load_model(
    folder: str | Path | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Transformer, Tokenizer]:
    """The model in `folder` (None: the shipped one), ready to read with, and its tokenizer.

    dtype: of the matrix products that the model is for. For bfloat16 it holds its matrices in it, which gives the same
    in half the memory, and faster; sessions in another dtype are then refused. Raises UserError if the folder is not a
    model, or has no tokenizer of the same vocabulary.
    """
    folder = shipped_model() if folder is None else Path(folder)
    model = load_transformer(folder, device, dtype).eval().requires_grad_(False)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; put the tokenizer that made its training tokens there.")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    tokenizer.leave_out(model.config.vocab_size)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens, but its model has a vocabulary of "
            f"{model.config.vocab_size}; put the tokenizer that made its training tokens there."
        )
    tokenizer.end_ids = end_tokens(folder, tokenizer)
    return model, tokenizer


class ChatTemplate(NamedTuple):
    """A Jinja template of a Hugging Face model, and the special tokens that it may use by name, as in `bos_token`."""

    source: str
    special_tokens: Mapping[str, str]


def chat_template(folder: Path, source: str | None = None) -> ChatTemplate | None:
    """The chat template of the model in `folder`, the default one of several; None if there is none.

    source: a template to use in place of the model's own, with the model's special tokens. Raises UserError for a file
    that cannot be read, and a template that is not a string.
    """
    settings = _settings(folder / TOKENIZER_CONFIG)
    own = settings.get("chat_template")
    if source is not None:
        own = source
    elif (folder / CHAT_TEMPLATE).is_file():
        own = read_text(folder / CHAT_TEMPLATE)
    elif isinstance(own, list):  # several, by name
        defaults = (one.get("template") for one in own if isinstance(one, dict) and one.get("name") == "default")
        own = next(defaults, None)
    if own is None:
        return None
    if not isinstance(own, str):
        raise UserError(
            f"The chat_template in {folder / TOKENIZER_CONFIG} is not a string; remove it, or use an unaltered copy."
        )
    named = {**_settings(folder / SPECIAL_TOKENS), **settings}
    tokens = {name: _spelling(token) for name, token in named.items() if name.endswith("_token")}
    return ChatTemplate(own, {name: text for name, text in tokens.items() if text})


def end_tokens(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a text which the model in `folder` generates.

    These are BOS, which begins the next document, and the ids in the model's own settings, such as the end of an
    answer, if the tokenizer has them. Raises UserError for a file that cannot be read.
    """
    ends = _settings(folder / GENERATION).get("eos_token_id")
    named = ends if isinstance(ends, list) else [ends]
    named.append(tokenizer.special.get(_spelling(_settings(folder / TOKENIZER_CONFIG).get("eos_token"))))
    return frozenset({tokenizer.bos, *(i for i in named if isinstance(i, int) and 0 <= i < tokenizer.vocab_size)})


def _settings(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _spelling(token: Any) -> str:
    """A special token in a tokenizer_config.json: a string, or an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""
