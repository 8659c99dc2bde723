"""Searching a notebook: by words, by meaning, and with indexes that are kept and rebuilt."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from retrieval_helpers import ANIMALS, SIZE, TEXT, make_notebook, notebook_files

from ttt_e2e.errors import UserError
from ttt_e2e.retrieval.notebook import Notebook
from ttt_e2e.retrieval.passages import Passage
from ttt_e2e.retrieval.search_index import load_embed


def test_search_finds_passages_by_their_words(tmp_path: Path) -> None:
    with Notebook(tmp_path / "n", size=SIZE) as notebook:
        assert notebook.search("heron") == []
        notebook.add(TEXT)
        for query in ("the OTTER on day 33?", "day 33"):
            best = notebook.search(query)[0]
            assert "On day 33 the otter" in best.text
            assert TEXT[best.start : best.stop] == best.text
            assert TEXT.encode()[best.start_byte : best.stop_byte].decode() == best.text
        found = notebook.search("heron curlew", 5)
        assert len(found) == 5 and [p.score for p in found] == sorted((p.score for p in found), reverse=True)
        assert all("heron" in p.text or "curlew" in p.text for p in notebook.search("heron curlew", 1000))
        assert notebook.search("雨", 1) and notebook.search("降", 1)  # no spaces there
        assert notebook.search("unheard-of") == notebook.search("?!") == []
        with pytest.raises(UserError, match="at least one"):
            notebook.search("heron", 0)


def test_search_finds_text_added_later_and_the_open_passage(tmp_path: Path) -> None:
    with Notebook(tmp_path / "n") as notebook:
        notebook.add("...")  # no word at all
        assert notebook.search("zebra") == []
        notebook.add(TEXT)
        assert notebook.search("zebra") == []
        notebook.add("Last came a zebra.")
        (found,) = notebook.search("zebra")
        assert found.stop == notebook.characters
        notebook.add("\n\n")
        assert [p.text for p in notebook.search("zebra")] == [found.text + "\n\n"]


def test_the_index_is_kept_and_rebuilt_if_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bm25s

    folder = make_notebook(tmp_path / "n")
    builds = 0
    index = bm25s.BM25.index

    def watched(self: object, *args: object, **options: object) -> None:
        nonlocal builds
        builds += 1
        index(self, *args, **options)

    monkeypatch.setattr(bm25s.BM25, "index", watched)

    def search() -> list[Passage]:
        with Notebook(folder) as notebook:
            return notebook.search("the otter on day 33")

    expected = search()
    assert search() == expected and builds == 1
    for name in sorted(file.name for file in (folder / "index").iterdir()):
        path = folder / "index" / name
        path.write_bytes(path.read_bytes()[:-1])
        builds = 0
        assert search() == expected and builds == 1
    left = folder / ".index.123.part"  # of a killed process
    left.mkdir()
    search()
    assert not left.exists()


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("bm25s", lambda folder: Notebook(folder).search("heron")),
        ("model2vec", lambda folder: load_embed(folder)),
    ],
)
def test_missing_extras_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, use: Callable[[Path], object]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"need.* {module}: pip install"):
        use(make_notebook(tmp_path / "n"))


class Synonyms:
    """An embedding that knows that a polecat is what `polecat` says; it counts the texts."""

    def __init__(self, polecat: str = "weasel") -> None:
        self.polecat = polecat
        self.texts = 0

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.texts += len(texts)
        texts = [text.replace("polecat", self.polecat).replace("embedding", self.polecat) for text in texts]
        return np.array([[text.count(animal) for animal in ANIMALS] for text in texts])


def test_an_embedding_finds_passages_that_share_no_word(tmp_path: Path) -> None:
    folder, embed = make_notebook(tmp_path / "n"), Synonyms()
    with Notebook(folder) as notebook:
        assert notebook.search("polecat") == []
    with Notebook(folder, embed=embed) as notebook:
        found = notebook.search("polecat", 50)
        assert found and all("weasel" in p.text for p in found)
        assert found[0].score == pytest.approx(1 / 61)
        assert "day 36 the weasel" in notebook.search("polecat day 36", 1)[0].text  # words and meaning together
    (folder / "vectors.safetensors").write_bytes(b"broken")
    with Notebook(folder, embed=embed) as notebook:
        assert notebook.search("polecat", 50) == found
    with (
        Notebook(folder, embed=lambda texts: np.zeros(3)) as notebook,
        pytest.raises(UserError, match="one row per text"),
    ):
        notebook.search("polecat")


def test_vectors_of_full_passages_are_kept(tmp_path: Path) -> None:
    folder, embed, other = make_notebook(tmp_path / "n"), Synonyms(), Synonyms("otter")

    def embedded(embed: Synonyms, more: str = "") -> int:
        embed.texts = 0
        with Notebook(folder, embed=embed) as notebook:
            notebook.add(more)
            notebook.search("polecat")
        return embed.texts

    probe_and_query = 2
    every = embedded(embed) - probe_and_query
    assert every == len(notebook_files(folder)[1].splitlines()) + 1
    assert embedded(embed) == probe_and_query + 1  # the passage that is not full
    assert embedded(embed, "A weasel again, and again. " * 10) < probe_and_query + 8
    assert embedded(other) > every  # a different embedding
    assert embedded(other) == probe_and_query + 1
