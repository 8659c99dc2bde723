"""The command `serve`: its options, and the process around the service."""

import argparse
import contextlib
import errno
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from ttt_e2e.cli.common import add_options, open_model
from ttt_e2e.convert.named import find_model
from ttt_e2e.errors import UserError
from ttt_e2e.units import count, size, whole

HELP = "serve a model over HTTP, with sessions that outlive a request"
DESCRIPTION = """Serve a model over HTTP: OpenAI's and Anthropic's APIs, and sessions, a memory that lasts across
requests. There is a web page at /. Without API keys, the service is for this machine only."""
EPILOG = """examples:
  ttt-e2e serve                                       http://127.0.0.1:8000, the shipped model
  ttt-e2e serve --model run/model --data memory --port 9000
  ttt-e2e serve --host 0.0.0.0 --keys keys.txt        lines of keys.txt: a name and a key

Ctrl-C or SIGTERM stops it; everything that was confirmed to clients is on disk."""

DTYPE: dict[str, Any] = {
    "choices": ("float32", "bfloat16"),
    "default": "float32",
    "help": "precision of matrix products (default: float32)",
}
"""The option --dtype of commands that serve."""

_QUEUED_CONNECTIONS = 128  # by the system, until they are accepted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `serve` to `parser`."""
    add_options(parser, "model")
    parser.add_argument(
        "--data", type=Path, default=Path("sessions"), metavar="DIR", help="folder for sessions (default: sessions)"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address to serve (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=whole(0, 2**16 - 1), default=8000, metavar="N", help="0 picks a free port (default: 8000)"
    )
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help="API keys, a name and a key per line (or TTT_E2E_API_KEYS)"
    )
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja template (default: the model's, or a plain format)"
    )
    parser.add_argument(
        "--memory", type=size, default=2 << 30, metavar="BYTES", help="memory for idle sessions (default: 2G)"
    )
    parser.add_argument("--max-sessions", type=count, default=100, metavar="N", help="sessions per key (default: 100)")
    parser.add_argument(
        "--max-session-tokens", type=count, default=10_000_000, metavar="N", help="per session (default: 10000000)"
    )
    parser.add_argument(
        "--max-notebook",
        type=size,
        default=64 << 20,
        metavar="BYTES",
        help="text in the notebook of a session (default: 64M)",
    )
    parser.add_argument(
        "--max-body", type=size, default=64 << 20, metavar="BYTES", help="size of a text sent (default: 64M)"
    )
    parser.add_argument(
        "--max-batch", type=count, default=16, metavar="N", help="texts per call of the model (default: 16)"
    )
    parser.add_argument(
        "--rate", type=count, default=600, metavar="N", help="requests per minute and key (default: 600)"
    )
    parser.add_argument("--dtype", **DTYPE)
    add_options(parser, "device", "threads")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code."""
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f'Serving needs {error.name}; install it with: pip install "ttt-e2e[serve]"') from error
    from ttt_e2e.server.keys import check_host, load_keys

    keys = load_keys(arguments.keys, os.environ)
    check_host(arguments.host, keys)
    listener = listen(arguments.host, arguments.port)
    with listener:
        from ttt_e2e.server.app import create_app
        from ttt_e2e.server.connections import bounded_protocol, connection_limit
        from ttt_e2e.server.engine.store import Store
        from ttt_e2e.server.middleware.logs import configure_logging
        from ttt_e2e.server.options import Options, open_engine
        from ttt_e2e.server.serving import Server

        configure_logging()
        protocol = bounded_protocol(connection_limit())
        store = Store(arguments.data)
        options = Options(**{name: getattr(arguments, name) for name in Options.model_fields})
        arguments.model = find_model(arguments.model, progress=True)  # the options have its name
        model, tokenizer = open_model(arguments)
        engine, settings = open_engine(options, arguments.model, model, tokenizer, store, keys)
        app = create_app(engine, settings)
        server = Server(app, engine, protocol, _QUEUED_CONNECTIONS)
        # From here on a signal ends the service in order, also one that comes before uvicorn listens to them. After
        # the shutdown uvicorn raises the signal that caused it once more.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.handle_exit)
        print(f"Serving {settings.model_name} at {url_of(listener)}, sessions in {arguments.data}.", file=sys.stderr)

        # If the engine cannot start, uvicorn stops, in some versions with SystemExit.
        with contextlib.suppress(SystemExit):
            server.run(sockets=[listener])
        if hasattr(app.state, "failure"):
            raise app.state.failure
        if store.lost:
            raise UserError(store.lost)
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at this address; clients that connect while the model is loading wait.

    Raises UserError if there is no such address, or if it is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"There is no address {host} ({error.strerror}); give another host.") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_QUEUED_CONNECTIONS)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"Port {port} of {host} is in use; give another port.") from error
        raise UserError(f"Cannot serve at {host}, port {port}: {error.strerror}. Give others.") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The address of a socket from `listen`, for people and browsers."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
