"""Files are what their first bytes say: compressed ones are read, other programs' files are refused by name."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import sqlite3
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import safetensors.numpy
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ttt_e2e.data.text import documents, read_text, text_chunks
from ttt_e2e.errors import UserError

TEXT = "One morning, very early, the geese were gone.\n" * 40


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd,
}


@pytest.mark.parametrize("kind", COMPRESS)
def test_compressed_texts_are_read_whatever_they_are_called(tmp_path: Path, kind: str) -> None:
    half = len(TEXT) // 2
    members = COMPRESS[kind](TEXT[:half].encode()) + COMPRESS[kind](TEXT[half:].encode())
    for name, data in {"a.txt": COMPRESS[kind](TEXT.encode()), "b.gz": members}.items():
        (tmp_path / name).write_bytes(data)
        assert read_text(tmp_path / name) == TEXT
        assert "".join(text_chunks(io.BytesIO(data), 7)) == TEXT


@pytest.mark.parametrize("kind", COMPRESS)
def test_damaged_and_empty_archives_are_refused_in_a_sentence(tmp_path: Path, kind: str) -> None:
    data = COMPRESS[kind](os.urandom(300).hex().encode())
    path = tmp_path / "a"
    for length in (20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=rf"a is cut short or damaged \({kind}: .*\); use a complete copy"):
            read_text(path)
    path.write_bytes(COMPRESS[kind](b""))
    with pytest.raises(UserError, match="a is empty"):
        read_text(path)
    path.write_bytes(COMPRESS[kind](COMPRESS[kind](b"text")))
    with pytest.raises(UserError, match=f"compressed twice \\({kind}, {kind}\\)"):
        read_text(path)
    with pytest.raises(UserError, match=f"compressed \\({kind}\\); decompress it first"):
        list(text_chunks(path, compressed=False))


@given(data=st.binary(), kind=st.sampled_from(list(COMPRESS)), position=st.integers(0, 200), byte=st.integers(0, 255))
def test_altered_archives_never_end_in_a_traceback(data: bytes, kind: str, position: int, byte: int) -> None:
    archive = bytearray(COMPRESS[kind](data or b"x"))
    archive[position % len(archive)] = byte
    try:
        assert all(text_chunks(io.BytesIO(bytes(archive))))
    except UserError as error:
        assert "\n" not in str(error)


def test_archive_that_expands_a_thousand_times_is_streamed() -> None:
    archive = io.BytesIO(gzip.compress(b"\n" * (16 << 20), 9))
    assert max(map(len, text_chunks(archive))) <= 1 << 20


def write_other_files(folder: Path) -> dict[str, str]:
    """Files of other programs, written by these or in their format; returns what each is called in the refusal."""
    (folder / "in.txt").write_text(TEXT)
    with tarfile.open(folder / "tar", "w") as tar, tarfile.open(folder / "tar.gz", "w:gz") as packed:
        tar.add(folder / "in.txt", "in.txt")
        packed.add(folder / "in.txt", "in.txt")
    for name, members in {
        "zip": ["in.txt"],
        "docx": ["[Content_Types].xml", "word/document.xml"],
        "xlsx": ["[Content_Types].xml", "xl/workbook.xml"],
        "epub": ["mimetype"],
    }.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member in members:
                archive.writestr(member, "application/epub+zip")
    with sqlite3.connect(folder / "sqlite") as database:
        database.execute("create table t (a)")
    torch.save({"a": torch.ones(2)}, folder / "pt")
    (folder / "pkl").write_bytes(pickle.dumps({"a": 1}))
    np.save(folder / "npy.npy", np.ones(3))
    np.savez(folder / "npz.npz", a=np.ones(3))
    safetensors.numpy.save_file({"a": np.ones(3)}, folder / "safetensors")
    table = pyarrow.table({"text": ["x", "y"]})
    pyarrow.feather.write_feather(table, folder / "feather")
    with pyarrow.ipc.new_stream(folder / "arrows", table.schema) as stream:
        stream.write_table(table)
    pyarrow.parquet.write_table(table, folder / "parquet")
    shutil.copyfile("/bin/sh", folder / "elf")
    for name, data in {
        "pdf": b"%PDF-1.7\n1 0 obj",
        "rtf": rb"{\rtf1\ansi Hello}",
        "doc": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(100),
        "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF",
        "gguf": b"GGUF\3\0\0\0" + bytes(100),
        "7z": b"7z\xbc\xaf\x27\x1c\0\4" + bytes(30),
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    }.items():
        (folder / name).write_bytes(data)
    return {
        "tar": "a tar archive", "tar.gz": "a tar archive in gzip", "zip": "a zip archive", "docx": "a Word document",
        "xlsx": "a spreadsheet", "epub": "an EPUB book", "sqlite": "a SQLite database", "pt": "a PyTorch pickle",
        "pkl": "a pickle", "npy.npy": "a NumPy array", "npz.npz": "a NumPy array", "safetensors": "a safetensors file",
        "feather": "an Arrow file", "arrows": "an Arrow file", "parquet": "a parquet file", "elf": "a program",
        "pdf": "a PDF", "rtf": "RTF", "doc": "an Office document", "png": "a PNG image", "jpeg": "a JPEG image",
        "gguf": "a GGUF model", "7z": "a 7z archive", "lfs": "a Git LFS pointer",
    }  # fmt: skip


def test_files_of_other_programs_are_refused_by_name(tmp_path: Path) -> None:
    for name, kind in write_other_files(tmp_path).items():
        with pytest.raises(UserError, match=f"{name} is {kind}, not a text; "):
            read_text(tmp_path / name)
        with pytest.raises(UserError, match=f"the stream is {kind}, not a text; "):
            list(text_chunks(io.BytesIO((tmp_path / name).read_bytes())))
    skipped: list[str] = []
    assert [document.text for document in documents([tmp_path], skipped=skipped)] == [TEXT, "x", "y"]
    assert len(skipped) == 23


@pytest.mark.parametrize("word", ["GGUF", "PAR1", "BZh9", "%PDF-1.4", "OggS", "ID3", "MZ", "RIFF", "GIF89a", "OTTO"])
def test_texts_that_begin_like_other_files_are_texts(tmp_path: Path, word: str) -> None:
    (tmp_path / "a.txt").write_text(f"{word} begins such files, and this text.")
    assert read_text(tmp_path / "a.txt").startswith(word)


@given(text=st.text(min_size=1), size=st.integers(1, 9))
@example("\ufeffa", 1)
def test_byte_order_mark_is_no_character(text: str, size: int) -> None:
    if "\0" not in text:
        assert "".join(text_chunks(io.BytesIO(b"\xef\xbb\xbf" + text.encode()), size)) == text


def test_text_of_a_byte_order_mark_is_empty() -> None:
    with pytest.raises(UserError, match="is empty"):
        list(text_chunks(io.BytesIO(b"\xef\xbb\xbf")))


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-16", "Grüße, 雪!"),
        ("utf-32", "Grüße, 雪!"),
        ("utf-16-le", "Some plain words."),
        ("utf-16-be", "Some plain words."),
        ("utf-32-le", "Some plain words."),
        ("utf-32-be", "Немного слов."),
        ("latin-1", "Un café déjà vu."),
        ("cp1252", "“Smart” quotes cost 5 €."),
    ],
)
def test_other_encodings_are_named_with_a_command_that_works(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=r"`iconv -f [\w-]+ -t UTF-8`") as caught:
        read_text(tmp_path / "a.txt")
    command = str(caught.value).split("`")[1]
    with (tmp_path / "a.txt").open("rb") as stdin, (tmp_path / "b.txt").open("wb") as stdout:
        subprocess.run(command.split(), stdin=stdin, stdout=stdout, check=True)
    assert read_text(tmp_path / "b.txt") == text


def test_damaged_utf8_is_not_called_latin_1(tmp_path: Path) -> None:
    for data in ("déjà vu ".encode() + b"\xff", "Немного слов".encode("koi8-r"), "雪が降る".encode("shift-jis")):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(UserError, match="convert it from its encoding with iconv, or replace the damaged bytes"):
            read_text(tmp_path / "a.txt")


# -- rows --------------------------------------------------------------------------------------------------------------

ROWS = [{"text": 'one\n[,]{}"\\'}, {"title": "Two", "text": "😀 zwei"}, {"text": "drei", "n": [1, {"a": 2}]}]
FORMS = {
    "array": json.dumps(ROWS),
    "indented array": "\n " + json.dumps(ROWS, indent=4),
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
    "lines without an end": "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "indented objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a", "a.jsonl.gz", "a.json.zst", "a.parquet"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json_rows_are_rows_in_every_form(tmp_path: Path, form: str, name: str, bom: bytes) -> None:
    data = bom + FORMS[form].encode()
    data = gzip.compress(data) if name.endswith(".gz") else zstd(data) if name.endswith(".zst") else data
    (tmp_path / name).write_bytes(data)
    found = list(documents([tmp_path]))
    assert [document.text for document in found] == [row["text"] for row in ROWS]
    assert found[1].name == "Two"


def test_parquet_under_another_name_is_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"]}), tmp_path / "a.txt")
    assert [document.text for document in documents([tmp_path / "a.txt"])] == ["x", "y"]


@settings(max_examples=30)
@given(
    texts=st.lists(st.text(min_size=1, max_size=30), min_size=1),
    chunk=st.integers(1, 40),
    indent=st.none() | st.integers(0, 3),
    ascii=st.booleans(),
    is_array=st.booleans(),
)
def test_json_is_read_in_chunks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    chunk: int,
    indent: int | None,
    ascii: bool,
    is_array: bool,
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    rows = [{"n": -1.5e3, "text": text, "rest": [None, True]} for text in texts]
    if is_array:
        data = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    else:
        data = "\n".join(json.dumps(row, indent=indent, ensure_ascii=ascii) for row in rows)
    path.write_bytes(data.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ttt_e2e.data.text.text_chunks.__defaults__", (chunk,))
        if "\0" not in data:
            assert [document.text for document in documents([path])] == texts


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('[{"text": "a"}, {"text": "b"}', "is cut short: its JSON array does not end"),
        ('[{"text": "a"}, {"text": "b', r"row 2: not valid JSON \(Unterminated string"),
        ('[{"text": "a"}, {"text" "b"}]', r"row 2: not valid JSON \(Expecting ':' delimiter"),
        ('[{"text": "a"}, 3]', "row 2: no field 'text'"),
        ('[{"text": "a"}] [', "more after the end|row 2: not valid JSON"),
        ('{"text": "a"}\n{"text": ' + "9" * 5000 + "}", "line 2: not valid JSON"),
        ('[{"body": "a", "n": 1}]', "rows without a field 'text', only: body, n; name another text column"),
        ('{"body": "a"}\n{"body": "b"}\n', "rows without a field 'text', only: body"),
    ],
)
def test_broken_json_is_refused_in_a_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        list(documents([tmp_path / "a.json"]))


@pytest.mark.parametrize(
    "content",
    ['{"name": "package", "text": 3}', "[1, 2]", '["a", "b"]', "[Chapter 1]\n", "{x | x > 0}", '{"a": 1, "text', "[{"],
)
def test_other_json_and_texts_with_braces_are_texts(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert [document.text for document in documents([tmp_path / "a.json"])] == [content]


def test_long_row_is_recognised_by_its_beginning(tmp_path: Path) -> None:
    text = "words " * 500_000
    (tmp_path / "a.json").write_text(json.dumps([{"id": 1, "text": text}]))
    assert [document.text for document in documents([tmp_path / "a.json"])] == [text]
