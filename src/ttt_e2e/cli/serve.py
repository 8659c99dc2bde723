"""What `ttt-e2e serve` looks like on the command line. The service and PyTorch are imported only when it runs."""

import argparse
import contextlib
import errno
import os
import signal
import socket
import sys
from pathlib import Path

from ttt_e2e.errors import UserError
from ttt_e2e.units import size

DESCRIPTION = """Serve a model over HTTP: OpenAI's API, and sessions, a memory that outlives a request. A page for
browsers is at /. Without keys it is for this machine only."""
EPILOG = """examples:
  ttt-e2e serve                                       http://127.0.0.1:8000, the shipped model
  ttt-e2e serve --model run/model --data memory --port 9000
  ttt-e2e serve --host 0.0.0.0 --keys keys.txt        lines of keys.txt: a name and a key

Ctrl-C or SIGTERM ends it; what has been acknowledged is on the disk."""

_FILE = 4 << 30  # bytes: a session of full attention may grow beyond any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options of `serve`."""
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model folder (default: the shipped model)")
    parser.add_argument(
        "--data", type=Path, default=Path("sessions"), metavar="DIR", help="where sessions are kept (default: sessions)"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address to serve (default: 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help="API keys, a name and a key a line (or TTT_E2E_API_KEYS)"
    )
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="a Jinja template (default: the model's, or a plain one)"
    )
    parser.add_argument(
        "--memory", type=size, default=2 << 30, metavar="BYTES", help="of sessions in memory (default: 2G)"
    )
    parser.add_argument("--max-sessions", type=_count, default=100, metavar="N", help="of a key (default: 100)")
    parser.add_argument(
        "--max-session-tokens", type=_count, default=10_000_000, metavar="N", help="of a session (default: 10000000)"
    )
    parser.add_argument(
        "--max-body", type=size, default=64 << 20, metavar="BYTES", help="of a text that is sent (default: 64M)"
    )
    parser.add_argument("--max-batch", type=_count, default=16, metavar="N", help="texts in one call (default: 16)")
    parser.add_argument(
        "--rate", type=_count, default=600, metavar="N", help="requests a minute of a key (default: 600)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the matrix products (default: float32)",
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: a GPU if there is one)"
    )
    parser.add_argument("--threads", type=_count, metavar="N", help="CPU threads (default: as many as cores)")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code.

    Raises UserError, before a model is loaded, for keys that are none, for a host that others can reach without keys,
    for a port in use, and if the packages of the service are not installed. Raises it, too, for a model
    that is unfit for use, and a folder of sessions that another process has.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(f'Serving needs {error.name}; install it with: pip install "ttt-e2e[serve]"') from error
    from ttt_e2e.server.keys import check_host, load_keys

    keys = load_keys(arguments.keys, os.environ)
    check_host(arguments.host, keys)
    listener = _listener(arguments.host, arguments.port)
    with listener:
        import asyncio

        import torch

        from ttt_e2e.inference.session import DTYPES, load_reader, shipped_model
        from ttt_e2e.server import logs
        from ttt_e2e.server.app import Settings, create_app
        from ttt_e2e.server.chat import load_chat
        from ttt_e2e.server.engine import Engine
        from ttt_e2e.server.limits import Limits
        from ttt_e2e.server.store import Store
        from ttt_e2e.training.parallelize import choose_device

        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        logs.configure()
        store = Store(arguments.data)
        folder = shipped_model() if arguments.model is None else arguments.model
        model, tokenizer = load_reader(folder, choose_device(arguments.device))
        engine = Engine(
            model,
            tokenizer,
            store,
            dtype=DTYPES[arguments.dtype],
            max_batch=arguments.max_batch,
            memory_bytes=arguments.memory,
            max_sessions=arguments.max_sessions,
            max_session_tokens=arguments.max_session_tokens,
        )
        settings = Settings(
            model="ttt-e2e" if arguments.model is None else folder.resolve().name,
            keys=keys,
            limits=Limits(arguments.max_body, file=min(engine.file_bytes, _FILE), rate=arguments.rate),
            chat=load_chat(folder, tokenizer, arguments.chat_template),
        )
        app = create_app(engine, settings)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=15,  # longer than the engine lets things go on
        )
        # After the end uvicorn raises the signal that brought it about once more, for whoever waits for it.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"Serving {settings.model} at http://{shown}:{port}, sessions in {arguments.data}.", file=sys.stderr)

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                # What does not end in time fails with a sentence, before uvicorn would cut it off without one.
                stopping = asyncio.create_task(engine.stop())
                await super().shutdown(sockets)
                await stopping

        # Where the engine cannot be started uvicorn ends the process, some versions with an exit and some without.
        with contextlib.suppress(SystemExit):
            Server(config).run(sockets=[listener])
        if hasattr(app.state, "failure"):
            raise app.state.failure
    return 0


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens at this address. Raises UserError if it cannot be had.

    Whoever connects while the model is loading waits for it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"There is no address {host} ({error.strerror}); give another --host.") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"Port {port} of {host} is in use; give another --port.") from error
        raise UserError(f"Cannot serve at {host}, port {port}: {error.strerror}. Give others.") from error
    return listener


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**53):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is no port, a number from 0 to 65535")
    return int(text)
