"""Bodies that are too large for memory: they go to temporary files, which are gone when nobody needs them any more."""

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import IO

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from ttt_e2e.data.text import text_pieces
from ttt_e2e.errors import UserError
from ttt_e2e.server.errors import Refused

_FORM = "multipart/form-data"


async def text_body(request: Request) -> IO[bytes]:
    """The text that a request brings, in a nameless temporary file, checked from end to end to be UTF-8.

    It is the body itself as text/plain, or the one file of a multipart/form-data body. Raises Refused for other types,
    and UserError for what is no text.
    """
    header = request.headers.get("content-type", "")
    kind = header.partition(";")[0].strip().lower()
    if kind == _FORM:
        file = await _file_of_form(request)
    elif kind == "text/plain":
        if _charset(header) not in ("utf-8", "utf8", "us-ascii"):
            raise Refused(415, "The text must be UTF-8; convert it, or say so in Content-Type.", "wrong_charset")
        file = _nameless()
        await _save_body(request, file)
    else:
        raise Refused(
            415, f"The text must come with Content-Type: text/plain, or as a file in {_FORM}.", "wrong_content_type"
        )
    await asyncio.to_thread(_check_text, file)
    return file


async def save_body(request: Request, target: Path) -> None:
    """Write a request's body to the file `target`."""
    with _disk():
        file = target.open("wb", buffering=0)
    with file:
        await _save_body(request, file)


async def _save_body(request: Request, file: IO[bytes]) -> None:
    async for chunk in request.stream():
        await asyncio.to_thread(_write, file, chunk)


def _write(file: IO[bytes], chunk: bytes) -> None:
    """Write all of it: a raw file may take less where the disk is nearly full."""
    with _disk():
        while chunk:
            chunk = chunk[file.write(chunk) :]


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"A body could not be kept while it came in: {error.strerror}.") from error


def _charset(header: str) -> str:
    kind = Message()
    try:
        kind["content-type"] = header
        return str(kind.get_param("charset", "utf-8")).lower()
    except Exception:  # the parser trips over some headers that are none
        return ""


async def _file_of_form(request: Request) -> IO[bytes]:
    wrong = Refused(400, f"There must be one file, and nothing else, in a sound {_FORM}.", "no_file", "file")
    try:
        with _disk():  # the parser keeps the file, too
            async with request.form(max_files=1, max_fields=0) as form:
                parts = [part for _, part in form.multi_items()]
                if len(parts) != 1 or not isinstance(parts[0], UploadFile):
                    raise wrong
                file = _nameless()
                while chunk := await parts[0].read(1 << 20):
                    await asyncio.to_thread(_write, file, chunk)
    except Refused:
        raise  # also the gate's, for a body that is too large
    except (HTTPException, ValueError) as error:  # the parser's; ValueError for some charsets
        raise wrong from error
    return file


def _nameless() -> IO[bytes]:
    """A temporary file that nothing can leave behind. Errors about its content call it the text."""
    with _disk():
        file = tempfile.TemporaryFile(prefix="ttt-e2e-", buffering=0)  # noqa: SIM115 - closed when it is forgotten
    file.name = "The text"
    return file


def _check_text(file: IO[bytes]) -> None:
    file.seek(0)
    for _ in text_pieces(file):
        pass
    file.seek(0)
