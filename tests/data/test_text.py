"""Reading texts: chunks, folders, JSONL and parquet, and the first byte or row that cannot be read."""

import io
import json
import os
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.data.text import (
    documents,
    read_text,
    short_chunks,
    standard_library,
    standard_library_document,
    text_chunks,
)
from ttt_e2e.errors import UserError


def write_jsonl(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_parquet(path: Path, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


@settings(deadline=None)
@given(text=st.text(min_size=1).filter(lambda text: "\0" not in text and text[0] != "\ufeff"), size=st.integers(1, 9))
def test_text_chunks_join_to_the_text(text: str, size: int) -> None:
    assert "".join(text_chunks(io.BytesIO(text.encode()), size)) == text


def test_short_chunks_join_to_the_text() -> None:
    chunks = ["a" * 150_000, "", "b", "c" * 65_536]
    short = list(short_chunks(chunks))
    assert "".join(short) == "".join(chunks) and [len(chunk) for chunk in short] == [65_536, 65_536, 18_928, 1, 65_536]


def test_open_pipe_gives_what_there_is() -> None:
    source, sink = os.pipe()
    too_late = threading.Timer(600, os.close, [sink])
    too_late.start()
    with os.fdopen(source, "rb") as stream:
        os.write(sink, b"What came first.")
        assert next(text_chunks(stream)) == "What came first."
        assert too_late.is_alive()
        too_late.cancel()
        os.close(sink)


def test_line_ends_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert read_text(tmp_path / "a.txt") == "a\r\nb\rc\n"


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"abc\0def", "looks binary: byte 3 is zero"),
        ("aé".encode() + b"bc\xff", "is not valid UTF-8 at byte 5"),
        (b"abcd\xe2\x82", "is not valid UTF-8 at byte 4"),
        (b"\xe2\x82a", "is not valid UTF-8 at byte 0"),
    ],
)
def test_text_chunks_refuses_bad_bytes(tmp_path: Path, data: bytes, sentence: str, size: int) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"bad.txt {sentence}"):
        list(text_chunks(path, size))
    with pytest.raises(UserError, match=sentence):
        list(text_chunks(io.BytesIO(data), size))


def test_missing_texts_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_text(tmp_path / "no.txt")
    with pytest.raises(UserError, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        list(documents([tmp_path / "no.txt"]))


def test_documents_of_a_folder(tmp_path: Path) -> None:
    for name, data in {
        "b.txt": b"bee",
        "a/z.md": b"zed",
        "a/blob.bin": b"\0\1",
        "a/half.txt": b"abc\xff",
        "empty": b"",
        ".hidden": b"no",
        ".git/config": b"no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    write_jsonl(tmp_path / "c.jsonl", {"text": "one"}, {"text": "two", "title": "Two"}, {"text": ""})
    skipped: list[str] = []
    found = [(document.name, document.text) for document in documents([tmp_path], skipped=skipped)]
    assert found == [("b.txt", "bee"), ("c.jsonl:1", "one"), ("Two", "two"), ("a/z.md", "zed")]
    assert len(skipped) == 4
    with pytest.raises(UserError, match="looks binary"):
        [document.text for document in documents([tmp_path / "a/blob.bin"])]


def test_documents_of_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", body=["x", None, "y"], title=["X", "N", None], n=[1, 2, 3])
    skipped: list[str] = []
    found = [(document.name, document.text) for document in documents([path], "body", skipped)]
    assert found == [("X", "x"), ("a.parquet:3", "y")]
    assert skipped == [f"{path}, row 2: 'body' is empty."]
    with pytest.raises(UserError, match=r"no column 'text'.*body, title, n"):
        list(documents([path]))
    with pytest.raises(UserError, match="'n' is not text but int"):
        list(documents([path], "n"))
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        list(documents([path]))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"text": "open', "not valid JSON"),
        (b'{"txt": "a"}', "no field 'text'"),
        (b'["text"]', "no field 'text'"),
        (b'{"text": 3}', "'text' is not text but int"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_jsonl_names_the_line(tmp_path: Path, line: bytes, sentence: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=f"a.jsonl, line 3: {sentence}"):
        list(documents([path]))


def test_invalid_utf8_in_jsonl_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"a.jsonl is not valid UTF-8 at byte 28 in line 3"):
        list(documents([tmp_path / "a.jsonl"]))


def test_empty_jsonl_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match="is empty"):
        list(documents([tmp_path / "a.jsonl"]))


def test_standard_library_documents() -> None:
    names = [document.name for document in standard_library()]
    assert {"asyncio", "email", "json", "modules a"} <= set(names)
    assert len(names) == len(set(names))
    assert not {"test", "site-packages"} & set(names)
    document = standard_library_document("json")
    assert document.text.startswith("# file: json/__init__.py\n")
    assert "# file: json/decoder.py\n" in document.text
    with pytest.raises(UserError, match=r"no package 'nope'.*asyncio"):
        standard_library_document("nope")
