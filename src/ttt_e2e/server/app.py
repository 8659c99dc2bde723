"""The service as an ASGI application: its addresses, and what stands before all of them."""

import base64
import hashlib
import importlib.resources
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import Depends, FastAPI
from fastapi.responses import HTMLResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from ttt_e2e import __version__
from ttt_e2e.server import errors, openai_api, sessions_api
from ttt_e2e.server.chat import Chat
from ttt_e2e.server.engine import Engine
from ttt_e2e.server.errors import ErrorBody, Refused
from ttt_e2e.server.keys import Keys
from ttt_e2e.server.limits import Gate, Limits
from ttt_e2e.server.logs import RequestLog
from ttt_e2e.server.metrics import CONTENT_TYPE, Metrics


@dataclass(frozen=True)
class Settings:
    """What the service is told. model: the name under which it is served. keys: none means that all callers are one."""

    model: str
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    chat: Chat = field(default_factory=Chat)


class Health(BaseModel):
    """The service answers: the model is loaded and works, and the service is not about to stop."""

    status: str


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The service over `engine`, which it starts and stops; why it could not be started stays in `state.failure`."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
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
        description="OpenAI's API, and sessions: a memory that outlives a request.",
        lifespan=running,
        docs_url=None,  # these two would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses={"default": {"model": ErrorBody, "description": "An error"}},
    )
    metrics = Metrics(engine.numbers)
    page, policy = _page()

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": policy, "referrer-policy": "no-referrer"})

    @app.get("/health", tags=["service"])
    async def health() -> Health:
        """Whether the service is up and ready; 503 where it is not."""
        if not engine.ready:
            raise Refused(503, "The service is about to stop, or its model fails at every step.", "not_ready")
        return Health(status="ok")

    # The gate asks for the key, before the body comes in; this only describes it.
    described = [Depends(HTTPBearer(auto_error=False))] if settings.keys else []

    @app.get("/metrics", tags=["service"], response_class=Response, responses=_METRICS, dependencies=described)
    async def numbers() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    writer = openai_api.Writer(engine, settings, metrics)
    app.include_router(openai_api.routes(writer), dependencies=described)
    app.include_router(sessions_api.routes(engine, writer), dependencies=described)
    errors.install(app)
    app.add_middleware(Gate, keys=settings.keys, limits=settings.limits)
    app.add_middleware(RequestLog, metrics=metrics)  # the last one added is the outermost
    return app


_METRICS: dict[int | str, dict[str, object]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def _page() -> tuple[str, str]:
    """The page at /, and the policy by which a browser runs its own script and style and nothing else."""
    page = (importlib.resources.files("ttt_e2e.server") / "page.html").read_text("utf-8")

    def hashed(tag: str) -> str:
        found = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert found is not None
        return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy
