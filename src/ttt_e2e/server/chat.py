"""Chat messages as a prompt, by the model's chat template or a plain format."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ttt_e2e.data.text import read_text
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.load import ChatTemplate, chat_template

_ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
_ESCAPE, _ANSWER = "\ufdd0", "\ufdd1"  # noncharacters, which occur in no meaningful text


class ChatFormat:
    """How messages become a prompt; without a `template`, as lines such as "User: ...".

    special_tokens: ids by text. Where the template contains such a text it becomes the token; where a message does it
    stays text, so that a message cannot contain another one. `stop` are the strings before which an answer ends. Raises
    UserError if the template is invalid.
    """

    def __init__(self, template: ChatTemplate | None = None, special_tokens: Mapping[str, int] | None = None) -> None:
        self._special_tokens = dict(special_tokens or {})
        longest_first = sorted(self._special_tokens, key=len, reverse=True)
        self._special_text = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._bos, self._eos = ("", "") if template is None else (template.bos, template.eos)
        self._template: Any = None if template is None else _compile(template.source)
        end = "\nUser:" if template is None else "" if self._eos in self._special_tokens else self._eos
        self.stop: tuple[str, ...] = (end,) if end else ()

    def prompt(self, messages: list[dict[str, str]], continues: bool) -> list[str | int]:
        """The prompt for an answer to `messages`: texts and token ids. continues: it follows what was read before."""
        if self._template is None:
            # A generated answer begins with the space after "Assistant:", and so does one that is sent back.
            lines = [f"{_ROLES[message['role']]}: {message['content'].removeprefix(' ')}" for message in messages]
            return ["\n" * continues + "\n".join([*lines, "Assistant:"])]
        text = self._render(messages, add_generation_prompt=True)
        return self._parts(text.removeprefix(self._bos))  # a session already begins with this token

    def closing(self, messages: list[dict[str, str]]) -> list[str | int]:
        """What the template puts after an answer to `messages`, as texts and ids of special tokens."""
        if self._template is None:
            return []  # the next prompt begins with the end of the line
        try:
            answered = [*messages, {"role": "assistant", "content": _ANSWER}]
            text = self._render(answered, add_generation_prompt=False)
        except UserError:
            return []  # some templates require that users and assistants alternate
        return self._parts(text.rpartition(_ANSWER)[2]) if _ANSWER in text else []

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        def escape(content: str) -> str:  # puts `_ESCAPE` inside everything that looks like a special token
            content = content.replace(_ESCAPE, "")
            return self._special_text.sub(lambda found: found[0][:1] + _ESCAPE + found[0][1:], content)

        try:
            text: str = self._template.render(
                messages=[message | {"content": escape(message["content"])} for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self._bos,
                eos_token=self._eos,
                tools=None,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"The chat template rejects these messages ({error}); send others.") from error
        return text

    def _parts(self, text: str) -> list[str | int]:
        pieces = enumerate(self._special_text.split(text))  # every second one is a special token
        parts = [self._special_tokens[piece] if i % 2 else piece.replace(_ESCAPE, "") for i, piece in pieces]
        return [part for part in parts if part != ""]


def load_chat_format(model: Path, tokenizer: Tokenizer, file: Path | None = None) -> ChatFormat:
    """The chat template in `file`, else the one in the model folder `model`, else the plain format."""
    source = None if file is None else read_text(file)
    return ChatFormat(chat_template(model, source), tokenizer.special)


def _compile(source: str) -> Any:
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError('A chat template needs Jinja; install it with: pip install "ttt-e2e[serve]"') from error

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)  # Jinja's own filter escapes HTML

    # Templates come with models, from anywhere: they may compute, but not reach anything.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise UserError(f"The chat template is not a valid Jinja template: {error}.") from error
