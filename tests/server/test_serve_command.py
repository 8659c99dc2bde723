"""The command `serve`: its options, and errors before the model is loaded."""

import argparse
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from helpers import small_model
from server_helpers import FakeEngine, TestClient

from ttt_e2e.cli import serve as command
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.server.app import create_app
from ttt_e2e.server.keys import KEYS_VARIABLE
from ttt_e2e.server.settings import Settings

KEY = "a-long-key-for-anna-1"


@pytest.fixture(autouse=True)
def no_keys_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


def test_errors_come_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_address(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    missing = ("--model", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="--keys"):
        command.run(parse("--host", "0.0.0.0", *missing))
    with pytest.raises(UserError, match="holds no key"):
        (tmp_path / "keys").write_text("#")
        command.run(parse("--keys", str(tmp_path / "keys"), *missing))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"Port {port} of 127.0.0.1 is in use"):
            command.run(parse("--port", port, *missing))
    monkeypatch.setenv(KEYS_VARIABLE, f"anna {KEY}")
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    with pytest.raises(UserError, match="another host"):
        command.run(parse("--host", "no.such.host.invalid", *missing))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"uvicorn; install it with: pip install \"ttt-e2e\[serve\]\""):
        command.run(parse())


def test_options_reach_engine_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):  # noqa: N818 - not an error
        pass

    given: dict[str, Any] = {}

    def engine(template: Any, store: Any, **options: Any) -> Any:
        given.update(options, dtype=template.dtype)
        return SimpleNamespace(max_file_bytes=5000)

    def app(_: Any, settings: Settings) -> None:
        given.update(settings=settings)
        raise Reached

    model = small_model(vocab_size=257)
    monkeypatch.setattr("ttt_e2e.cli.serve.open_model", lambda _: (model, Tokenizer.train([""], 257)))
    monkeypatch.setattr("ttt_e2e.server.options.Engine", engine)
    monkeypatch.setattr("ttt_e2e.server.app.create_app", app)
    monkeypatch.setattr("ttt_e2e.server.middleware.logs.configure_logging", lambda: None)
    options = "--memory 3M --max-sessions 7 --max-session-tokens 900 --max-notebook 1M --max-batch 5 --rate 11"
    with pytest.raises(Reached):
        data = str(tmp_path / "sessions")
        command.run(parse(*options.split(), "--dtype", "bfloat16", "--max-body", "2K", "--port", "0", "--data", data))
    settings = given.pop("settings")
    assert given == dict(
        memory_bytes=3 << 20,
        max_sessions=7,
        max_session_tokens=900,
        max_notebook_bytes=1 << 20,
        max_batch=5,
        dtype=torch.bfloat16,
    )
    assert (settings.body_bytes, settings.file_bytes, settings.requests_per_minute) == (2048, 5000, 11)
    assert settings.model_name == "ttt-e2e"


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [("--memory", "512M", 512 << 20), ("--memory", "2g", 2 << 30), ("--max-body", "1000", 1000), ("--port", "0", 0)],
)
def test_numbers_on_the_command_line(option: str, text: str, value: int) -> None:
    assert getattr(parse(option, text), option[2:].replace("-", "_")) == value


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--memory", "much"),
        ("--memory", "0"),
        ("--memory", "1.5G"),
        ("--port", "65536"),
        ("--rate", "0"),
        ("--rate", "x"),
    ],
)
def test_invalid_numbers_on_the_command_line(option: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(option, text)
    assert text in capsys.readouterr().err


def test_engine_starts_and_stops_with_the_app(engine: FakeEngine) -> None:
    with TestClient(create_app(engine, Settings("m")), base_url="http://localhost"):  # type: ignore[arg-type]
        assert engine.started and not engine.stopped
    assert engine.stopped
