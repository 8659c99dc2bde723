"""The service as an application for Ray Serve: replicas of the engine, and in front of them one that routes to them.

    serve run ttt_e2e.server.ray:app storage=s3://BUCKET/PREFIX keys=keys.txt replicas=3

A replica is the service that `ttt-e2e serve` runs, over a store that all replicas share. Ray's consistent hashing sends
requests about the same session to the same replica, which has it in memory: by the last digits of its id, which new
sessions take over from the request that makes them, so that a response and those after it stay together. Which replica
gets a request is a matter of speed only: each asks the store before it uses a session.
"""

import asyncio
import json
import os
import re
import secrets
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from click import ClickException
from pydantic import PositiveInt, ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ttt_e2e.convert.named import find_model, is_name
from ttt_e2e.data.text import read_text
from ttt_e2e.errors import UserError
from ttt_e2e.hardware import choose_device
from ttt_e2e.inference.load import load_model, shipped_model
from ttt_e2e.inference.session_file import DTYPES
from ttt_e2e.model.checkpoint import load_config
from ttt_e2e.server.api.streams import EVENT_STREAM, cancel_on_disconnect
from ttt_e2e.server.app import create_app
from ttt_e2e.server.engine.shared_store import SharedStore
from ttt_e2e.server.engine.store import affinity
from ttt_e2e.server.errors import ApiError, anthropic_error, describe, error_response
from ttt_e2e.server.keys import Keys, load_keys
from ttt_e2e.server.middleware.access import AccessMiddleware
from ttt_e2e.server.middleware.logs import RequestLogMiddleware, configure_logging
from ttt_e2e.server.middleware.metrics import ServiceMetrics
from ttt_e2e.server.options import MAX_FILE_BYTES, Options, open_engine
from ttt_e2e.server.settings import Settings

_ROUTER = {"request_router_class": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"}
_LOGGING = {"enable_access_log": False}  # there is a line for every request already, which says more
_MAX_ONGOING = 1000  # requests of a replica: the engine has limits of its own, and lets others wait
_PASSED_ON = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client")
_ABOUT = ("session", "previous_response_id", "conversation")  # fields of a body that name a session
_ID = re.compile("(?:sess-|resp_|conv_)[0-9a-f]{28}([0-9a-f]{4})")
_IN_PATH = re.compile(f"/v1/(?:sessions|responses|conversations)/{_ID.pattern}(?:/|$)")
_LOST = (
    "The replica that worked on this has ended. If this was to change a session, look first whether it did: the change "
    "was saved as a whole or not at all."
)


class RayOptions(Options):
    """The options of the application. storage: a folder that all machines share, or s3://BUCKET/PREFIX.

    keys: file with the API keys, read where the application is built; else they are in TTT_E2E_API_KEYS.
    """

    storage: str
    replicas: PositiveInt = 2
    keys: Path | None = None
    device: str = "auto"
    threads: PositiveInt | None = None


def app(arguments: dict[str, Any]) -> serve.Application:
    """The application with these options, by name; `serve run` and configuration files name this function.

    Raises ClickException for what a user can mend: `serve run` prints that as one sentence, anything else as a trace.
    """
    try:
        return _build(_options(arguments))
    except UserError as error:
        raise ClickException(str(error)) from error


def _options(arguments: dict[str, Any]) -> RayOptions:
    if unknown := arguments.keys() - RayOptions.model_fields.keys():
        raise UserError(f"There is no option {min(unknown)}; there are {', '.join(sorted(RayOptions.model_fields))}.")
    if "storage" not in arguments:
        raise UserError("The replicas share their sessions; give storage=FOLDER, or storage=s3://BUCKET/PREFIX.")
    try:
        options = RayOptions(**arguments)
    except ValidationError as error:
        wrong = error.errors()[0]
        name, reason = wrong["loc"][0], wrong["msg"].removeprefix("Value error, ")
        raise UserError(f"{name}={arguments[str(name)]}: {reason[0].lower()}{reason[1:]}.") from error
    # Replicas may have another working directory.
    if options.model is not None and not is_name(options.model):
        options.model = options.model.absolute()
    if options.chat_template is not None:
        options.chat_template = options.chat_template.absolute()
    if "://" not in options.storage:
        options.storage = str(Path(options.storage).absolute())
    return options


def _build(options: RayOptions) -> serve.Application:
    keys = load_keys(options.keys, os.environ)
    if not keys:
        raise UserError("With Ray, other machines can reach the service, so it needs API keys; give keys=FILE.")
    # Replicas would raise the errors of these as well, but then Ray tries again for minutes.
    SharedStore(options.storage)
    load_config(find_model(options.model) or shipped_model())
    if options.chat_template is not None:
        read_text(options.chat_template)
    deployment: Any = serve.deployment
    replicas = deployment(
        Replica,
        num_replicas=options.replicas,
        max_ongoing_requests=_MAX_ONGOING,
        request_router_config=_ROUTER,
        logging_config=_LOGGING,
    ).bind(options, keys)
    ingress = deployment(
        serve.ingress()(Ingress),
        ray_actor_options={"num_cpus": 0},  # it waits for replicas most of the time
        max_ongoing_requests=_MAX_ONGOING,
        logging_config=_LOGGING,
    )
    return ingress.bind(replicas, options, keys)


class Replica:
    """The service with an engine of its own."""

    async def __init__(self, options: RayOptions, keys: Keys) -> None:  # type: ignore[misc]
        configure_logging()
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        folder = find_model(options.model)
        model, tokenizer = load_model(folder, choose_device(options.device), DTYPES[options.dtype])
        store = SharedStore(options.storage)
        self._engine, settings = open_engine(options, folder, model, tokenizer, store, keys)
        self._app: ASGIApp = create_app(self._engine, settings)
        await self._engine.start()

    async def respond(self, scope: Scope, body: bytes, ending: str) -> AsyncGenerator[Message, None]:
        """The messages of the response to a request. ending: of the ids of sessions that it makes."""
        affinity.set(ending)
        messages: asyncio.Queue[Message | None] = asyncio.Queue(maxsize=16)
        request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return request.pop() if request else await asyncio.Future()

        async def work() -> None:
            await self._app({**scope, "state": {}}, receive, messages.put)
            await messages.put(None)

        working = asyncio.create_task(work())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    def check_health(self) -> None:
        """Raise RuntimeError if Ray should replace this replica."""
        if not self._engine.ready:
            raise RuntimeError("The model fails at every step.")

    async def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            await self._engine.stop()


class Ingress:
    """Admits requests, by keys and limits, and passes each on to the replica of its session."""

    def __init__(self, replicas: DeploymentHandle, options: RayOptions, keys: Keys) -> None:
        configure_logging()
        self._replicas = replicas.options(stream=True)
        self._settings = Settings(
            options.model_name,
            keys,
            body_bytes=options.max_body,
            file_bytes=MAX_FILE_BYTES,
            requests_per_minute=options.rate,
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application that Ray calls with requests."""
        metrics = ServiceMetrics(dict)  # nobody reads them; each replica has its own
        return RequestLogMiddleware(AccessMiddleware(self._forward, self._settings), metrics)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": f"{message['type']}.complete"})
            return
        if scope["path"] == "/metrics":
            error = ApiError(404, "The metrics of replicas are not collected here; Ray exports its own.", "no_metrics")
            await error_response(error, scope["path"])(scope, receive, send)
            return
        parts, more = list[bytes](), True
        while more:
            if (message := await receive())["type"] == "http.disconnect":
                raise ClientDisconnect
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        scope["state"]["log_entry"].silent = True  # the replica writes the line
        await cancel_on_disconnect(receive, self._respond(scope, b"".join(parts), send))

    async def _respond(self, scope: Scope, body: bytes, send: Send) -> None:
        ending = _ending(scope["path"], body)
        passed_on = {name: scope[name] for name in _PASSED_ON if name in scope}
        messages: Any = self._replicas.options(session_id=ending).respond.remote(passed_on, body, ending)
        start: Message | None = None
        try:
            async for message in messages:
                start = message if message["type"] == "http.response.start" else start
                await send(message)
        except (RayError, RayServeException) as cause:
            error = ApiError(503, _LOST, "replica_lost", headers={"retry-after": "1"})
            if start is None:
                await error_response(error, scope["path"])(scope, _nothing, send)
            elif EVENT_STREAM in Headers(raw=start["headers"]).get("content-type", ""):
                await send({"type": "http.response.body", "body": _error_event(scope["path"], error)})
            else:
                raise ConnectionError("A replica ended in the middle of a response.") from cause
        finally:
            messages.cancel()


def _ending(path: str, body: bytes) -> str:
    """The last digits of the session's id that a request is about, or of those that it will make."""
    if (found := _IN_PATH.match(path)) is not None:
        return found[1]
    with suppress(ValueError, RecursionError):
        values = json.loads(body) if body[:1] == b"{" else {}
        for value in (values.get(name) for name in _ABOUT):
            id = value.get("id") if isinstance(value, dict) else value
            if isinstance(id, str) and (found := _ID.fullmatch(id)) is not None:
                return found[1]
    return secrets.token_hex(2)


def _error_event(path: str, error: ApiError) -> bytes:
    """The last event of a stream that a replica did not finish, in the form of the API at `path`."""
    detail = describe(error)[1]
    if path.startswith("/v1/messages"):
        value, name = anthropic_error(error), "event: error\n"
    elif path.startswith("/v1/responses"):
        value, name = {**detail.error.model_dump(), "type": "error", "sequence_number": 0}, "event: error\n"
    else:
        value, name = detail.model_dump(), ""
    return f"{name}data: {json.dumps(value)}\n\n".encode()


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
