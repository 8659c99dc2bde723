"""Chat templates of Hugging Face models: Jinja with what transformers gives to them, in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from ttt_e2e.errors import UserError
from ttt_e2e.inference.load import ChatTemplate

if TYPE_CHECKING:
    from jinja2 import nodes

Messages = Sequence[Mapping[str, Any]]


class MessagesRefusedError(UserError):
    """The template itself says that it does not accept these messages."""


class JinjaTemplate:
    """A chat template that is ready to render. `takes_parts` says whether a message's content may be a list of parts.

    Raises UserError if the template is invalid, or if Jinja is not installed.
    """

    def __init__(self, template: ChatTemplate) -> None:
        try:
            from jinja2.exceptions import TemplateError
        except ImportError as error:
            raise UserError('A chat template needs Jinja; install it with: pip install "ttt-e2e[serve]"') from error
        environment = _environment()
        try:
            self.takes_parts = _takes_parts(environment.parse(template.source))
            self._template = environment.from_string(template.source)
        except (TemplateError, RecursionError) as error:
            raise UserError(f"The chat template is not a valid Jinja template: {error}.") from error
        self._special_tokens = template.special_tokens

    def render(self, messages: Messages, values: Mapping[str, Any], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation. values: further variables of the template, by name.

        Raises MessagesRefusedError if the template calls `raise_exception`, and UserError if it fails.
        """
        given = {"tools": None, "documents": None, **self._special_tokens, **values}
        given |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return str(self._template.render(given))
        except MessagesRefusedError:
            raise
        except Exception as error:  # a template computes, and may fail in any way
            raise UserError(
                f"The model's chat template failed ({type(error).__name__}: {error}), which is its own error; "
                "serve the model with another template, or mend it."
            ) from error


def _takes_parts(template: "nodes.Template") -> bool:
    """Whether a template goes through the parts of a content: a loop over a message's, or a variable that holds it."""
    from jinja2 import nodes

    def is_content(node: nodes.Node | None) -> bool:
        while isinstance(node, nodes.Filter):
            node = node.node
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Getattr) and node.attr == "content"

    assigned = [found.target for found in template.find_all(nodes.Assign) if is_content(found.node)]
    names = {"content", *(target.name for target in assigned if isinstance(target, nodes.Name))}
    loops = [loop.iter for loop in template.find_all(nodes.For)]
    return any(is_content(over) or (isinstance(over, nodes.Name) and over.name in names) for over in loops)


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlocks(Extension):
        """`{% generation %}` marks what an assistant says, for training; it is rendered as if it were not there."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise MessagesRefusedError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # Jinja's own filter escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    # Templates come with models, from anywhere: they may compute, but not reach anything.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationBlocks]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment
