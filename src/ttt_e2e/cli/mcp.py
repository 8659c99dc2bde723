"""The command `mcp`: its options, and the process around the server."""

import argparse
import contextlib
import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType

from ttt_e2e.cli.common import add_options, note, open_model
from ttt_e2e.cli.serve import DTYPE, listen, url_of
from ttt_e2e.convert.named import find_model
from ttt_e2e.errors import INTERRUPTED, UserError
from ttt_e2e.files import user_data

HELP = "give sessions to an assistant, as tools of the Model Context Protocol"
DESCRIPTION = """Serve sessions by the Model Context Protocol (MCP). With its tools an assistant has a model read
texts and learn from them, asks it, and finds passages of what it has read. By default a client starts
this command and talks to it over standard input and output."""
EPILOG = """examples:
  ttt-e2e mcp                                         the shipped model
  ttt-e2e mcp --model smollm2 --files ~/texts         it may also read the files in ~/texts
  ttt-e2e mcp --http 8001                             http://127.0.0.1:8001/mcp

In a client's configuration: "ttt-e2e": {"command": "ttt-e2e", "args": ["mcp"]}
Everything that was confirmed to clients is on disk; the process may be ended at any time."""

_GOODBYE_SECONDS = 5  # for connections that are open when the server is stopped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mcp`."""
    add_options(parser, "model")
    parser.add_argument(
        "--sessions",
        type=Path,
        metavar="DIR",
        help="folder for sessions (default: ~/.local/share/ttt-e2e/sessions)",
    )
    parser.add_argument(
        "--files",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="clients may have the files in DIR read; may be repeated (default: no files, only texts that they send)",
    )
    parser.add_argument(
        "--http",
        type=_address,
        metavar="[HOST:]PORT",
        help="serve over HTTP, at /mcp, to this machine only; port 0 picks a free one",
    )
    parser.add_argument("--dtype", **DTYPE)
    add_options(parser, "device", "threads")


def run(arguments: argparse.Namespace) -> int:
    """Serve until the client closes standard input or, with --http, until SIGINT or SIGTERM; returns the exit code."""
    try:
        import mcp.server  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(f'The MCP server needs {error.name}; install it with: pip install "ttt-e2e[mcp]"') from error
    with contextlib.redirect_stdout(sys.stderr):  # on standard output there is nothing but the protocol
        from ttt_e2e.inference.load import shipped_model
        from ttt_e2e.inference.session import Session
        from ttt_e2e.inference.session_file import DTYPES
        from ttt_e2e.mcp_server.allowed_files import AllowedFiles
        from ttt_e2e.mcp_server.server import SessionServer
        from ttt_e2e.mcp_server.sessions import SessionFolder
        from ttt_e2e.server.chat import TemplateFormat, load_chat_format

        files = AllowedFiles(arguments.files)
        listener = listen(*arguments.http) if arguments.http else None
        arguments.model = find_model(arguments.model, progress=True)
        model, tokenizer = open_model(arguments)
        chat = load_chat_format(arguments.model or shipped_model(), tokenizer)
        sessions = SessionFolder(
            arguments.sessions or user_data() / "sessions",
            Session(model, tokenizer, dtype=DTYPES[arguments.dtype]),
            chat if isinstance(chat, TemplateFormat) else None,
        )
        server = SessionServer(sessions, files)
    if listener is None:
        if sys.stdin.isatty():
            note(
                "Waiting for a client on standard input; enter the command into a client's configuration, or serve "
                "with --http PORT. Ctrl-C ends it."
            )
        # The thread that waits for standard input cannot be interrupted. To end at once loses nothing.
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        try:
            server.run("stdio")
        except BaseExceptionGroup as group:  # of the tasks that read and write
            raise _first(group) from None
        return 0
    with listener:
        from ttt_e2e.server.connections import uvicorn_config

        config = uvicorn_config(
            server.http_app(arguments.http[0]), log_level="warning", timeout_graceful_shutdown=_GOODBYE_SECONDS
        )

        class HttpServer(uvicorn.Server):
            def handle_exit(self, number: int, frame: FrameType | None) -> None:
                server.stop()
                super().handle_exit(number, frame)

        http_server = HttpServer(config)
        # After the shutdown uvicorn raises the signal that caused it once more.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, http_server.handle_exit)
        print(f"Serving MCP at {url_of(listener)}/mcp, sessions in {sessions.folder}.", file=sys.stderr)
        http_server.run(sockets=[listener])
    return 0


def _first(error: BaseException) -> BaseException:
    """The first of the errors in a group, such as that the client does not read any more."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _address(text: str) -> tuple[str, int]:
    """The type of [HOST:]PORT, where the host is this machine."""
    from ttt_e2e.server.keys import is_loopback

    found = re.fullmatch(r"(?:\[([^]]+)\]:|([^:]+):)?([0-9]{1,5})", text)
    if not found or int(found[3]) >= 1 << 16:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not an address; write one such as 8001 or 127.0.0.1:8001")
    host = found[1] or found[2] or "127.0.0.1"
    if not is_loopback(host):
        raise argparse.ArgumentTypeError(
            f"there are no keys, so only this machine may connect, not {host}; write 127.0.0.1, or leave it out"
        )
    return host, int(found[3])
