"""Documents of a notebook: their names, and where they begin."""

from pathlib import Path

import pytest

from ttt_e2e.errors import UserError
from ttt_e2e.retrieval.documents import document_name
from ttt_e2e.retrieval.notebook import Notebook
from ttt_e2e.retrieval.passages import format_passages

WHALE, CAPTAIN = "The whale was white. " * 9, "Nobody knew where the captain came from. " * 5


def recorded(folder: Path, *texts: tuple[str, str], continues: bool = True) -> Notebook:
    notebook = Notebook(folder, size=40)
    for text, name in texts:
        assert "".join(notebook.record([text], name=name, continues=continues)) == text
    return notebook


def passages(notebook: Notebook) -> list[tuple[object, ...]]:
    found = notebook.search("whale captain strange end", 100)
    return sorted((p.start, p.stop, p.start_byte, p.text, p.document, p.document_start) for p in found)


def test_passages_name_their_documents_and_stay_inside_them(tmp_path: Path) -> None:
    text = (WHALE, "moby.txt"), ("A strange end.", "moby.txt"), (CAPTAIN, "ahab.txt"), ("The end.", "")
    with recorded(tmp_path / "a", *text) as notebook:
        assert notebook.documents() == [(0, "moby.txt"), (203, "ahab.txt"), (203 + len(CAPTAIN), "")]
        found = passages(notebook)
        whole = "".join(notebook.text())
    assert whole == "".join(part for part, _ in text)
    ends = {"moby.txt": (0, 203), "ahab.txt": (203, 203 + len(CAPTAIN)), "": (203 + len(CAPTAIN), len(whole))}
    for start, stop, start_byte, words, document, document_start in found:
        first, last = ends[str(document)]
        assert first == document_start <= start < stop <= last and words == whole[start:stop] and start_byte == start
    assert {name for *_, name, _ in found} == {"moby.txt", "ahab.txt", ""}
    with Notebook(tmp_path / "a", create=False) as again:
        assert passages(again) == found
        shown = format_passages(again.search("captain", 1))
    assert shown.startswith("ahab.txt, characters 0 to ")


def test_two_texts_of_one_name_are_two_documents_unless_one_continues_the_other(tmp_path: Path) -> None:
    texts = (WHALE, "README.md"), (CAPTAIN, "README.md"), ("No name. ", ""), ("Nor this. ", "")
    with recorded(tmp_path / "a", *texts, continues=False) as notebook:
        last = len(WHALE + CAPTAIN)
        assert notebook.documents() == [(0, "README.md"), (len(WHALE), "README.md"), (last, "")]
        assert notebook.search("captain", 1)[0].place_in_document[0] == 0


def test_a_text_without_characters_leaves_no_document(tmp_path: Path) -> None:
    with recorded(tmp_path / "a", (WHALE, "moby.txt"), ("", ""), ("", "empty.txt")) as notebook:
        assert notebook.documents() == [(0, "moby.txt")]


def test_names_are_added_to_a_notebook_that_has_none(tmp_path: Path) -> None:
    """As an earlier version wrote it, also where that has left a reading unfinished: this has no name then."""
    with recorded(tmp_path / "a", (WHALE, "")) as notebook:
        assert "".join(notebook.record([WHALE, CAPTAIN], start=0, name="new.txt")) == WHALE + CAPTAIN
        assert notebook.documents() == []
        list(notebook.record([WHALE], name="new.txt"))
        assert notebook.documents() == [(len(WHALE + CAPTAIN), "new.txt")]
        notebook.cut(len(WHALE) + 3)
        assert "".join(notebook.text()) == WHALE + CAPTAIN[:3]


def test_a_name_is_one_short_line() -> None:
    assert document_name(" a\nb\x1b[1m.txt ") == r"a\nb\x1b[1m.txt"
    assert document_name("\ud800" * 100) == r"\ud800" * 33 + r"\u"


def test_a_text_that_is_cut_off_leaves_no_document(tmp_path: Path) -> None:
    """Cutting at a border, inside a document, and before one gives what was there, or what a fresh notebook has."""
    with recorded(tmp_path / "a", (WHALE, "moby.txt"), ("short", "b"), (CAPTAIN, "ahab.txt")) as notebook:
        for characters, kept in (
            (len(WHALE) + 5 + 50, [(WHALE, "moby.txt"), ("short", "b"), (CAPTAIN[:50], "ahab.txt")]),
            (len(WHALE) + 5, [(WHALE, "moby.txt"), ("short", "b")]),
            (len(WHALE) + 2, [(WHALE, "moby.txt"), ("sh", "b")]),
            (len(WHALE), [(WHALE, "moby.txt")]),
            (0, []),
        ):
            notebook.cut(characters)
            with recorded(tmp_path / str(characters), *kept) as fresh:
                assert notebook.documents() == fresh.documents()
                assert passages(notebook) == passages(fresh)


def test_a_notebook_without_names_is_that_of_earlier_versions(tmp_path: Path) -> None:
    with recorded(tmp_path / "a", (WHALE, ""), (CAPTAIN, "")) as notebook:
        tables = notebook._database.connection.execute("SELECT name FROM sqlite_master").fetchall()
        assert ("documents",) not in tables and notebook.documents() == []


def test_an_altered_name_is_noticed(tmp_path: Path) -> None:
    with recorded(tmp_path / "a", (WHALE, "moby.txt")) as notebook:
        notebook._database.connection.execute("UPDATE documents SET name = 'mopy.txt'")
    with pytest.raises(UserError, match="altered or damaged"):
        Notebook(tmp_path / "a", create=False)
