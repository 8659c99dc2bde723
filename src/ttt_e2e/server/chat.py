"""Chat messages as a prompt, by the model's chat template or a plain format."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from ttt_e2e.data.text import read_text
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.chat_template import JinjaTemplate, Messages, MessagesRefusedError
from ttt_e2e.inference.load import ChatTemplate, chat_template
from ttt_e2e.server.chat_tokens import ANSWER, ChatTokens
from ttt_e2e.server.engine.records import Before, Prompt
from ttt_e2e.server.tool_calls import HERMES, CallForm, described, find_form, written_out

_ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
_QUESTION = {"role": "user", "content": "?"}
# Stands for the conversation so far: what a template adds to this one it adds to any.
_EARLIER = [_QUESTION, {"role": "assistant", "content": ANSWER}]
# A function and a call of it, by which it is found out whether and how a template writes calls.
_NAME, _ARGUMENT, _CALL_ID = "fzqx", "qxz", "zqzqzqzqz"
_FUNCTION = {"name": _NAME, "description": "?", "parameters": {"type": "object", "properties": {}}}
_CALL = {"id": _CALL_ID, "type": "function", "function": {"name": _NAME, "arguments": {_ARGUMENT: 1}}}


class ChatFormat:
    """How messages become a prompt where a model has no chat template: lines such as "User: ...".

    `stop` are the strings before which an answer ends.
    """

    stop: tuple[str, ...] = ("\nUser:",)

    @property
    def call_form(self) -> CallForm | None:
        """How an answer calls functions; None if it cannot."""
        return None

    def prompt(
        self,
        messages: list[dict[str, Any]],
        before: Before,
        values: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Prompt:
        """The prompt for an answer to `messages`, as text or token ids.

        Args:
            messages: with `role` and `content`, a text or text parts. Parts are joined by line breaks, as vLLM does,
                unless a template takes them as they are. Calls of functions, and messages with their results, are as
                transformers has them.
            before: what the session holds. If "nothing", ids are its whole text, in place of BOS. If "conversation",
                the prompt is what the messages add to one.
            values: further variables of a template, by name.
            tools: functions that the answer may call, as transformers has them; only where there is a `call_form`.

        Raises UserError if a template refuses the messages, and names one, or fails.
        """
        # A generated answer begins with the space after "Assistant:", and so does one that is sent back.
        said = _joined(written_out(messages))
        lines = [f"{_ROLES[message['role']]}: {message['content'].removeprefix(' ')}" for message in said]
        return "\n" * (before != "nothing") + "\n".join([*lines, "Assistant:"])

    def closing(self, values: Mapping[str, Any] | None = None) -> Prompt:
        """What follows an answer whatever comes next. values: as for `prompt`."""
        return ""  # the next prompt begins with the end of the line


class TemplateFormat(ChatFormat):
    """Messages as token ids by a model's chat template, as transformers gives them.

    Special tokens in the template become tokens; in a message they stay text. Raises UserError if the template is
    invalid.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template, self._tokens, self._bos = JinjaTemplate(template), ChatTokens(tokenizer), tokenizer.bos
        self._special = tokenizer.special
        end = template.special_tokens.get("eos_token", "")
        self.stop = (end,) if end and end not in tokenizer.special else ()

    @property
    def call_form(self) -> CallForm:
        """How an answer calls functions: as the template writes it, or, if that is not clear, as Hermes models do."""
        return self._own_call_form or HERMES

    @cached_property
    def _own_call_form(self) -> CallForm | None:
        """How the template writes calls; None if it does not name functions, or writes no arguments as JSON."""

        def render(*messages: dict[str, Any], begins: bool = False, **values: Any) -> str:
            try:
                return self._template.render(messages, values, add_generation_prompt=begins)
            except UserError:
                return ""

        called = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        question = render(_QUESTION, begins=True)
        end = render(*_EARLIER).rpartition(ANSWER)[2]
        one, two = (render(_QUESTION, called | {"tool_calls": [_CALL] * n}) for n in (1, 2))
        named = _NAME in render(_QUESTION, begins=True, tools=[{"type": "function", "function": _FUNCTION}])
        if not (named and one.startswith(question) and one.endswith(end)):
            return None
        answers = [
            text[len(question) : len(text) - len(end)].replace(f', "id": "{_CALL_ID}"', "") for text in (one, two)
        ]
        arguments = rf'\{{\s*"{_ARGUMENT}"\s*:\s*1\s*\}}'
        return find_form(answers[0], answers[1], _NAME, arguments, self._special)

    def prompt(
        self,
        messages: list[dict[str, Any]],
        before: Before,
        values: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Prompt:
        """As for `ChatFormat`; what a template writes once, such as a default system message, is not repeated."""
        own = self._own_call_form is not None
        if tools and (not own or before == "other tools") and before != "conversation":
            messages = described(messages, tools, self.call_form)
        if not own:
            messages = written_out(messages)
        messages = self._tokens.escape(messages if self._template.takes_parts else _joined(messages))
        values = self._tokens.escape({**({"tools": list(tools)} if tools and own else {}), **(values or {})})
        if before in ("conversation", "other tools"):
            closing, added = self._closing(values), self._after_answer([*_EARLIER, *messages], values)
            if len(added) > len(closing) and added[: len(closing)] == closing:
                return added[len(closing) :]
        try:
            ids = self._tokens.encode(self._template.render(messages, values))
        except MessagesRefusedError as error:
            shorter = range(1, len(messages))
            index = bisect_left(shorter, True, key=lambda number: self._refuses(messages[:number], values))
            raise UserError(f"messages.{index}: the chat template refuses it ({error}); send others.") from error
        # A session begins with BOS already. One that the template writes before every question is no beginning.
        if before != "nothing" and ids[:1] == [self._bos] and self._bos not in self._next_question(values):
            del ids[0]
        if not ids:
            raise UserError("The chat template makes nothing of these messages; send others.")
        return ids

    def closing(self, values: Mapping[str, Any] | None = None) -> Prompt:
        """The ids that the template puts after an answer, whatever comes next."""
        return self._closing(self._tokens.escape(dict(values or {})))

    def _closing(self, values: Mapping[str, Any]) -> list[int]:
        at_the_end = self._after_answer(_EARLIER, values, add_generation_prompt=False)
        pairs = zip(at_the_end, self._next_question(values), strict=False)
        return [i for i, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]

    def _next_question(self, values: Mapping[str, Any]) -> list[int]:
        return self._after_answer([*_EARLIER, _QUESTION], values)

    def _after_answer(
        self, messages: Messages, values: Mapping[str, Any], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids after ANSWER in a conversation; none if the template refuses it, or leaves earlier messages out."""
        try:
            text = self._template.render(messages, values, add_generation_prompt=add_generation_prompt)
        except UserError:
            return []
        return self._tokens.encode(text, after=ANSWER) if ANSWER in text else []

    def _refuses(self, messages: Messages, values: Mapping[str, Any]) -> bool:
        try:
            self._template.render(messages, values)
        except UserError:
            return True
        return False


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with text for content."""
    texts = [
        content if isinstance(content := message["content"], str) else "\n".join(part["text"] for part in content)
        for message in messages
    ]
    return [message | {"content": text} for message, text in zip(messages, texts, strict=True)]


def load_chat_format(model: Path, tokenizer: Tokenizer, file: Path | None = None) -> ChatFormat:
    """The chat template in `file`, else the one in the model folder `model`, else the plain format."""
    source = None if file is None else read_text(file)
    template = chat_template(model, source)
    return ChatFormat() if template is None else TemplateFormat(template, tokenizer)
