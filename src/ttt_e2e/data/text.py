"""Reading texts: strict UTF-8 in chunks, from files, folders, JSONL, parquet and Python's standard library."""

import codecs
import json
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ttt_e2e.errors import UserError

CHUNK_BYTES = 1 << 20
_SHORT_CHUNK_CHARS = 1 << 16
_ROWS_PER_BATCH = 16
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


def text_chunks(source: Path | IO[bytes], chunk_bytes: int = CHUNK_BYTES) -> Iterator[str]:
    """Decode a text file, or an open binary stream such as standard input, in chunks of up to `chunk_bytes`.

    Line ends are kept. Raises UserError if the source does not exist, is a folder or is empty, and at the first byte
    that is not UTF-8 text, after everything before it has been yielded.
    """
    if not isinstance(source, Path):
        name = str(getattr(source, "name", "the stream"))
        yield from _decode(source, "standard input" if name == "<stdin>" else name, chunk_bytes)
        return
    if source.is_dir():
        raise UserError(f"{source} is a folder; give a text file.")
    try:
        with source.open("rb") as stream:
            yield from _decode(stream, str(source), chunk_bytes)
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


def _decode(stream: IO[bytes], name: str, chunk_bytes: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    # Of a pipe, `read1` returns what there is. `read` would wait for a whole chunk, and Ctrl-C lose what has come.
    read = getattr(stream, "read1", stream.read)
    while True:
        chunk = read(chunk_bytes)
        if (zero := chunk.find(0)) >= 0:
            raise UserError(f"{name} looks binary: byte {offset + zero} is zero; give a UTF-8 text.")
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            where = offset - pending + error.start
            raise UserError(f"{name} is not valid UTF-8 at byte {where} ({error.reason}); convert it first.") from error
        if not chunk:
            break
        yield text
        offset += len(chunk)
    if offset == 0:
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
    """Yield the documents in text files, JSONL (.jsonl, .ndjson), parquet (.parquet) and folders of them.

    A text file is one document, whatever its suffix. So is every row of JSONL or parquet. Rows without text, and files
    in a folder that are not text, are skipped.

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
        if (suffix := path.suffix.lower()) in _ROWS:
            for number, where, row in _ROWS[suffix](path, text_column):
                text, title = row[text_column], row.get("title")
                if text is not None and not isinstance(text, str):
                    kind = type(text).__name__
                    raise UserError(f"{where}: {text_column!r} is not text but {kind}; name another text column.")
                if not text:
                    skipped.append(f"{where}: {text_column!r} is empty.")
                    continue
                if surrogate := re.search("[\ud800-\udfff]", text):
                    raise UserError(f"{where}: half of a surrogate pair at character {surrogate.start()}; remove it.")
                yield Document(title if isinstance(title, str) and title else f"{name}:{number}", text)
            continue
        try:
            for _ in text_chunks(path) if in_folder else ():
                pass
        except UserError as error:
            skipped.append(str(error))
        else:
            yield Document(name, path)


def _jsonl_rows(path: Path, text_column: str) -> Iterator[_Row]:
    number = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise UserError(f"{where}: not valid UTF-8 at byte {error.start} of the line.") from error
                except (json.JSONDecodeError, RecursionError) as error:
                    raise UserError(f"{where}: not valid JSON ({error}); correct or remove the line.") from error
                if not isinstance(row, dict) or text_column not in row:
                    raise UserError(f"{where}: no field {text_column!r} with the text; name another text column.")
                yield number, where, row
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    if number == 0:
        raise UserError(f"{path} is empty; give a file with at least one line.")


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


_ROWS = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".parquet": _parquet_rows}


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
