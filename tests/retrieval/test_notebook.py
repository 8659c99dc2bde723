"""The notebook's database: the same however the text came, complete after a kill at any moment, refused if altered."""

import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_helpers import SIZE, TEXT, contents, make_notebook

from ttt_e2e.errors import UserError
from ttt_e2e.retrieval.notebook import Notebook, notebook_folder, passage_size


@given(cuts=st.lists(st.integers(0, len(TEXT)), max_size=6), reopen=st.booleans(), search=st.booleans())
@settings(max_examples=12, deadline=None)
def test_a_notebook_does_not_depend_on_how_the_text_was_split(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], reopen: bool, search: bool
) -> None:
    folder = tmp_path_factory.mktemp("split")
    ends = [0, *sorted(cuts), len(TEXT)]
    notebook = Notebook(folder / "n", size=SIZE)
    for a, b in itertools.pairwise(ends):
        notebook.add(TEXT[a:b])
        if search:
            notebook.search("heron")
        if reopen:
            notebook.close()
            notebook = Notebook(folder / "n")
            assert notebook.size == SIZE
    assert notebook.characters == len(TEXT) and "".join(notebook.text()) == TEXT
    notebook.close()
    assert contents(folder / "n") == contents(make_notebook(folder / "whole"))


@given(start=st.integers(0, len(TEXT)))
@settings(max_examples=10, deadline=None)
def test_text_begins_at_any_character(tmp_path_factory: pytest.TempPathFactory, start: int) -> None:
    with Notebook(tmp_path_factory.mktemp("text"), size=20) as notebook:
        notebook.add(TEXT)
        assert "".join(notebook.text(start)) == TEXT[start:]


def test_long_texts_are_added_in_small_transactions(tmp_path: Path) -> None:
    with Notebook(tmp_path / "n") as notebook:
        statements: list[str] = []
        notebook._database.connection.set_trace_callback(statements.append)
        notebook.add("A sentence like any other. " * 10_000)
        assert notebook.characters == 270_000
        assert statements.count("BEGIN IMMEDIATE") == -(-270_000 // 65_536)


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


@pytest.mark.parametrize("acknowledged", [1, 40, 600])
def test_a_killed_process_loses_at_most_its_last_chunk(tmp_path: Path, acknowledged: int) -> None:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    folder = tmp_path / "n"
    command = [sys.executable, "-c", _CHILD, str(folder), str(SIZE), str(tmp_path / "text")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for _ in range(acknowledged):
            reached = int(child.stdout.readline())
        with Notebook(folder) as other:  # what is recorded can be searched, but not written to
            assert other.characters >= reached
            if reached > 100:
                assert any("heron" in passage.text for passage in other.search("heron"))
            for write in (lambda: other.add("x"), lambda: other.cut(0), lambda: next(other.record(["x"]))):
                with pytest.raises(UserError, match="in use"):
                    write()
        os.kill(child.pid, signal.SIGKILL)
        rest = child.stdout.read().split("\n")
        reached = max([reached, *map(int, rest[:-1])])
    with Notebook(folder) as notebook:
        assert reached <= notebook.characters <= reached + 13
        text = (TEXT * (notebook.characters // len(TEXT) + 1))[: notebook.characters]
        assert "".join(notebook.text()) == text
    assert contents(folder) == contents(make_notebook(tmp_path / "whole", text))


def test_only_one_notebook_writes_at_a_time(tmp_path: Path) -> None:
    with Notebook(tmp_path / "n") as first, Notebook(tmp_path / "n") as second:
        first.add("First. ")
        with pytest.raises(UserError, match="in use"):
            second.lock()
        assert second.search("first")[0].text == "First. "
        first.close()
        second.add("Second.")
        assert second.characters == 14
    for closed in (lambda: second.add("x"), lambda: second.search("x"), lambda: second.characters):
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
    for size in (-1, 0, 3, 4001, 1 << 70):
        with pytest.raises(UserError, match=r"too (short|long)"):
            Notebook(tmp_path / "n", size=size)
    with Notebook(tmp_path / "n") as notebook, pytest.raises(UserError, match="surrogate"):
        notebook.add("\ud83c")


def test_a_notebook_of_the_first_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "n"
    folder.mkdir()
    (folder / "notebook.json").write_text('{"format": "ttt-e2e notebook", "version": 1, "size": 80}\n')
    (folder / "text.txt").write_text(TEXT)
    for create in (True, False):
        with pytest.raises(UserError, match=r"version 1.*record its text again"):
            Notebook(folder, create=create)
    assert (folder / "text.txt").read_text() == TEXT and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", "notebook.db"]])
def test_a_notebook_that_was_killed_while_it_was_made_is_empty(tmp_path: Path, left: list[str]) -> None:
    folder = tmp_path / "n"
    folder.mkdir()
    for name in left:
        (folder / name).touch()
    with pytest.raises(UserError, match="no notebook"):
        Notebook(folder, create=False)
    assert contents(make_notebook(folder)) == contents(make_notebook(tmp_path / "expected"))


def execute(statement: str) -> Callable[[Path], object]:
    def executed(folder: Path) -> None:
        with sqlite3.connect(folder / "notebook.db") as database:
            database.execute(statement)
        database.close()

    return executed


@pytest.mark.parametrize(
    ("alter", "match"),
    [
        (lambda folder: os.truncate(folder / "notebook.db", 3000), "altered or damaged"),
        (lambda folder: os.truncate(folder / "notebook.db", 20_000), "altered or damaged"),
        (lambda folder: (folder / "notebook.db").write_bytes(b"A text, and not a database. " * 99), "damaged"),
        (execute("PRAGMA user_version = 9"), "version 9.*update"),
        (execute("PRAGMA user_version = 1"), "version 1.*record"),
        (execute("PRAGMA application_id = 9"), "not a notebook"),
        *((execute(f"UPDATE settings SET size = {size}"), "altered") for size in ("0", "NULL", "-1", "'x'", "9e9")),
        (execute("DELETE FROM settings"), "altered"),
        (execute("INSERT INTO settings SELECT * FROM settings"), "altered"),
        (execute("CREATE TRIGGER more AFTER INSERT ON passages BEGIN SELECT 1; END"), "altered"),
        (execute("DROP TABLE words"), "altered"),
        (execute("UPDATE passages SET text = replace(text, 'day 8 the heron', 'day 8 the horse')"), "altered"),
        (execute("UPDATE passages SET text = CAST(text AS BLOB)"), "altered"),
        (execute("UPDATE passages SET text = CAST(x'ff' AS TEXT)"), "altered"),
        (execute("UPDATE passages SET start = 'x' WHERE number = 1"), "altered"),
        (execute("UPDATE passages SET start = start + 1 WHERE number = 1"), "altered"),
        (execute("DELETE FROM passages WHERE number = 1"), "altered"),
    ],
)
def test_altered_notebooks_are_refused(tmp_path: Path, alter: Callable[[Path], None], match: str) -> None:
    folder = make_notebook(tmp_path / "n")
    contents(folder)  # is complete now, with its index
    alter(folder)
    with pytest.raises(UserError, match=match) as caught, Notebook(folder) as notebook:
        notebook.search("heron", 1000)
        list(notebook.text())
    assert "\n" not in str(caught.value)


def test_no_flipped_bit_ends_in_anything_but_a_sentence(tmp_path: Path) -> None:
    folder = make_notebook(tmp_path / "n", TEXT[:1500])
    contents(folder)
    path, rng = folder / "notebook.db", random.Random(1)
    data, schema = path.read_bytes(), path.read_bytes().index(b"CREATE")
    refused = 0
    for place in [rng.randrange(len(data)) for _ in range(80)] + [rng.randrange(schema, 4096) for _ in range(40)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            with Notebook(folder, create=False) as notebook:
                assert "".join(notebook.text()) == TEXT[:1500]
                assert all(passage.text in TEXT for passage in notebook.search("heron", 9))
        except UserError:
            refused += 1
    assert refused > 40


def test_a_full_disk_keeps_what_was_added(tmp_path: Path) -> None:
    with Notebook(tmp_path / "n", size=SIZE) as notebook:
        notebook.add(TEXT[:1000])
        notebook._database.connection.execute("PRAGMA max_page_count = 1")  # as small as it can be
        with pytest.raises(UserError, match=r"Cannot write to the notebook.*full.*is kept"):
            notebook.add(TEXT[1000:])
        assert notebook.characters == 1000
        notebook._database.connection.execute("PRAGMA max_page_count = 100000")
        notebook.add(TEXT[1000:])
    assert contents(tmp_path / "n") == contents(make_notebook(tmp_path / "whole"))


_LIMITED = """
import resource, sys
from pathlib import Path
from ttt_e2e.errors import UserError
from ttt_e2e.retrieval.notebook import Notebook
notebook = Notebook(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    while True:
        notebook.add("One sentence, and another one. " * 50)
        print(notebook.characters)
except UserError as error:
    print(error)
"""


def test_a_file_that_cannot_grow_keeps_what_was_added(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _LIMITED, str(tmp_path / "n")]
    *_, reached, error = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    assert error.startswith("Cannot write to the notebook")
    with Notebook(tmp_path / "n") as notebook:
        assert notebook.characters == int(reached) > 10_000
        notebook.add("And on.")


@given(halt=st.integers(1, 60))
@settings(max_examples=12, deadline=None)
def test_a_transaction_that_stops_halfway_is_undone(tmp_path_factory: pytest.TempPathFactory, halt: int) -> None:
    folder, reached = tmp_path_factory.mktemp("stopped"), 0
    with Notebook(folder / "n", size=SIZE) as notebook:
        inserts = 0

        def inserted(text: str) -> None:
            nonlocal inserts
            inserts += 1
            if inserts == halt:
                raise KeyboardInterrupt

        notebook._database.connection.create_function("inserted", 1, inserted)
        notebook._database.connection.execute(
            "CREATE TEMP TRIGGER halt AFTER INSERT ON passages BEGIN SELECT inserted(new.text); END"
        )
        while inserts < halt:
            try:
                notebook.add(TEXT[reached : reached + 97])
                reached += 97
            except (UserError, KeyboardInterrupt):
                break
        assert notebook.characters == reached and "".join(notebook.text()) == TEXT[:reached]
        notebook.add(TEXT[reached:])
    assert contents(folder / "n") == contents(make_notebook(folder / "whole"))


def test_without_fts5_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_notebook(tmp_path / "n")

    class WithoutFts5(sqlite3.Connection):
        def execute(self, statement: str, *values: object) -> sqlite3.Cursor:
            if "fts5" in statement or "words LIMIT" in statement:
                raise sqlite3.OperationalError("no such module: fts5")
            return super().execute(statement, *values)  # type: ignore[arg-type]

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *values, **named: connect(*values, factory=WithoutFts5, **named))
    for one in (folder, tmp_path / "new"):
        with pytest.raises(UserError, match="lacks FTS5"):
            Notebook(one)


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
    assert contents(tmp_path / "n") == contents(make_notebook(tmp_path / "whole", "Before. " + TEXT))


@pytest.mark.parametrize("copied", [True, False])
def test_replace_makes_a_copy_or_an_empty_notebook(tmp_path: Path, copied: bool) -> None:
    source = make_notebook(tmp_path / "source", TEXT[:700], 40)
    with Notebook(make_notebook(tmp_path / "n")) as notebook, Notebook(tmp_path / "n") as reader:
        with Notebook(source) as used, pytest.raises(UserError, match="source is in use"):
            used.lock()
            notebook.replace(source, 40)
        assert "".join(notebook.text()) == TEXT
        notebook.replace(source if copied else None, 40)
        assert notebook.size == 40 and "".join(reader.text()) == (TEXT[:700] if copied else "")
        notebook.add(TEXT[700:] if copied else TEXT)
    assert contents(tmp_path / "n") == contents(make_notebook(tmp_path / "expected", TEXT, 40))


def test_numbers_beyond_the_text_are_its_ends(tmp_path: Path) -> None:
    with Notebook(make_notebook(tmp_path / "n")) as notebook:
        assert "".join(notebook.text(-3)) == TEXT and "".join(notebook.text(1 << 70)) == ""
        assert len(notebook.search("heron", 1 << 70)) > 3
        notebook.cut(1 << 70)
        assert notebook.characters == len(TEXT)
        for start in (-1, 1 << 70):
            with pytest.raises(UserError, match="no text begins"):
                next(notebook.record(["x"], start=start))
        notebook.cut(-1)
        assert notebook.characters == 0 and notebook.search("heron") == []


def test_names_and_sizes() -> None:
    assert notebook_folder(Path("a/moby.session")) == Path("a/moby.session.notebook")
    assert (passage_size(12), passage_size(256), passage_size(8192)) == (20, 192, 400)
