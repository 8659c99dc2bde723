"""The service as an ASGI application: endpoints, middleware and error handlers."""

import base64
import hashlib
import importlib.resources
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ttt_e2e import __version__
from ttt_e2e.errors import UserError
from ttt_e2e.server.api import conversations, messages, openai, responses, sessions
from ttt_e2e.server.api.generations import Generations
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.errors import ApiError, ErrorBody, error_response, is_expected
from ttt_e2e.server.keys import OPERATOR
from ttt_e2e.server.middleware.access import AccessMiddleware
from ttt_e2e.server.middleware.logs import RequestLogMiddleware, log_entry
from ttt_e2e.server.middleware.metrics import ServiceMetrics
from ttt_e2e.server.settings import Settings


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The service over `engine`, which it starts and stops. If starting fails, the error is in `app.state.failure`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await engine.start()
        except Exception as error:
            app.state.failure = error
            raise
        try:
            yield
        finally:
            await engine.stop()

    app = FastAPI(
        title="ttt-e2e",
        version=__version__,
        description="OpenAI's and Anthropic's APIs, and sessions: a memory that lasts across requests.",
        lifespan=lifespan,
        docs_url=None,  # these two would load scripts from other sites
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=dict.fromkeys((HTTPException, RequestValidationError, UserError), _handle),
        responses={"default": {"model": ErrorBody, "description": "An error"}},
    )
    metrics, text = ServiceMetrics(engine.stats), {"content": {"text/plain": {"schema": {"type": "string"}}}}
    page, policy = _load_page()

    @app.api_route(
        "/", methods=["GET", "HEAD"], include_in_schema=False
    )  # HEAD: clients look whether there is a server
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": policy, "referrer-policy": "no-referrer"})

    @app.get("/health", tags=["service"])
    async def health() -> dict[Literal["status"], Literal["ok"]]:
        """Whether the model is loaded and works, and the service is not stopping; 503 if not."""
        if not engine.ready:
            raise ApiError(503, "The service is stopping, or its model fails at every step.", "not_ready")
        return {"status": "ok"}

    # `AccessMiddleware` checks the key before the body is received; this only documents it.
    schemes = (HTTPBearer(auto_error=False), APIKeyHeader(name="X-Api-Key", auto_error=False))
    key_in_schema = [Depends(scheme) for scheme in schemes] if settings.keys else []

    @app.get("/metrics", tags=["service"], response_class=Response, responses={200: text}, dependencies=key_in_schema)
    async def get_metrics(request: Request) -> Response:
        """Metrics for Prometheus; where there are keys, for the one named operator."""
        if settings.keys and request.state.caller.name != OPERATOR:
            raise ApiError(403, f"Only the key that is named {OPERATOR} may read the metrics.", "not_the_operator")
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    generations = Generations(engine, settings, metrics)
    for router in (
        openai.routes(generations),
        responses.routes(generations),
        conversations.routes(engine),
        messages.routes(generations),
        sessions.routes(engine),
    ):
        app.include_router(router, dependencies=key_in_schema)
    app.add_middleware(AccessMiddleware, settings=settings)
    app.add_middleware(RequestLogMiddleware, metrics=metrics)  # the last one added is the outermost
    return app


async def _handle(request: Request, error: Exception) -> JSONResponse:
    """Answer an error in the API's form; unexpected ones are left to `RequestLogMiddleware`."""
    if not is_expected(error):
        log_entry(request).set_error(error)
    response = error_response(error, request.url.path)
    if response.status_code == 405 and "route" in request.scope:
        # Starlette only names the methods of the first route with this path.
        page = {"get": None, "head": None}  # it is not in the schema
        methods = request.app.openapi()["paths"].get(request.scope["route"].path, page)
        response.headers["allow"] = ", ".join(sorted(methods)).upper()
    return response


def _load_page() -> tuple[str, str]:
    """The page at /, and a Content-Security-Policy under which a browser runs its own script and style only."""
    folder = importlib.resources.files("ttt_e2e.server") / "page"
    page, hashes = (folder / "page.html").read_text("utf-8"), {}
    for tag, file in (("style", "page.css"), ("script", "page.js")):
        text = "\n" + (folder / file).read_text("utf-8")
        page = page.replace(f"<{tag}></{tag}>", f"<{tag}>{text}</{tag}>")
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy
