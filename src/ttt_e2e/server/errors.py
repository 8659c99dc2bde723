"""Errors of the service, in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.

At /v1/messages they have Anthropic's form: `{"type": "error", "error": {"type", "message"}}`.
"""

import sqlite3
from collections.abc import Sequence
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ttt_e2e.errors import UserError
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.server.engine.records import (
    DamagedSessionError,
    LimitReachedError,
    NoNotebookError,
    PromptTooLongError,
    SessionNotFoundError,
    StoppingError,
    TakenOverError,
)
from ttt_e2e.server.engine.storage import StorageError

_INTERNAL_ERROR = "The server failed unexpectedly; its log has the error under this response's x-request-id."
_STORAGE_ERROR = (
    "The server cannot reach its storage; tell its operator, and try again later. If this was to change a session, "
    "look first whether it did: the change was saved as a whole or not at all."
)
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {404: "not_found_error", 413: "request_too_large", **_TYPES}
_HTTP_MESSAGES = {
    400: "The body cannot be parsed; send valid JSON.",
    404: "There is nothing at this path; /openapi.json lists all paths.",
    405: "This path does not support this method; /openapi.json lists those that it supports.",
}
_ENDPOINTS = ("/chat/completions", "/completions", "/responses", "/messages", "/models")  # in /v1
_ENGINE_ERRORS: tuple[tuple[type[UserError], int, str, str | None], ...] = (  # with status, code and param
    (SessionNotFoundError, 404, "session_not_found", "session"),
    (NoNotebookError, 400, "no_notebook", "session"),
    (DamagedSessionError, 500, "session_damaged", "session"),
    (LimitReachedError, 400, "limit_reached", None),
    (PromptTooLongError, 400, "prompt_too_long", "echo"),
    (TakenOverError, 409, "taken_over", "session"),
    (StoppingError, 503, "stopping", None),
    (Diverged, 422, "diverged", None),
)
_RESTART_SECONDS = 10  # until a client should try again: a service that stops is usually started again
_MAX_NAME = 100  # characters of a field's name in a message; clients choose these names


class ErrorDetail(BaseModel):
    """message: what is wrong, in a sentence. param: the field that it concerns."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of an error response, and of an error event in a stream."""

    error: ErrorDetail


class AnthropicErrorCode(BaseModel):
    """error_code: as the `code` of errors in OpenAI's form."""

    error_code: str | None


class AnthropicErrorDetail(BaseModel):
    """message: what is wrong, in a sentence that begins with the field that it concerns, if it is about one."""

    type: str
    message: str
    details: AnthropicErrorCode


class AnthropicErrorBody(BaseModel):
    """The body of an error response of /v1/messages, and of an error event in its stream."""

    type: Literal["error"]
    error: AnthropicErrorDetail


class ApiError(HTTPException):
    """An error response with this status; `message` is a sentence for the client."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.code, self.param = code, param


def describe(error: Exception) -> tuple[int, ErrorBody]:
    """The status and body that tell a client of `error`; nothing is disclosed about unexpected errors."""
    if isinstance(error, RequestValidationError):
        return _invalid_request(error)
    if isinstance(error, ApiError):
        return _body(error.status_code, error.detail, error.code, error.param)
    if isinstance(error, HTTPException):
        return _body(error.status_code, _HTTP_MESSAGES.get(error.status_code, error.detail))
    for kind, status, code, param in _ENGINE_ERRORS:
        if isinstance(error, kind):
            return _body(status, str(error), code, param)
    if isinstance(error, StorageError):
        return _body(503, _STORAGE_ERROR, "storage")
    if isinstance(error, UserError) and isinstance(error.__cause__, OSError | sqlite3.Error):
        # Clients cannot do anything about a full disk, and the message names folders of the server.
        return _body(503, "The server cannot use its disk; nothing has changed. Tell its operator.", "disk")
    if isinstance(error, UserError):
        return _body(400, str(error))
    return _body(500, _INTERNAL_ERROR, "unexpected")


def is_expected(error: Exception) -> bool:
    """Whether the operator of the service need not look into `error`."""
    return describe(error)[0] < 500 or isinstance(error, StoppingError)


def error_response(error: Exception, path: str) -> JSONResponse:
    """The response that tells a client of `error`, in the form of the API at `path`."""
    status, body = describe(error)
    meant = next((end for end in _ENDPOINTS if path.rstrip("/").endswith(end)), None)
    if status == 404 and meant and type(error) is HTTPException:  # most often the client's base URL is wrong
        body.error.message = f"There is nothing at this path, but at /v1{meant}; correct the client's base URL or path."
    headers = error.headers if isinstance(error, HTTPException) else None
    if isinstance(error, StoppingError):
        headers = {"retry-after": str(_RESTART_SECONDS)}
    anthropic = path.startswith("/v1/messages")
    return JSONResponse(anthropic_error(error) if anthropic else body.model_dump(), status, headers)


def anthropic_error(error: Exception) -> dict[str, Any]:
    """The body that tells a client of Anthropic's API of `error`."""
    status, body = describe(error)
    message, param = body.error.message, body.error.param
    if param and not message.startswith(param):
        message = f"{param}: {message}"
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    detail = AnthropicErrorDetail(type=kind, message=message, details=AnthropicErrorCode(error_code=body.error.code))
    return AnthropicErrorBody(type="error", error=detail).model_dump()


def _body(status: int, message: str, code: str | None = None, param: str | None = None) -> tuple[int, ErrorBody]:
    message = message.encode("utf-8", "replace").decode()  # it may quote half of a surrogate pair
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def _invalid_request(error: RequestValidationError) -> tuple[int, ErrorBody]:
    problems = error.errors()
    where = problems[0]["loc"]
    if problems[0]["type"] == "json_invalid":
        return _body(400, f"The body is not valid JSON: {problems[0]['ctx']['error']}.", "invalid_json")
    if problems[0]["type"] == "contradiction":
        return _body(400, problems[0]["msg"], "invalid_value", problems[0]["ctx"]["param"])
    if where == ("body",):
        return _body(400, "The body must be a JSON object, sent with Content-Type: application/json.", "invalid_body")
    # A value that matches none of several types has a problem for each of them. The one found deepest in the value is
    # about the type that the client meant: a part of a list, and not that a list is no text.
    problems = [
        problem | {"path": _path(problem["loc"], error.body, problem["type"] == "missing")} for problem in problems
    ]
    first = problems[0]["path"]
    about_first = [problem for problem in problems if problem["path"][: len(first)] == first]
    path = max((problem["path"] for problem in about_first), key=len)
    about_path = [problem for problem in about_first if problem["path"] == path]
    reasons = dict.fromkeys(problem["msg"].removeprefix("Value error, ") for problem in about_path)
    message = f"{'.'.join(map(str, path))[:_MAX_NAME]}: {', or: '.join(reasons)}"
    given = about_path[0]["input"]
    if isinstance(given, str) and all(problem["type"] == "literal_error" for problem in about_path):
        message += f", not {given[:_MAX_NAME]!r}"  # such as the kind of a tool: which one a client has to switch off
    param = str(path[0])[:_MAX_NAME]
    return _body(400, message if message.endswith(".") else f"{message}.", "invalid_value", param)


def _path(location: Sequence[int | str], body: Any, missing: bool) -> list[int | str]:
    """Where a problem is: in the body, without the names of types that pydantic puts between, or in path or query."""
    if location[0] != "body":
        return list(location[1:])
    path: list[int | str] = []
    for step in location[1:]:
        if isinstance(body, dict) and (step in body or missing):
            body = body.get(step)
        elif isinstance(body, list) and isinstance(step, int):
            body = body[step]
        else:
            continue
        path.append(step)
    return path
