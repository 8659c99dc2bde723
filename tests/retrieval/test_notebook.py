"""The notebook's files: the same however the text came, complete after a kill at any moment, refused if altered."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_helpers import SIZE, TEXT, make_notebook, notebook_files

from ttt_e2e.errors import UserError
from ttt_e2e.retrieval import notebook as notebook_module
from ttt_e2e.retrieval.notebook import Notebook, notebook_folder, passage_size


@given(cuts=st.lists(st.integers(0, len(TEXT)), max_size=6), reopen=st.booleans())
@settings(max_examples=25, deadline=None)
def test_files_do_not_depend_on_how_the_text_was_split(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], reopen: bool
) -> None:
    folder = tmp_path_factory.mktemp("split")
    ends = [0, *sorted(cuts), len(TEXT)]
    notebook = Notebook(folder, size=SIZE)
    for a, b in itertools.pairwise(ends):
        notebook.add(TEXT[a:b])
        if reopen:
            notebook.close()
            notebook = Notebook(folder)
            assert notebook.size == SIZE
    assert notebook.characters == len(TEXT)
    notebook.close()
    assert notebook_files(folder) == notebook_files(make_notebook(tmp_path_factory.mktemp("whole")))


def test_add_writes_long_texts_in_small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    write = notebook_module._write

    def watched(file: object, data: bytes) -> None:
        nonlocal longest
        longest = max(longest, len(data))
        write(file, data)  # type: ignore[arg-type]

    monkeypatch.setattr(notebook_module, "_write", watched)
    with Notebook(tmp_path / "n") as notebook:
        notebook.add("A sentence like any other. " * 40_000)
        assert notebook.characters == 27 * 40_000
        assert len(notebook._open_passage.text) < 2 * notebook.size
    assert longest <= 1 << 16


@given(lines_kept=st.integers(0, 10_000), text_lost=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_opening_completes_what_was_not_written(
    tmp_path_factory: pytest.TempPathFactory, lines_kept: int, text_lost: int
) -> None:
    # A killed process may leave half a character, and passages that end anywhere before the text does.
    folder = make_notebook(tmp_path_factory.mktemp("killed"))
    text, lines = notebook_files(folder)
    last = json.loads(lines.splitlines()[-1])["stop_byte"]
    data = text[: max(last, len(text) - text_lost)]
    (folder / "text.txt").write_bytes(data)
    (folder / "passages.jsonl").write_bytes(lines[:lines_kept])
    with Notebook(folder) as notebook:
        kept = data.decode(errors="ignore")
        assert notebook.characters == len(kept)
        notebook.add(TEXT[len(kept) :])
    assert notebook_files(folder) == (text, lines)


_CHILD = """
import sys
from pathlib import Path
from ttt_e2e.retrieval.notebook import Notebook
notebook = Notebook(Path(sys.argv[1]), size=int(sys.argv[2]))
text = Path(sys.argv[3]).read_text(encoding="utf-8")
while True:
    for start in range(0, len(text), 13):
        notebook.add(text[start : start + 13])
        print(notebook.characters, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 40, 333])
def test_a_killed_process_loses_at_most_its_last_chunk(tmp_path: Path, acknowledged: int) -> None:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    folder = tmp_path / "n"
    command = [sys.executable, "-c", _CHILD, str(folder), str(SIZE), str(tmp_path / "text")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for _ in range(acknowledged):
            reached = int(child.stdout.readline())
        with pytest.raises(UserError, match="in use"):
            Notebook(folder)
        os.kill(child.pid, signal.SIGKILL)
        rest = child.stdout.read().split("\n")
        reached = max([reached, *map(int, rest[:-1])])
    with Notebook(folder) as notebook:
        assert reached <= notebook.characters <= reached + 13
        text = (TEXT * (notebook.characters // len(TEXT) + 1))[: notebook.characters]
    assert notebook_files(folder) == notebook_files(make_notebook(tmp_path / "whole", text))


def test_only_one_notebook_can_be_open_at_a_time(tmp_path: Path) -> None:
    with Notebook(tmp_path / "n") as first:
        first.add("First. ")
        with pytest.raises(UserError, match="in use"):
            Notebook(tmp_path / "n")
    with Notebook(tmp_path / "n") as second:
        assert second.characters == 7
    for closed in (lambda: second.add("x"), lambda: second.search("x")):
        with pytest.raises(UserError, match="is closed"):
            closed()


def test_notebook_rejects_other_folders_and_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "text.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("diary", "file"):
        with pytest.raises(UserError, match=name):
            Notebook(tmp_path / name)
    assert [file.name for file in (tmp_path / "diary").iterdir()] == ["text.txt"]
    with pytest.raises(UserError, match="no notebook"):
        Notebook(tmp_path / "n", create=False)
    assert not (tmp_path / "n").exists()
    with pytest.raises(UserError, match="too short"):
        Notebook(tmp_path / "n", size=3)
    with Notebook(tmp_path / "n") as notebook, pytest.raises(UserError, match="surrogate"):
        notebook.add("\ud83c")


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


@pytest.mark.parametrize(
    ("alter", "match"),
    [
        (lambda folder: os.truncate(folder / "text.txt", 3000), "truncated"),
        (lambda folder: os.truncate(folder / "notebook.json", 20), "truncated"),
        (lambda folder: replace_bytes(folder / "notebook.json", b'"version": 1', b'"version": 9'), "version 1"),
        (lambda folder: replace_bytes(folder / "text.txt", b"day 8 the heron", b"day 8 the horse"), "altered"),
        (lambda folder: replace_bytes(folder / "text.txt", b"day 8 the heron", b"day 8 the hero\xff"), "altered"),
        (lambda folder: replace_bytes(folder / "text.txt", b"day 59", b"day 60"), "altered"),
        (lambda folder: replace_bytes(folder / "passages.jsonl", b'{"start": 0', b'{"start": 1'), "altered"),
        (lambda folder: replace_bytes(folder / "passages.jsonl", b'{"start": 0', b'{"stort": 0'), "altered"),
        (lambda folder: replace_bytes(folder / "passages.jsonl", b'{"start": 0', b'{"start": 0.5'), "altered"),
        (lambda folder: replace_bytes(folder / "passages.jsonl", b"}\n{", b",\n{"), "altered"),
    ],
)
def test_altered_files_are_refused(tmp_path: Path, alter: Callable[[Path], None], match: str) -> None:
    folder = make_notebook(tmp_path / "n", TEXT + "The last passage is full with this. " * 4)
    alter(folder)
    with pytest.raises(UserError, match=match) as caught, Notebook(folder) as notebook:
        notebook.search("heron")
    assert "\n" not in str(caught.value)


def test_a_full_disk_keeps_what_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_notebook(tmp_path / "n", TEXT[:1000])

    def full(file: object, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    notebook = Notebook(folder)
    with monkeypatch.context() as patch:
        patch.setattr(notebook_module, "_write", full)
        with pytest.raises(UserError, match="No space left"):
            notebook.add(TEXT[1000:])
    with Notebook(folder) as notebook:  # the other one was closed, and has let go of it
        assert notebook.characters == 1000


@given(write=st.integers(0, 60), part=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_a_write_that_stops_halfway_is_completed_or_undone(
    tmp_path_factory: pytest.TempPathFactory, write: int, part: float
) -> None:
    folder, whole, count, reached = tmp_path_factory.mktemp("stopped"), notebook_module._write, 0, 0

    def stopped(file: IO[bytes], data: bytes) -> None:
        nonlocal count
        if data and count == write:
            whole(file, data[: int(part * len(data))])
            raise KeyboardInterrupt
        whole(file, data)
        count += bool(data)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        notebook = Notebook(folder, size=SIZE)
        patch.setattr(notebook_module, "_write", stopped)
        while True:
            notebook.add(TEXT[reached : reached + 97])
            reached += 97
    with Notebook(folder) as notebook:
        assert reached <= notebook.characters <= reached + 97
        notebook.add(TEXT[notebook.characters :])
    assert notebook_files(folder) == notebook_files(make_notebook(tmp_path_factory.mktemp("whole")))


def test_record_does_not_add_a_text_twice(tmp_path: Path) -> None:
    chunks = [TEXT[i : i + 333] for i in range(0, len(TEXT), 333)]
    with Notebook(tmp_path / "n", size=SIZE) as notebook:
        notebook.add("Before. ")
        reading = notebook.record(chunks)
        assert [next(reading) for _ in range(3)] == chunks[:3]
        assert notebook.characters == 8 + 999  # a chunk is added before it is yielded
    with Notebook(tmp_path / "n") as notebook:
        assert "".join(notebook.record(chunks, start=8)) == TEXT
        assert notebook.characters == 8 + len(TEXT)
        with pytest.raises(UserError, match=f"holds {len(TEXT) - 50} characters more"):
            list(notebook.record([TEXT[:50]], start=8))
        with pytest.raises(UserError, match="another text"):
            list(notebook.record(["A different text."], start=8))
        with pytest.raises(UserError, match="no text begins"):
            next(notebook.record(["x"], start=notebook.characters + 1))
        assert notebook.characters == 8 + len(TEXT)
    assert notebook_files(tmp_path / "n") == notebook_files(make_notebook(tmp_path / "whole", "Before. " + TEXT))


def test_names_and_sizes() -> None:
    assert notebook_folder(Path("a/moby.session")) == Path("a/moby.session.notebook")
    assert (passage_size(12), passage_size(256), passage_size(8192)) == (20, 192, 400)
