"""Files beside a pretrained model's tokenizer: the tokens that end a text, and the chat template."""

from pathlib import Path
from typing import Any, NamedTuple

from ttt_e2e.data.text import read_text
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.files import read_json
from ttt_e2e.model.checkpoint import CHAT_TEMPLATE, GENERATION, TOKENIZER_CONFIG


class ChatTemplate(NamedTuple):
    """A Jinja template of a Hugging Face model, and the spelling of the special tokens that it may use."""

    source: str
    bos: str
    eos: str


def chat_template(folder: Path, source: str | None = None) -> ChatTemplate | None:
    """The chat template of the model in `folder`, the default one of several; None if there is none.

    source: a template to use in place of the model's own, with the model's special tokens. Raises UserError for a file
    that cannot be read, and a template that is not a string.
    """
    settings = _settings(folder / TOKENIZER_CONFIG)
    if source is None:
        source = _own_template(folder, settings)
    if source is None:
        return None
    return ChatTemplate(source, _spelling(settings.get("bos_token")), _spelling(settings.get("eos_token")))


def _own_template(folder: Path, settings: dict[str, Any]) -> str | None:
    source = settings.get("chat_template")
    if (folder / CHAT_TEMPLATE).is_file():
        source = read_text(folder / CHAT_TEMPLATE)
    elif isinstance(source, list):  # several, by name
        named = [one for one in source if isinstance(one, dict) and one.get("name") == "default"]
        source = named[0].get("template") if named else None
    if source is not None and not isinstance(source, str):
        raise UserError(
            f"The chat_template in {folder / TOKENIZER_CONFIG} is not a string; remove it, or use an unaltered copy."
        )
    return source


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
    return str(token.get("content", "") if isinstance(token, dict) else token or "")
