"""What the tests of retrieval share: a text with words worth finding, and a notebook of it."""

from pathlib import Path

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


def notebook_files(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "text.txt").read_bytes(), (folder / "passages.jsonl").read_bytes()
