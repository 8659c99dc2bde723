"""Request bodies that are too large for memory: they go to temporary files."""

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

from ttt_e2e.data.text import text_chunks
from ttt_e2e.errors import UserError
from ttt_e2e.server.errors import ApiError

_FORM = "multipart/form-data"


async def receive_text(request: Request) -> IO[bytes]:
    """The text in a request, in an unnamed temporary file: the body, or the only file in a multipart/form-data body.

    Raises ApiError for other content types, and UserError unless all of it is valid UTF-8.
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == _FORM:
        file = await _receive_form_file(request)
    elif media_type == "text/plain":
        if _charset(content_type) not in ("utf-8", "utf8", "us-ascii"):
            raise ApiError(415, "The text must be UTF-8; convert it, or correct the Content-Type.", "wrong_charset")
        file = _unnamed_file()
        await _receive(request, file)
    else:
        message = f"Send the text with Content-Type: text/plain, or as a file in {_FORM}."
        raise ApiError(415, message, "wrong_content_type")
    await asyncio.to_thread(_check_text, file)
    return file


async def receive_file(request: Request, target: Path) -> None:
    """Write the body of a request to the file `target`."""
    with _disk_errors(), target.open("wb", buffering=0) as file:
        await _receive(request, file)


async def _receive(request: Request, file: IO[bytes]) -> None:
    async for chunk in request.stream():
        await asyncio.to_thread(_write, file, chunk)


def _write(file: IO[bytes], chunk: bytes) -> None:
    """Write the whole chunk: an unbuffered file may write less at a time when the disk is nearly full."""
    with _disk_errors():
        while chunk:
            chunk = chunk[file.write(chunk) :]


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"The body could not be stored: {error.strerror}.") from error


def _charset(content_type: str) -> str:
    header = Message()
    try:
        header["content-type"] = content_type
        return str(header.get_param("charset", "utf-8")).lower()
    except Exception:  # the parser fails on some invalid headers
        return ""


async def _receive_form_file(request: Request) -> IO[bytes]:
    invalid = ApiError(400, f"Send exactly one file, and no other fields, as {_FORM}.", "no_file", "file")
    try:
        with _disk_errors():  # the parser writes to disk as well
            async with request.form(max_files=1, max_fields=0) as form:
                parts = [part for _, part in form.multi_items()]
                if len(parts) != 1 or not isinstance(parts[0], UploadFile):
                    raise invalid
                file = _unnamed_file()
                while chunk := await parts[0].read(1 << 20):
                    await asyncio.to_thread(_write, file, chunk)
    except ApiError:
        raise  # also that of a body that is too large
    except (HTTPException, ValueError) as error:  # the parser's; ValueError for some charsets
        raise invalid from error
    return file


def _unnamed_file() -> IO[bytes]:
    """A temporary file that cannot be left behind. Errors about its content call it "The text"."""
    with _disk_errors():
        file = tempfile.TemporaryFile(prefix="ttt-e2e-", buffering=0)  # noqa: SIM115 - closed when garbage-collected
    file.name = "The text"
    return file


def _check_text(file: IO[bytes]) -> None:
    file.seek(0)
    for _ in text_chunks(file):
        pass
    file.seek(0)
