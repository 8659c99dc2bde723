"""A conversation as one prompt: by a model's own chat template, or a plain one."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ttt_e2e.data.text import read_text
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.pretrained_metadata import ChatTemplate, chat_template

_NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
_MARK, _ANSWER = "\ufdd0", "\ufdd1"  # no characters, and in no text that means anything


class Chat:
    """How messages become a prompt, and what ends an answer.

    template: None: lines such as "User: ...", up to "Assistant:". special: ids of the tokenizer's special tokens, by
    spelling. Where the template spells one it is that token; where a message does, it is text, so that nobody can end
    his own message and begin another's. stop: strings before which an answer ends. Raises UserError for a template
    that is none.
    """

    def __init__(self, template: ChatTemplate | None = None, special: Mapping[str, int] | None = None) -> None:
        self._special = dict(special or {})
        spellings = sorted(self._special, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, spellings)) or "(?!)")
        self._bos, self._eos = ("", "") if template is None else (template.bos, template.eos)
        self._template: Any = None if template is None else _template(template.source)
        ends = "\nUser:" if template is None else "" if self._eos in self._special else self._eos
        self.stop: tuple[str, ...] = (ends,) if ends else ()

    def prompt(self, messages: list[dict[str, str]], begun: bool) -> list[str | int]:
        """Texts, and the ids of special tokens between them, after which the model answers `messages`.

        begun: they follow on something that was read. Raises UserError if the template cannot take these messages.
        """
        if self._template is None:
            # An answer begins with the space after "Assistant:", and comes back with it.
            lines = [f"{_NAMES[message['role']]}: {message['content'].removeprefix(' ')}" for message in messages]
            return ["\n" * begun + "\n".join([*lines, "Assistant:"])]
        text = self._rendered(messages, True)
        return self._parts(text.removeprefix(self._bos))  # a session begins with that token already

    def closing(self, messages: list[dict[str, str]]) -> list[str | int]:
        """Texts and ids that the template has after an answer to `messages`, before the next message."""
        if self._template is None:
            return []  # a next prompt begins with the line's end
        try:
            text = self._rendered([*messages, {"role": "assistant", "content": _ANSWER}], False)
        except UserError:
            return []  # some templates want users and assistants in turn
        return self._parts(text.rpartition(_ANSWER)[2]) if _ANSWER in text else []

    def _rendered(self, messages: list[dict[str, str]], ask: bool) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._template.render(
                messages=[message | {"content": self._as_text(message["content"])} for message in messages],
                add_generation_prompt=ask,
                bos_token=self._bos,
                eos_token=self._eos,
                tools=None,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"The chat template cannot take these messages ({error}); send others.") from error
        return text

    def _parts(self, text: str) -> list[str | int]:
        parts: list[str | int] = []
        at = 0
        for found in self._spelled.finditer(text):
            parts += [text[at : found.start()].replace(_MARK, ""), self._special[found[0]]]
            at = found.end()
        parts.append(text[at:].replace(_MARK, ""))
        return [part for part in parts if part != ""]

    def _as_text(self, content: str) -> str:
        """`content` with a mark inside of whatever spells a special token."""
        return self._spelled.sub(lambda found: found[0][:1] + _MARK + found[0][1:], content.replace(_MARK, ""))


def load_chat(model: Path, tokenizer: Tokenizer, file: Path | None = None) -> Chat:
    """The chat template in `file`, or else that of the model in the folder `model`, or else the plain one.

    Raises UserError if what is there is no template.
    """
    source = None if file is None else read_text(file)
    return Chat(chat_template(model, source), tokenizer.special)


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
