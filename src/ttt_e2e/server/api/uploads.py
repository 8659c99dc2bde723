"""Request bodies that are too large for memory: they go to temporary files."""

import asyncio
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
_MAX_CONTENT_TYPE = 1000  # characters; the parsers take quadratic time


@dataclass(frozen=True)
class ReceivedText(Iterable[str]):
    """A text in an unnamed temporary file, in chunks; it can be taken more than once. name: of the file in a form."""

    file: IO[bytes]
    name: str

    def __iter__(self) -> Iterator[str]:
        self.file.seek(0)
        return text_chunks(self.file, compressed=False)


async def receive_text(request: Request) -> ReceivedText:
    """The valid text in a request: the body, or the only file in a form."""
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in (_FORM, "text/plain") or len(content_type) > _MAX_CONTENT_TYPE:
        message = f"Send the text with Content-Type: text/plain, or as a file in {_FORM}."
        raise ApiError(415, message, "wrong_content_type")
    if media_type == "text/plain" and _charset(content_type) not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(415, "The text must be UTF-8; convert it, or correct the Content-Type.", "wrong_charset")
    with _disk_errors():
        file = tempfile.TemporaryFile(prefix="ttt-e2e-", buffering=0)  # noqa: SIM115 - closed when garbage-collected
        file.name = "The text"  # in errors about its content
        name = await (_receive_form_file if media_type == _FORM else _receive)(request, file)
    text = ReceivedText(file, name or "")
    await asyncio.to_thread(deque, iter(text), 0)  # raises the errors of the text
    return text


async def receive_file(request: Request, target: Path) -> None:
    """Write the body of a request to the file `target`."""
    with _disk_errors(), target.open("wb", buffering=0) as file:
        await _receive(request, file)


async def _receive(request: Request, file: IO[bytes]) -> None:
    async for chunk in request.stream():
        await asyncio.to_thread(_write, file, chunk)


def _write(file: IO[bytes], chunk: bytes) -> None:
    """Write the whole chunk: an unbuffered file may write less at a time when the disk is nearly full."""
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


async def _receive_form_file(request: Request, file: IO[bytes]) -> str | None:
    invalid = ApiError(400, f"Send exactly one file, and no other fields, as {_FORM}.", "no_file", "file")
    try:
        async with request.form(max_files=1, max_fields=0) as form:  # the parser writes to disk as well
            parts = [part for _, part in form.multi_items()]
            if len(parts) != 1 or not isinstance(parts[0], UploadFile):
                raise invalid
            while chunk := await parts[0].read(1 << 20):
                await asyncio.to_thread(_write, file, chunk)
            return parts[0].filename
    except ApiError:
        raise  # also that of a body that is too large
    except (HTTPException, ValueError) as error:  # the parser's; ValueError for some charsets
        raise invalid from error
