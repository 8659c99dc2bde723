"""Reading texts: strict UTF-8 in chunks, from files, folders, JSON, parquet and Python's standard library."""

import codecs
import json
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ttt_e2e.data.file_types import encoding_remedy, plain_bytes
from ttt_e2e.errors import UserError

CHUNK_BYTES = 1 << 20
_SHORT_CHUNK_CHARS = 1 << 16
_HEAD_CHARS = 1 << 20  # of a file, to see whether it holds rows
_ROWS_PER_BATCH = 16
_COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_SPACE, _ARRAY_SPACE = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*")
# Control characters, ends of lines and paragraphs, changes of direction, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_TEST_FOLDERS = {"test", "tests", "idle_test", "__phello__"}

_Row = tuple[int, str, dict[str, Any]]  # its number, where it is (for messages), and its fields


@dataclass(frozen=True)
class Document:
    """A text with a name. `source` is the text itself, or the path of a text file that is read on demand."""

    name: str
    source: str | Path

    def chunks(self) -> Iterator[str]:
        """The text in chunks of about a megabyte; raises UserError as `text_chunks` does."""
        return text_chunks(self.source) if isinstance(self.source, Path) else slices(self.source, CHUNK_BYTES)

    @property
    def text(self) -> str:
        """The whole text; a file is read anew each time."""
        return "".join(self.chunks())


def text_chunks(source: Path | IO[bytes], chunk_bytes: int = CHUNK_BYTES, *, compressed: bool = True) -> Iterator[str]:
    """Decode a text file, or an open binary stream such as standard input, in chunks of up to `chunk_bytes`.

    Line ends are kept, a byte order mark is not. What is compressed is decompressed; compressed=False refuses it.
    Raises UserError if the source does not exist, is a folder, is empty or is recognisably no text, and at the first
    byte that is not UTF-8 text, after everything before it has been yielded.
    """
    if not isinstance(source, Path):
        name = str(getattr(source, "name", "the stream"))
        name = "standard input" if name == "<stdin>" else name
        yield from _decode(plain_bytes(source, name, chunk_bytes, compressed=compressed), name)
        return
    if source.is_dir():
        raise UserError(f"{source} is a folder; give a text file.")
    try:
        with source.open("rb") as stream:
            yield from _decode(plain_bytes(stream, str(source), chunk_bytes, compressed=compressed), str(source))
    except FileNotFoundError as error:
        raise UserError(f"{source} does not exist; check the path.") from error
    except OSError as error:
        raise UserError(f"Cannot read {source}: {error.strerror}.") from error


def slices(text: str, size: int) -> Iterator[str]:
    """Cut `text` into slices of `size` characters."""
    return (text[start : start + size] for start in range(0, len(text), size))


def short_chunks(chunks: Iterable[str]) -> Iterator[str]:
    """Split the chunks of a text to at most 65,536 characters, so that reading begins after little tokenising."""
    return (part for chunk in chunks for part in slices(chunk, _SHORT_CHUNK_CHARS))


def printable(name: str) -> str:
    """A title or the name of a file in one line of valid Unicode: what is not part of one is escaped, as in Python."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], name)


def _decode(chunks: Iterator[bytes], name: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line, begun, is_empty = 0, 1, False, True
    for chunk in chain(chunks, [b""]):
        if (zero := chunk.find(0)) >= 0:
            raise UserError(f"{name} looks binary: byte {offset + zero} is zero; give a UTF-8 text.")
        pending = decoder.getstate()[0]
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            where, data = offset - len(pending) + error.start, pending + chunk
            remedy = encoding_remedy(data, error.start)
            line += data.count(b"\n", len(pending), error.start)
            place = f"byte {where} in line {line}"
            raise UserError(f"{name} is not valid UTF-8 at {place} ({error.reason}); {remedy}.") from error
        offset, line = offset + len(chunk), line + chunk.count(b"\n")
        if text and not begun:
            text, begun = text.removeprefix("\ufeff"), True
        if text:
            is_empty = False
            yield text
    if is_empty:
        raise UserError(f"{name} is empty; give a text of at least one character.")


def read_text(path: Path) -> str:
    """The content of a text file; raises UserError as `text_chunks` does."""
    return "".join(text_chunks(Path(path)))


def source_files(paths: Iterable[Path]) -> Iterator[tuple[str, Path, bool]]:
    """Yield (name, file, whether it was found in a folder) for files and, sorted by name, all files in folders.

    Hidden files and folders are left out, links to folders are not followed. Raises UserError for a missing path.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} does not exist; check the path.")
        if not path.is_dir():
            yield path.name, path, False
            continue
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                file = Path(folder) / name
                if not name.startswith(".") and file.is_file():
                    yield file.relative_to(path).as_posix(), file, True


def documents(
    paths: Iterable[Path],
    text_column: str = "text",
    skipped: list[str] | None = None,
    exclude: Iterable[Path] = (),
) -> Iterator[Document]:
    """Yield the documents in text files, JSONL, JSON arrays, parquet and folders of them.

    Every row is one document: of parquet, and of a file that begins with a JSON object, or an array of them, which has
    `text_column`, whatever the file is called. Every other text file is one. Rows without text, and files in a folder
    that are not text, are skipped.

    Args:
        paths: files and folders.
        text_column: the field or column with the text of a row; its name is that in `title`, if there is one.
        skipped: a list to which a sentence is added for everything that is skipped.
        exclude: files to leave out.

    Raises:
        UserError: for everything else that cannot be read.
    """
    skipped = [] if skipped is None else skipped
    excluded = {path.resolve() for path in exclude}
    for name, path, in_folder in source_files(paths):
        if path.resolve() in excluded:
            continue
        try:
            rows = _rows(path, text_column)
            for _ in text_chunks(path) if in_folder and rows is None else ():
                pass
        except UserError as error:
            if not in_folder:
                raise
            skipped.append(printable(str(error)))
            continue
        if rows is None:
            yield Document(printable(name), path)
            continue
        for number, where, row in rows:
            text, title = row[text_column], row.get("title")
            if text is not None and not isinstance(text, str):
                kind = type(text).__name__
                raise UserError(f"{where}: {text_column!r} is not text but {kind}; name another text column.")
            if not text:
                skipped.append(printable(f"{where}: {text_column!r} is empty."))
                continue
            if surrogate := re.search("[\ud800-\udfff]", text):
                raise UserError(f"{where}: half of a surrogate pair at character {surrogate.start()}; remove it.")
            yield Document(printable(title if isinstance(title, str) and title else f"{name}:{number}"), text)


def _rows(path: Path, text_column: str) -> Iterator[_Row] | None:
    """The rows in a file, or None if it holds none: then it is a text, or cannot be read at all."""
    if not path.is_file():
        return None  # a pipe, of which nothing may be read before its turn
    suffixes = [suffix.lower() for suffix in path.suffixes]
    try:
        with path.open("rb") as file:
            magic = file.read(5)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    if magic[:4] in (b"PAR1", b"PARE") and (magic[4:] == b"\x15" or suffixes[-1:] == [".parquet"]):
        return _parquet_rows(path, text_column)
    if suffixes[-1:] and suffixes[-1] in _COMPRESSED_SUFFIXES:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix in (".jsonl", ".ndjson"):
        return _json_rows(path, text_column)
    try:
        head = _more("", text_chunks(path), _HEAD_CHARS)
    except UserError:
        return None  # said when the text is read
    if not (begin := re.match(r"\s*(\[\s*)?(?=\{)", head)):
        return None
    try:
        first, end = json.JSONDecoder().raw_decode(head, begin.end())
    except (ValueError, RecursionError) as error:
        if not _is_cut(error, head) or len(head) < _HEAD_CHARS:
            return None
        first, end = dict.fromkeys(re.findall(r'"(\w+)"\s*:\s*"', head)), len(head)  # in the beginning of a long row
    if isinstance(first.get(text_column, 0), str | None):
        return _json_rows(path, text_column)
    if suffix == ".json" and (begin[1] or re.match(r"\s*\{", head[end:])):
        raise UserError(
            f"{path} holds rows without a field {text_column!r}, only: {', '.join(first)}; name another text column, "
            "or rename the file to .txt if it is to be read as a text."
        )
    return None


def _json_rows(path: Path, text_column: str) -> Iterator[_Row]:
    for number, where, row in _json_values(path):
        if not isinstance(row, dict) or text_column not in row:
            raise UserError(f"{where}: no field {text_column!r} with the text; name another text column.")
        yield number, where, row


def _json_values(path: Path) -> Iterator[tuple[int, str, Any]]:
    """The values of a JSON array with their numbers, or of JSONL with their lines, and for messages where they are.

    No more than a chunk, or a value and as much again, is in memory.
    """
    chunks, decode = text_chunks(path), json.JSONDecoder().raw_decode
    text, at, line, index = "", 0, 1, 0
    begun = in_array = ended = False
    while True:
        begin = (_ARRAY_SPACE if in_array else _SPACE).match(text, at).end()  # type: ignore[union-attr]
        line += text.count("\n", at, begin)
        if (at := begin) == len(text):
            text, at = _more("", chunks, 1), 0
            if text:
                continue
            if in_array and not ended:
                raise UserError(f"{path} is cut short: its JSON array does not end; use a complete copy.")
            return
        if text[at] == ("]" if in_array else "[") and not (ended if in_array else begun):
            begun, in_array, ended = True, True, text[at] == "]"
            at += 1
            continue
        begun, index = True, index + 1
        number, where = (index, f"{path}, row {index}") if in_array else (line, f"{path}, line {line}")
        while True:
            try:
                value, end = decode(text, at)
            except (ValueError, RecursionError) as error:
                if _is_cut(error, text) and len(longer := _more(text[at:], chunks, len(text) - at)) > len(text) - at:
                    text, at = longer, 0
                    continue
                reason = getattr(error, "msg", str(error))
                raise UserError(f"{where}: not valid JSON ({reason}); correct or remove it.") from error
            break
        if ended:
            raise UserError(f"{path}: there is more after the end of the JSON array; correct or remove it.")
        yield number, where, value
        line += text.count("\n", at, end)
        at = end


def _more(text: str, chunks: Iterator[str], chars: int) -> str:
    """`text` and at least `chars` characters of `chunks` more, if there are so many."""
    parts = [text]
    while chars > 0 and (chunk := next(chunks, "")):
        parts.append(chunk)
        chars -= len(chunk)
    return "".join(parts)


def _is_cut(error: Exception, text: str) -> bool:
    """Whether a JSON value is invalid perhaps only because `text` does not have the end of it."""
    return isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith("Unterminated string") or error.pos >= len(text) - len(r"\uXXXX")
    )


def _parquet_rows(path: Path, text_column: str) -> Iterator[_Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f'Reading {path} needs pyarrow: pip install "ttt-e2e[parquet]".') from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_column not in columns:
                raise UserError(f"{path} has no column {text_column!r}; name one of its columns: {', '.join(columns)}.")
            wanted = [text_column] + ["title"] * ("title" in columns and text_column != "title")
            batches = file.iter_batches(_ROWS_PER_BATCH, columns=wanted)
            rows = (batch.slice(i, 1).to_pylist()[0] for batch in batches for i in range(batch.num_rows))
            for number, row in enumerate(rows, 1):
                yield number, f"{path}, row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def standard_library() -> Iterator[Document]:
    """Yield the source of Python's standard library, without its tests, as long documents.

    Every top-level package is a document, its modules in sorted order. Modules that are single files are joined by
    their initial into documents called "modules a", "modules b", ... Raises UserError for a Python without source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(root.glob("*.py"), key=lambda file: (file.name[0].lower(), file))
    if not modules:
        raise UserError("This Python comes without the source of its standard library; give texts of your own.")
    groups = {init.parent.name: sorted(init.parent.rglob("*.py")) for init in sorted(root.glob("*/__init__.py"))}
    for file in modules:
        groups.setdefault(f"modules {file.name[0].lower()}", []).append(file)
    for name, files in groups.items():
        parts = []
        for file in files:
            relative = file.relative_to(root)
            if not _TEST_FOLDERS.intersection(relative.parts):
                with tokenize.open(file) as stream:
                    parts.append(f"# file: {relative.as_posix()}\n{stream.read()}\n")
        if parts:
            yield Document(name, "".join(parts))


def standard_library_document(name: str = "asyncio") -> Document:
    """The document called `name` of `standard_library`; raises UserError if there is none."""
    names = []
    for document in standard_library():
        if document.name == name:
            return document
        names.append(document.name)
    raise UserError(f"The standard library has no package {name!r}; choose one of: {', '.join(names)}.")
