"""The options of the service, however it is started, and the engine and settings that follow from them."""

from argparse import ArgumentTypeError
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference.load import shipped_model
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import DTYPES
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.server.chat import load_chat_format
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.shared_store import SharedStore
from ttt_e2e.server.engine.store import Store
from ttt_e2e.server.keys import Keys
from ttt_e2e.server.settings import Settings
from ttt_e2e.units import size


def _bytes(value: Any) -> Any:
    try:
        return size(value) if isinstance(value, str) else value
    except ArgumentTypeError as error:
        raise ValueError(str(error)) from error


_Size = Annotated[PositiveInt, BeforeValidator(_bytes)]
MAX_FILE_BYTES = 4 << 30  # of an imported session: with full attention sessions grow without bound


class Options(BaseModel):
    """What `ttt-e2e serve` and the application for Ray Serve share; `ttt-e2e serve --help` describes each option."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: Path | None = None
    chat_template: Path | None = None
    memory: _Size = 2 << 30
    max_sessions: PositiveInt = 100
    max_session_tokens: PositiveInt = 10_000_000
    max_notebook: _Size = 64 << 20
    max_body: _Size = 64 << 20
    max_batch: PositiveInt = 16
    rate: PositiveInt = 600
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def model_name(self) -> str:
        """What the model is called in the API."""
        return "ttt-e2e" if self.model is None else self.model.resolve().name


def open_engine(
    options: Options,
    folder: Path | None,
    model: Transformer,
    tokenizer: Tokenizer,
    store: Store | SharedStore,
    keys: Keys,
) -> tuple[Engine, Settings]:
    """An engine with the model, which is in `folder` (None: the shipped one), and the settings of the service."""
    engine = Engine(
        Session(model, tokenizer, dtype=DTYPES[options.dtype]),
        store,
        max_batch=options.max_batch,
        memory_bytes=options.memory,
        max_sessions=options.max_sessions,
        max_session_tokens=options.max_session_tokens,
        max_notebook_bytes=options.max_notebook,
    )
    settings = Settings(
        model_name=options.model_name,
        keys=keys,
        chat=load_chat_format(folder or shipped_model(), tokenizer, options.chat_template),
        body_bytes=options.max_body,
        file_bytes=min(engine.max_file_bytes, MAX_FILE_BYTES),
        requests_per_minute=options.rate,
    )
    return engine, settings
