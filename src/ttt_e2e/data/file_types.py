"""What a file is, by its first bytes and not by its name: compressed ones are opened, what is no text is refused."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from typing import IO, Any

from ttt_e2e.errors import UserError

_MIN_HEAD = 16  # bytes that are waited for; most patterns need no more
_HEAD_BYTES = 1 << 16
_BOMS = {  # in this order: that of UTF-32 may begin like that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

_COMPRESSED = {
    "gzip": rb"\x1f\x8b\x08",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\0",
    "zstd": rb"(\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)",
}
_OPEN: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_ZIP = rb"PK(\x03\x04|\x05\x06|\x07\x08)"
# What can be recognised but not read, with what to do about it. Of a zip archive the first names tell what it is.
_UNREADABLE = {
    "save it as plain text": {
        "a PDF": rb"%PDF-\d\.\d[\r\n]",
        "RTF": rb"\{\\rtf\d",
        "an EPUB book": _ZIP + rb".{26}mimetypeapplication/epub",
        "a Mobipocket book": rb".{60}BOOKMOBI",
        "an OpenDocument file": _ZIP + rb".{26}mimetypeapplication/vnd\.oasis",
        "a Word document": _ZIP + rb".*word/",
        "a spreadsheet": _ZIP + rb".*xl/",
        "a PowerPoint presentation": _ZIP + rb".*ppt/",
        "an Office document": rb"(\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1|" + _ZIP + rb".{26}\[Content_Types\])",
        "a DjVu document": rb"AT&TFORM.{4}DJV",
    },
    "--model takes a model, --session a saved session": {
        "a GGUF model": rb"GGUF([\x01-\x0f]\0\0\0|\0\0\0[\x01-\x0f])",
        "a safetensors file": rb".{5}\0\0\0\{",
        "a PyTorch pickle": _ZIP + rb".{26}[^\0]{1,100}/data\.pkl",
        "a pickle": rb"\x80[\x02-\x05]",
        "an HDF5 file": rb"\x89HDF\r\n\x1a\n",
    },
    "`ttt-e2e prepare` and `ttt-e2e evaluate` read its rows": {"a parquet file": rb"PAR[1E]\x15"},
    "export its rows as JSONL or parquet": {
        "a SQLite database": rb"SQLite format 3\0",
        "an Arrow file": rb"(ARROW1\0\0|FEA1\0|\xff{4}.{2}\0\0)",
        "an Avro file": rb"Obj\x01",
        "a NumPy array": rb"(\x93NUMPY|" + _ZIP + rb".{26}[^\0]{1,100}\.npy)",
    },
    "unpack it": {
        "a zip archive": _ZIP,
        "a tar archive": rb".{257}ustar[\0 ]",
        "a 7z archive": rb"7z\xbc\xaf\x27\x1c",
        "a RAR archive": rb"Rar!\x1a\x07",
        "an lz4 file": rb"\x04\x22\x4d\x18",
        "an lzip file": rb"LZIP\x01",
        "an lzma file": rb"\x5d\0\0.{2}(\xff{8}|.{5}\0{3})",
        "a file of `compress`": rb"\x1f\x9d",
        "an ar archive": rb"!<arch>\n",
    },
    "fetch the file that it stands for: git lfs pull": {"a Git LFS pointer": rb"version https://git-lfs\.github\.com/"},
    "give a text": {
        "a PNG image": rb"\x89PNG\r\n\x1a\n",
        "a JPEG image": rb"\xff\xd8\xff",
        "a GIF image": rb"GIF8[79]a.{2}[^ -~]",
        "a TIFF image": rb"(II\*\0|MM\0\*)",
        "a WebP image": rb"RIFF.{4}WEBP",
        "a sound": rb"(RIFF.{4}WAVE|fLaC\0|OggS\0|ID3[\x02-\x04]\0)",
        "a video": rb"(.{4}ftyp[a-zA-Z0-9 ]{4}|RIFF.{4}AVI |\x1a\x45\xdf\xa3)",
        "a font": rb"(\0\x01\0\0\0|OTTO\0|wOF[F2]\0)",
        "a program": rb"(\x7fELF|MZ.{0,2}\0|\xcf\xfa\xed\xfe|\xce\xfa\xed\xfe|\xca\xfe\xba\xbe|\0asm)",
    },
}


class _Rest(io.RawIOBase):
    """A stream of which the first bytes, `head`, have been read already."""

    def __init__(self, head: bytes, stream: IO[bytes]) -> None:
        self._head, self._read1 = head, _read1(stream)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._read1(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def _read1(stream: IO[bytes]) -> Any:
    # Of a pipe, `read1` returns what there is. `read` would wait for a whole chunk, and Ctrl-C lose what has come.
    return getattr(stream, "read1", stream.read)


def _peek(stream: IO[bytes]) -> tuple[bytes, IO[bytes]]:
    """The first bytes of a stream, all that have come but `_MIN_HEAD` at least, and the stream with them."""
    head, read = b"", _read1(stream)
    while len(head) < _MIN_HEAD and (more := read(_HEAD_BYTES)):
        head += more
    return head, io.BufferedReader(_Rest(head, stream))


def _kind(patterns: dict[str, bytes], head: bytes) -> str | None:
    return next((kind for kind, pattern in patterns.items() if re.match(pattern, head, re.DOTALL)), None)


def unreadable(head: bytes) -> tuple[str, str] | None:
    """What a file with these first bytes is and what to do about it, if it is recognised and holds no plain text."""
    found = ((_kind(patterns, head), remedy) for remedy, patterns in _UNREADABLE.items())
    return next(((kind, remedy) for kind, remedy in found if kind), None)


def plain_bytes(stream: IO[bytes], name: str, size: int, *, compressed: bool = True) -> Iterator[bytes]:
    """The content of a stream in chunks of up to `size` bytes, decompressed if it is gzip, bzip2, xz or zstd.

    Args:
        stream: of bytes, such as an open file or standard input.
        name: of the stream, for messages.
        size: of a chunk. A chunk of a pipe is what has come.
        compressed: whether it may be compressed.

    Raises:
        UserError: for what is damaged, and for what is recognisably no text, at its beginning.
    """
    compression = None
    try:
        head, stream = _peek(stream)
        if compression := _kind(_COMPRESSED, head):
            if not compressed:
                raise UserError(f"{name} is compressed ({compression}); decompress it first.")
            head, stream = _peek(_decompress(stream, name, compression))
            if again := _kind(_COMPRESSED, head):
                raise UserError(f"{name} is compressed twice ({compression}, {again}); decompress it first.")
        if found := unreadable(head):
            kind, remedy = found
            raise UserError(f"{name} is {kind}{f' in {compression}' if compression else ''}, not a text; {remedy}.")
        if encoding := _wide_encoding(head):
            raise UserError(f"{name} is {encoding}, not UTF-8; `iconv -f {encoding} -t UTF-8` converts it.")
        read = _read1(stream)
        while chunk := read(size):
            yield chunk
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system, not of a decompressor
        raise UserError(f"{name} is cut short or damaged ({compression}: {error}); use a complete copy.") from error


def _decompress(stream: IO[bytes], name: str, compression: str) -> IO[bytes]:
    opened: IO[bytes]
    if compression in _OPEN:
        opened = _OPEN[compression](stream)
        return opened
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f'Reading {name} (zstd) needs pyarrow: pip install "ttt-e2e[parquet]".') from error
    opened = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "zstd")
    return opened


def _wide_encoding(head: bytes) -> str | None:
    """The name for iconv of UTF-16 or UTF-32 with these first bytes, with a byte order mark or without."""
    bom = next((name for mark, name in _BOMS.items() if head.startswith(mark)), None)
    for name in (bom,) if bom else ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE") if b"\0" in head else ():
        try:
            text = codecs.getincrementaldecoder(name)().decode(head)
        except UnicodeDecodeError:
            continue
        # Binary data may decode, too, but not to words.
        words = sum(char.isspace() or (char.isalpha() and char < "\u0800") for char in text)
        if bom or (len(text) >= 4 and 2 * words > len(text) and all(c.isprintable() or c.isspace() for c in text)):
            return name
    return None


def encoding_remedy(data: bytes, start: int) -> str:
    """What to do about a text of which `data`, at byte `start`, is not UTF-8."""
    near = data[max(0, start - 1000) : start + 1000]
    high = len(re.findall(rb"[\x80-\xff]", near))
    single = len(re.findall(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])", near))
    is_western = data[:start].isascii() and not re.search(rb"[\0-\x08\x0e-\x1f\x81\x8d\x8f\x90\x9d]", near)
    if is_western and 2 * single > high:
        return "it looks like Latin-1 or Windows-1252, which `iconv -f WINDOWS-1252 -t UTF-8` converts"
    return "convert it from its encoding with iconv, or replace the damaged bytes"
