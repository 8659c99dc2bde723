"""What the tests of retrieval share: a text with words worth finding, and a notebook of it."""

import sqlite3
from pathlib import Path
from typing import Any

from ttt_e2e.retrieval.notebook import Notebook

ANIMALS = ("heron", "otter", "badger", "curlew", "weasel", "lapwing", "marten", "plover")
TEXT = "".join(
    f"On day {i} the {ANIMALS[i % 8]} came to the Straße by the lake — 雨が降った。 "
    f"It stayed {i * 7} minutes, and left.\n" + ("\n" if i % 5 == 0 else "")
    for i in range(60)
)
SIZE = 80


def make_notebook(folder: Path, text: str = TEXT, size: int = SIZE) -> Path:
    with Notebook(folder, size=size) as notebook:
        notebook.add(text)
    return folder


def contents(folder: Path) -> tuple[list[Any], list[Any]]:
    """The passages of a notebook, and every entry of its index with its place, as SQLite gives them."""
    with Notebook(folder, create=False) as notebook:
        notebook.search("x")  # whatever is not indexed yet, is now
    with sqlite3.connect(folder / "notebook.db") as database:
        passages = database.execute("SELECT * FROM passages ORDER BY number").fetchall()
        database.execute("CREATE VIRTUAL TABLE temp.entries USING fts5vocab(main, words, instance)")
        entries = database.execute("SELECT doc, offset, term FROM entries ORDER BY doc, offset").fetchall()
    database.close()
    return passages, entries
