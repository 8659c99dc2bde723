"""Errors of the service, always in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Diverged
from ttt_e2e.server.records import NoSession, Stopping, TooMuch

UNEXPECTED = "Something went wrong in the server; its log says what, under this answer's request id."
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_PLAIN = {
    400: "The body cannot be read; send sound JSON.",
    404: "There is nothing at this address; /openapi.json says what there is.",
    405: "This address does not take this method; /openapi.json says which it takes.",
}
_NAME = 100  # characters of a name in a message, which a client may have made as long as it likes


class ErrorDetail(BaseModel):
    """What was wrong. message: one sentence. param: the field that it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error, and of an error event in a stream."""

    error: ErrorDetail


class Refused(HTTPException):
    """A request that is not served: with this status, for the reason that the sentence `message` gives."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code = code
        self.param = param


def described(error: Exception) -> tuple[int, ErrorBody]:
    """The status and the body that tell a client of `error`; of an unexpected one, nothing but that there was one."""
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, Refused):
        return _body(error.status_code, error.detail, error.code, error.param)
    if isinstance(error, HTTPException):
        return _body(error.status_code, _PLAIN.get(error.status_code, error.detail))
    if isinstance(error, NoSession):
        return _body(404, str(error), "session_not_found", "session")
    if isinstance(error, TooMuch):
        return _body(400, str(error), "limit_reached")
    if isinstance(error, Stopping):
        return _body(503, str(error), "stopping")
    if isinstance(error, Diverged):
        return _body(422, str(error), "diverged")
    if isinstance(error, UserError) and isinstance(error.__cause__, OSError):
        # A full disk is nothing that a client can mend, and the sentence names folders of the server.
        return _body(503, "The server cannot use its disk; nothing has changed. Ask whoever runs it.", "disk")
    if isinstance(error, UserError):
        return _body(400, str(error))
    return _body(500, UNEXPECTED, "unexpected")


def is_expected(error: Exception) -> bool:
    """Whether it is nothing that whoever runs the service should look into."""
    return described(error)[0] < 500 or isinstance(error, Stopping)


def install(app: FastAPI) -> None:
    """Let `app` answer every error that a request may bring about; unexpected ones go on to `logs.RequestLog`."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        if not is_expected(error):
            request.state.entry.failed(error)
        answer = response(error)
        if answer.status_code == 405 and "route" in request.scope:
            # The router names the methods of the first route at this address only.
            methods = app.openapi()["paths"].get(request.scope["route"].path, {"get": None})
            answer.headers["allow"] = ", ".join(sorted(methods)).upper()
        return answer

    for kind in (HTTPException, RequestValidationError, UserError):
        app.add_exception_handler(kind, handle)


def response(error: Exception) -> JSONResponse:
    """The answer that tells a client of `error`."""
    status, body = described(error)
    headers = error.headers if isinstance(error, HTTPException) else None
    return JSONResponse(body.model_dump(), status, headers)


def _body(status: int, message: str, code: str | None = None, param: str | None = None) -> tuple[int, ErrorBody]:
    message = message.encode("utf-8", "replace").decode()  # it may quote half of a surrogate pair
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def _invalid(error: RequestValidationError) -> tuple[int, ErrorBody]:
    """A body, or a parameter, that is not as the description says."""
    problems = error.errors()
    where = problems[0]["loc"]
    if problems[0]["type"] == "json_invalid":
        return _body(400, f"The body is no JSON: {problems[0]['ctx']['error']}.", "invalid_json")
    if problems[0]["type"] == "value_error" and where == ("body",):  # fields that contradict each other
        return _body(400, str(problems[0]["ctx"]["error"]), "invalid_value")
    if where == ("body",):
        return _body(400, "The body must be a JSON object, sent with Content-Type: application/json.", "invalid_body")
    # A value that fits none of several kinds has a problem for each of them.
    field = where[:2]
    reasons = dict.fromkeys(p["msg"].removeprefix("Value error, ") for p in problems if p["loc"][:2] == field)
    name = ".".join(map(str, where[1:] if len(reasons) == 1 else field[1:]))[:_NAME]
    message = f"{name}: {', or: '.join(reasons)}"
    return _body(400, message if message.endswith(".") else f"{message}.", "invalid_value", str(field[-1])[:_NAME])
