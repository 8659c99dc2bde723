"""A notebook whose index was damaged is refused: it never finds fewer passages without a word."""

import random
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import pytest
from retrieval_helpers import ANIMALS, SIZE, TEXT, make_notebook

from ttt_e2e.errors import UserError
from ttt_e2e.retrieval.notebook import Notebook

QUERIES = [*ANIMALS, "stayed lake", "雨"]


def found(folder: Path) -> list[list[tuple[int, float]]]:
    with Notebook(folder, create=False) as notebook:
        return [[(one.number, one.score) for one in notebook.search(query, 99)] for query in QUERIES]


def damage(folder: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(folder / "notebook.db")) as database, database:
        database.execute(statement, values)


def test_no_flipped_bit_of_the_index_hides_a_passage(tmp_path: Path) -> None:
    folder, rng = make_notebook(tmp_path / "n", TEXT[:2000]), random.Random(1)
    expected, path = found(folder), folder / "notebook.db"
    assert found(folder) == expected
    intact, hidden = path.read_bytes(), 0
    with closing(sqlite3.connect(path)) as database:
        rows = [("words_data", "block", *row) for row in database.execute("SELECT id, block FROM words_data")]
        rows += [("words_docsize", "sz", *row) for row in database.execute("SELECT id, sz FROM words_docsize")]
    for table, column, number, block in rng.choices(rows, [len(row[3]) for row in rows], k=25):
        flipped = bytearray(block)
        flipped[rng.randrange(len(block))] ^= 1 << rng.randrange(8)
        path.write_bytes(intact)
        damage(folder, f"UPDATE {table} SET {column} = ? WHERE id = ?", bytes(flipped), number)
        with pytest.raises(UserError, match="altered or damaged"):
            found(folder)
        damage(folder, "DELETE FROM index_digest")
        with suppress(UserError):
            hidden += found(folder) != expected
    assert hidden  # which only the digest shows


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE settings SET indexed = indexed + 64",
        "DELETE FROM words_data WHERE id = (SELECT max(id) FROM words_data)",
        "UPDATE words_docsize SET id = -id",
        "UPDATE words_data SET block = 7 WHERE id = 10",
        "UPDATE words_idx SET term = x'30ff'",
        "UPDATE words_config SET v = 3",
        "UPDATE index_digest SET digest = NULL",
    ],
)
def test_a_damaged_index_is_neither_searched_nor_added_to(tmp_path: Path, change: str) -> None:
    folder = make_notebook(tmp_path / "n", TEXT[:2000])
    found(folder)
    found(folder)  # which checks it
    damage(folder, change)
    for use in (lambda notebook: notebook.search("heron"), lambda notebook: notebook.add(TEXT)):
        with pytest.raises(UserError, match="altered or damaged"), Notebook(folder) as notebook:
            use(notebook)


def test_an_index_that_changes_is_checked_again(tmp_path: Path) -> None:
    """What another connection adds is found; what it damages is refused."""
    folder = make_notebook(tmp_path / "n", TEXT[:2000])
    with Notebook(folder) as notebook:
        assert not notebook.search("quince")
        with Notebook(folder) as other:
            other.add(" A quince. " * SIZE)
            assert len(other.search("quince", 99)) == len(notebook.search("quince", 99)) > 1
            other.search("heron")
        damage(folder, "UPDATE words_docsize SET sz = x'01'")
        with pytest.raises(UserError, match="altered or damaged"):
            notebook.search("quince")


def test_a_notebook_without_a_digest_gets_one_when_text_is_added(tmp_path: Path) -> None:
    """As older versions made them."""
    folder = make_notebook(tmp_path / "n", TEXT[:2000])
    expected = found(folder)
    damage(folder, "DROP TABLE index_digest")
    assert found(folder) == expected
    with Notebook(folder) as notebook:
        notebook.add(TEXT[2000:])
    assert found(folder) == found(make_notebook(tmp_path / "whole", TEXT))
    damage(folder, "UPDATE words_docsize SET sz = x'01'")
    with pytest.raises(UserError, match="altered or damaged"):
        found(folder)
