"""The server: sessions as tools and resources of the Model Context Protocol, by its official library.

Tools run in threads. Calls that change the same session wait for each other, in order. A client that cancels a call, or
leaves, ends the work at the next mini-batch or token, and nothing has changed.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import getdoc
from typing import Annotated, Any
from urllib.parse import quote

import anyio
from anyio import from_thread, to_thread
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ResourceNotFoundError, ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.server.transport_security import TransportSecuritySettings
from mcp.types import Resource, ToolAnnotations
from pydantic import Field, ValidationError
from starlette.applications import Starlette

from ttt_e2e import __version__
from ttt_e2e.data.text import text_chunks
from ttt_e2e.errors import UserError
from ttt_e2e.mcp_server.allowed_files import AllowedFiles
from ttt_e2e.mcp_server.sessions import ReadingResult, SessionFolder, SessionSummary
from ttt_e2e.retrieval.generate import DEFAULT_PASSAGES, MAX_PASSAGES, MAX_QUERY
from ttt_e2e.retrieval.passages import Passage
from ttt_e2e.server.engine.records import StoppingError

_INSTRUCTIONS = """A language model that learns from what it reads. A session is its memory of texts: `read` adds a
text, `ask` generates from what was learned and from exact passages of what was read, `recall` finds such passages,
`fork` copies a session and `forget` removes it. Sessions have names and outlive this connection. What the model writes
may be wrong; check it against the sources of the answer."""
_LIST = "ttt-e2e://sessions"
_JSON = "application/json"
_PROGRESS_SECONDS = 0.5  # between two notifications
_MAX_BODY_BYTES = 64 << 20  # of an HTTP request: the same as of the service
_SessionName = Annotated[str, Field(description="Name of the session.")]


@dataclass(frozen=True)
class FoundPassage:
    """A passage of what a session has read: characters `start` to `stop` of the text with the name `document`.

    Texts without a name (null) follow each other as one. score: how well the passage matches the query.
    """

    text: str
    document: str | None
    start: int
    stop: int
    score: float


@dataclass(frozen=True)
class Answer:
    """What the model has generated.

    sources: passages of the session's notebook that the model was shown, the best first, whether or not the text agrees
    with them; null if the notebook was not searched.
    """

    text: str
    sources: list[FoundPassage] | None


class SessionServer(MCPServer[Any]):
    """The server of `sessions`, which may read `files` besides texts that clients send."""

    def __init__(self, sessions: SessionFolder, files: AllowedFiles) -> None:
        self._sessions, self._files, self._stopping = sessions, files, False
        self._locks: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        question = (
            "Ask the model a question about what the session has read."
            if sessions.chat
            else "Let the model continue a text, with what it has learned from what the session has read. It does not "
            "answer questions: give the beginning of a text."
        )
        adds = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)
        uses = ToolAnnotations(read_only_hint=True, open_world_hint=False)
        removes = ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=False)
        tools = [
            _tool("read", self._read, adds),
            _tool("ask", self._ask, uses, f"{question} The answer names its sources. The session does not change."),
            _tool("recall", self._recall, uses),
            _tool("fork", self._fork, adds),
            _tool("forget", self._forget, removes),
        ]
        self._arguments = {tool.name: set(tool.parameters["properties"]) for tool in tools}
        super().__init__("ttt-e2e", version=__version__, instructions=_INSTRUCTIONS, tools=tools, log_level="WARNING")
        self.resource(_LIST, name="sessions", description="All sessions, sorted by name.", mime_type=_JSON)(self._list)
        self.resource(f"{_LIST}/{{name}}", name="session", description="What is known of a session.", mime_type=_JSON)(
            self._describe
        )

    def http_app(self, host: str) -> Starlette:
        """The server at /mcp as an ASGI application; requests must name `host` or this machine as theirs.

        Otherwise a page in a browser could reach the server by a name of its own that leads to this machine.
        """
        names = dict.fromkeys((f"[{host}]" if ":" in host else host, "127.0.0.1", "localhost", "[::1]"))
        hosts = [f"{name}{port}" for name in names for port in ("", ":*")]
        security = TransportSecuritySettings(
            enable_dns_rebinding_protection=True,
            allowed_hosts=hosts,
            allowed_origins=[f"http://{name}" for name in hosts],
        )
        return self.streamable_http_app(transport_security=security, max_request_body_size=_MAX_BODY_BYTES)

    def stop(self) -> None:
        """Let the calls that are running end with an error at the next mini-batch or token, and change nothing."""
        self._stopping = True

    def _progress(self, context: Context, total: int) -> Callable[[int], None]:
        """What the worker thread of a call reports to: it tells the client, and ends work that is not wanted any more.

        It is called with how much of the total is done.
        """
        sent, sent_at = 0, -math.inf

        def report(done: int) -> None:
            nonlocal sent, sent_at
            from_thread.check_cancelled()
            if self._stopping:
                raise StoppingError
            now = time.monotonic()
            if done > sent and (now - sent_at >= _PROGRESS_SECONDS or done == total):
                from_thread.run(context.report_progress, done, total)
                sent, sent_at = done, now

        return report

    # -- tools ---------------------------------------------------------------------------------------------------------

    async def _read(
        self,
        context: Context,
        text: Annotated[str, Field(description="The text to read.")] = "",
        path: Annotated[str, Field(description="In place of a text: a file that this server may read.")] = "",
        name: Annotated[
            str, Field(description="Name of the text, which `recall` gives; default: that of the file.")
        ] = "",
        session: _SessionName = "default",
    ) -> ReadingResult:
        """Read a text of any length and learn from it: all of it or, if anything fails, nothing.

        The session is made if there is none of this name; otherwise the text is read after what it has read before.
        Give either `text` or `path`. A `text` with the `name` of the one before it continues that one.
        """
        if bool(text) == bool(path):
            raise UserError("Give either a text or the path of a file.")

        def work() -> ReadingResult:
            file = self._files.find(path) if path else None
            # A file is checked from end to end before anything is read.
            total = sum(map(_size, text_chunks(file) if file else [text]))
            report, chunks = self._progress(context, total), text_chunks(file) if file else [text]
            document = name or (file.name if file else "")
            return self._sessions.read(session, chunks, report, document=document, continues=file is None)

        async with self._locks[session]:
            return await to_thread.run_sync(work)

    async def _ask(
        self,
        context: Context,
        prompt: Annotated[str, Field(description="A question, or the beginning of a text.")],
        session: _SessionName = "default",
        passages: Annotated[
            int,
            Field(
                ge=0,
                le=MAX_PASSAGES,
                description="Show the model at most so many passages of the session's notebook that match the prompt, "
                "if the session keeps one; 0: none, so that it answers from what it has learned alone.",
            ),
        ] = DEFAULT_PASSAGES,
        max_tokens: Annotated[int, Field(ge=1, description="Generate at most so many tokens.")] = 200,
        temperature: Annotated[float, Field(ge=0, description="0 always takes the likeliest token.")] = 0.8,
    ) -> Answer:
        def work() -> Answer:
            report, texts = self._progress(context, max_tokens), []
            chunks, found = self._sessions.ask(
                session, prompt, passages=passages, max_tokens=max_tokens, temperature=temperature
            )
            for text in chunks:
                texts.append(text)
                report(len(texts))
            return Answer("".join(texts), None if found is None else [_for_client(one) for one in found])

        return await to_thread.run_sync(work)

    async def _recall(
        self,
        query: Annotated[str, Field(max_length=MAX_QUERY, description="Words to search for.")],
        session: _SessionName = "default",
        count: Annotated[
            int, Field(ge=1, le=MAX_PASSAGES, description="Find at most so many passages.")
        ] = DEFAULT_PASSAGES,
    ) -> list[FoundPassage]:
        """Find exact passages of what a session has read that share words with a query, the best first."""
        found = await to_thread.run_sync(self._sessions.recall, session, query, count)
        return [_for_client(one) for one in found]

    async def _fork(
        self,
        new_session: Annotated[str, Field(description="Name of the copy.")],
        session: _SessionName = "default",
    ) -> SessionSummary:
        """Copy a session with all that it has read to a new name. The two are independent from then on."""
        first, second = sorted((session, new_session))  # in one order, so that two forks never wait for each other
        async with self._locks[first], self._locks[second] if second != first else nullcontext():
            return await to_thread.run_sync(self._sessions.fork, session, new_session)

    async def _forget(self, session: Annotated[str, Field(description="Name of the session.")]) -> str:
        """Remove a session and all that it has read, for good."""
        async with self._locks[session]:
            await to_thread.run_sync(self._sessions.forget, session)
        return f"The session {session!r} is forgotten."

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Context | None = None) -> Any:
        """Call a tool. An error becomes one sentence; what is unexpected is in the log with its traceback."""
        unknown = arguments.keys() - self._arguments.get(name, arguments.keys())
        if unknown:
            known = ", ".join(sorted(self._arguments[name]))
            raise ToolError(f"{name} has no argument {min(unknown)[:100]!r}; it has: {known}.")
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            cause = error.__cause__
            if isinstance(cause, UserError):
                raise ToolError(_printable(str(cause))) from cause
            if isinstance(cause, ValidationError):
                problem = cause.errors()[0]
                where = ".".join(map(str, problem["loc"]))
                raise ToolError(_printable(f"{name}: {where}: {problem['msg']}.")) from cause
            raise

    # -- resources -----------------------------------------------------------------------------------------------------

    async def list_resources(self) -> list[Resource]:
        """The list of sessions, and every session."""
        found = await to_thread.run_sync(self._sessions.summaries)
        sessions = [
            Resource(
                uri=f"{_LIST}/{quote(one.name)}",
                name=one.name,
                description=one.error or f"A session that has read {one.tokens:,} tokens.",
                mime_type=_JSON,
            )
            for one in found
        ]
        return [*await super().list_resources(), *sessions]

    def _list(self) -> list[SessionSummary]:
        return self._sessions.summaries()

    def _describe(self, name: str) -> SessionSummary:
        try:
            return self._sessions.summary(name)
        except UserError as error:
            raise ResourceNotFoundError(_printable(str(error))) from error


def _tool(name: str, function: Callable[..., Any], hints: ToolAnnotations, description: str | None = None) -> Tool:
    """A tool; its description is by default that of the function."""
    tool = Tool.from_function(function, name, description=description or getdoc(function), annotations=hints)
    tool.parameters["additionalProperties"] = False  # otherwise a misspelt argument would be left out in silence
    return tool


def _for_client(one: Passage) -> FoundPassage:
    return FoundPassage(one.text, one.document or None, *one.place_in_document, one.score)


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _printable(sentence: str) -> str:
    """A sentence in one line of valid Unicode: it may quote half of a surrogate pair."""
    return " ".join(sentence.encode("utf-8", "replace").decode().split())
