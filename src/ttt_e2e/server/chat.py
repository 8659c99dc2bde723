"""A conversation as one prompt: by a model's own chat template, or a plain one."""

import json
from pathlib import Path
from typing import Any, NoReturn

from ttt_e2e.data.text import read_text
from ttt_e2e.errors import UserError
from ttt_e2e.model_files import read_json

_NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


class Chat:
    """How messages become a prompt, and what ends an answer.

    source: a Jinja template as Hugging Face models have it; None: lines such as "User: ...", up to "Assistant:".
    bos, eos: how the template's special tokens are written. The tokenizer never reads a special token out of a text,
    so a template that is made of them gives the model their spelling. Raises UserError for a template that is none.
    """

    def __init__(self, source: str | None = None, bos: str = "", eos: str = "") -> None:
        self._bos, self._eos = bos, eos
        self._template = None if source is None else _template(source)
        ends = "\nUser:" if source is None else eos
        self.stop: tuple[str, ...] = (ends,) if ends else ()

    def prompt(self, messages: list[dict[str, str]], begun: bool) -> str:
        """The text after which the model answers `messages`. begun: it follows on something that was read.

        Raises UserError if the template cannot take these messages.
        """
        if self._template is None:
            lines = [f"{_NAMES[message['role']]}: {message['content']}" for message in messages]
            return "\n" * begun + "\n".join([*lines, "Assistant:"])
        from jinja2 import TemplateError

        try:
            text: str = self._template.render(
                messages=messages, add_generation_prompt=True, bos_token=self._bos, eos_token=self._eos, tools=None
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"The chat template cannot take these messages ({error}); send others.") from error
        return text.removeprefix(self._bos)  # a session begins with that token already


def load_chat(model: Path, file: Path | None = None) -> Chat:
    """The chat template in `file`, or else the model folder's own, or else the plain one.

    Raises UserError if what is there is no template.
    """
    path = model / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    source = config.get("chat_template") if file is None else read_text(file)
    if isinstance(source, list):  # several, by name
        named = {one["name"]: one["template"] for one in source}
        source = named.get("default")
    if source is None:
        return Chat()
    return Chat(source, _token(config.get("bos_token")), _token(config.get("eos_token")))


def _token(value: Any) -> str:
    """A special token in a tokenizer_config.json: a string, or an object that holds it."""
    return str(value.get("content", "") if isinstance(value, dict) else value or "")


def _template(source: str) -> Any:
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError('A chat template needs Jinja; install it with: pip install "ttt-e2e[serve]"') from error

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)  # Jinja's own escapes for HTML

    # A template comes with a model, from anywhere: it can compute, but not reach anything.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise UserError(f"The chat template is no sound Jinja template: {error}.") from error
