"""The notebook: the same passages however the text came, kept through crashes, found again, and shown to a model."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from helpers import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session
from ttt_e2e.retrieval import notebook as notebook_module
from ttt_e2e.retrieval.notebook import (
    Notebook,
    generate_with_notebook,
    listing,
    notebook_folder,
    passage_size,
    prompt_with_passages,
)
from ttt_e2e.retrieval.passages import OpenPassage, Passage, Place
from ttt_e2e.retrieval.search_index import load_embed

ANIMALS = ("heron", "otter", "badger", "curlew", "weasel", "lapwing", "marten", "plover")
TEXT = "".join(
    f"On day {i} the {ANIMALS[i % 8]} came to the Straße by the lake — 雨が降った。 "
    f"It stayed {i * 7} minutes, and left.\n" + ("\n" if i % 5 == 0 else "")
    for i in range(60)
)
SIZE = 80


def files(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "text.txt").read_bytes(), (folder / "passages.jsonl").read_bytes()


def noted(folder: Path, text: str = TEXT) -> Path:
    with Notebook(folder, size=SIZE) as notebook:
        notebook.add(text)
    return folder


# -- passages ----------------------------------------------------------------------------------------------------------


def places(pieces: list[str], size: int) -> tuple[list[Place], OpenPassage]:
    full, unfilled = [], OpenPassage()
    for piece in pieces:
        more, unfilled = unfilled.add(piece, size)
        full += more
    return full, unfilled


@given(
    text=st.text(st.sampled_from("ab é雨🌧.!。”\n\r\t"), max_size=600),
    size=st.integers(20, 60),
    cuts=st.lists(st.integers(0, 600), max_size=12),
)
@settings(max_examples=150, deadline=None)
def test_any_pieces_give_the_same_passages(text: str, size: int, cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), len(text)]
    full, unfilled = places([text], size)
    assert places([text[a:b] for a, b in itertools.pairwise(ends)], size) == (full, unfilled)
    rest = unfilled.place()
    every = full if rest is None else [*full, rest]
    data, reached, before = text.encode(), 0, ""
    for place in every:
        part = text[place.start : place.stop]
        assert data[place.start_byte : place.stop_byte].decode() == part
        assert place == Place.of(part, place.start, place.start_byte, before)
        assert place.start <= reached < place.stop  # they overlap or touch, and go on
        assert place.stop - place.start <= 2 * size
        reached, before = place.stop, place.digest
    assert not text[reached:].strip()
    for one, following in itertools.pairwise(full):
        assert size < one.stop - one.start and one.stop - following.start <= size // 4
    if full:
        assert OpenPassage.after(full[-1], text[full[-1].start : full[-1].stop], size).start == unfilled.start


def test_passages_end_with_sentences_where_there_are_any() -> None:
    text = "It had rained. The street was wet. " * 20
    full, _ = places([text], 80)
    assert all(text[: place.stop].endswith(". ") for place in full)
    assert all(text[: place.start].endswith(". ") for place in full[1:])
    lines = "no end of a sentence here\n" * 20
    assert all(lines[: place.stop].endswith("\n") for place in places([lines], 50)[0])
    unbroken = "x" * 500
    assert {place.stop - place.start for place in places([unbroken], 50)[0]} == {100}


# -- files -------------------------------------------------------------------------------------------------------------


@given(cuts=st.lists(st.integers(0, len(TEXT)), max_size=6), reopen=st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_pieces_give_the_same_files(
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
    assert files(folder) == files(noted(tmp_path_factory.mktemp("whole")))


def test_long_pieces_are_noted_in_small_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert len(notebook._unfilled.text) < 2 * notebook.size
    assert longest <= 1 << 16


@given(lines_kept=st.integers(0, 10_000), text_lost=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_whatever_was_not_written_follows_from_the_text(
    tmp_path_factory: pytest.TempPathFactory, lines_kept: int, text_lost: int
) -> None:
    # A process that is killed may leave half a character, and passages that end anywhere before the text does.
    folder = noted(tmp_path_factory.mktemp("killed"))
    text, lines = files(folder)
    last = json.loads(lines.splitlines()[-1])["stop_byte"]
    data = text[: max(last, len(text) - text_lost)]
    (folder / "text.txt").write_bytes(data)
    (folder / "passages.jsonl").write_bytes(lines[:lines_kept])
    with Notebook(folder) as notebook:
        kept = data.decode(errors="ignore")
        assert notebook.characters == len(kept)
        notebook.add(TEXT[len(kept) :])
    assert files(folder) == (text, lines)


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
def test_a_killed_process_loses_at_most_its_last_piece(tmp_path: Path, acknowledged: int) -> None:
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
    assert files(folder) == files(noted(tmp_path / "whole", text))


def test_one_at_a_time(tmp_path: Path) -> None:
    with Notebook(tmp_path / "n") as first:
        first.add("First. ")
        with pytest.raises(UserError, match="in use"):
            Notebook(tmp_path / "n")
    with Notebook(tmp_path / "n") as second:
        assert second.characters == 7
    for closed in (lambda: second.add("x"), lambda: second.search("x")):
        with pytest.raises(UserError, match="is closed"):
            closed()


def test_nothing_else_is_taken_for_a_notebook(tmp_path: Path) -> None:
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


def replace(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


@pytest.mark.parametrize(
    ("alter", "match"),
    [
        (lambda folder: os.truncate(folder / "text.txt", 3000), "truncated"),
        (lambda folder: os.truncate(folder / "notebook.json", 20), "truncated"),
        (lambda folder: replace(folder / "notebook.json", b'"version": 1', b'"version": 9'), "version 1"),
        (lambda folder: replace(folder / "text.txt", b"day 8 the heron", b"day 8 the horse"), "altered"),
        (lambda folder: replace(folder / "text.txt", b"day 8 the heron", b"day 8 the hero\xff"), "altered"),
        (lambda folder: replace(folder / "text.txt", b"day 59", b"day 60"), "altered"),
        (lambda folder: replace(folder / "passages.jsonl", b'{"start": 0', b'{"start": 1'), "altered"),
        (lambda folder: replace(folder / "passages.jsonl", b'{"start": 0', b'{"stort": 0'), "altered"),
        (lambda folder: replace(folder / "passages.jsonl", b'{"start": 0', b'{"start": 0.5'), "altered"),
        (lambda folder: replace(folder / "passages.jsonl", b"}\n{", b",\n{"), "altered"),
    ],
)
def test_altered_files_are_refused(tmp_path: Path, alter: Callable[[Path], None], match: str) -> None:
    folder = noted(tmp_path / "n", TEXT + "The last passage is full with this. " * 4)
    alter(folder)
    with pytest.raises(UserError, match=match) as caught, Notebook(folder) as notebook:
        notebook.search("heron")
    assert "\n" not in str(caught.value)


def test_a_full_disk_keeps_what_was_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = noted(tmp_path / "n", TEXT[:1000])

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
def test_stopped_in_the_middle_of_any_write(tmp_path_factory: pytest.TempPathFactory, write: int, part: float) -> None:
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
    assert files(folder) == files(noted(tmp_path_factory.mktemp("whole")))


def test_a_text_that_is_read_again_is_not_noted_twice(tmp_path: Path) -> None:
    pieces = [TEXT[i : i + 333] for i in range(0, len(TEXT), 333)]
    with Notebook(tmp_path / "n", size=SIZE) as notebook:
        notebook.add("Before. ")
        reading = notebook.noting(pieces)
        assert [next(reading) for _ in range(3)] == pieces[:3]
        assert notebook.characters == 8 + 999  # a piece is noted before it is handed on
    with Notebook(tmp_path / "n") as notebook:
        assert "".join(notebook.noting(pieces, at=8)) == TEXT
        assert notebook.characters == 8 + len(TEXT)
        with pytest.raises(UserError, match=f"holds {len(TEXT) - 50} characters more"):
            list(notebook.noting([TEXT[:50]], at=8))
        with pytest.raises(UserError, match="another text"):
            list(notebook.noting(["A different text."], at=8))
        with pytest.raises(UserError, match="nothing begins"):
            next(notebook.noting(["x"], at=notebook.characters + 1))
        assert notebook.characters == 8 + len(TEXT)
    assert files(tmp_path / "n") == files(noted(tmp_path / "whole", "Before. " + TEXT))


# -- searching ---------------------------------------------------------------------------------------------------------


def test_what_was_noted_is_found(tmp_path: Path) -> None:
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
        with pytest.raises(UserError, match="one at least"):
            notebook.search("heron", 0)


def test_what_is_noted_later_is_found_too_and_the_end_before_its_passage_is_full(tmp_path: Path) -> None:
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


def test_the_index_is_kept_and_made_anew_where_it_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bm25s

    folder = noted(tmp_path / "n")
    made = 0
    index = bm25s.BM25.index

    def watched(self: object, *args: object, **options: object) -> None:
        nonlocal made
        made += 1
        index(self, *args, **options)

    monkeypatch.setattr(bm25s.BM25, "index", watched)

    def search() -> list[Passage]:
        with Notebook(folder) as notebook:
            return notebook.search("the otter on day 33")

    expected = search()
    assert search() == expected and made == 1
    for name in sorted(file.name for file in (folder / "index").iterdir()):
        path = folder / "index" / name
        path.write_bytes(path.read_bytes()[:-1])
        made = 0
        assert search() == expected and made == 1
    left = folder / ".index.123.part"  # by a process that was killed
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
def test_missing_extras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, use: Callable[[Path], object]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"need.* {module}: pip install"):
        use(noted(tmp_path / "n"))


class Synonyms:
    """An embedding that knows that a polecat is what `polecat` says; it counts what it was given."""

    def __init__(self, polecat: str = "weasel") -> None:
        self.polecat = polecat
        self.texts = 0

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.texts += len(texts)
        texts = [text.replace("polecat", self.polecat).replace("embeds", self.polecat) for text in texts]
        return np.array([[text.count(animal) for animal in ANIMALS] for text in texts])


def test_an_embedding_finds_what_shares_no_word(tmp_path: Path) -> None:
    folder, embed = noted(tmp_path / "n"), Synonyms()
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
        pytest.raises(UserError, match="one row a text"),
    ):
        notebook.search("polecat")


def test_what_was_embedded_once_is_not_embedded_again(tmp_path: Path) -> None:
    folder, embed, other = noted(tmp_path / "n"), Synonyms(), Synonyms("otter")

    def embedded(embed: Synonyms, more: str = "") -> int:
        embed.texts = 0
        with Notebook(folder, embed=embed) as notebook:
            notebook.add(more)
            notebook.search("polecat")
            assert notebook._unfilled.place() is not None
        return embed.texts

    probe_and_query = 2
    every = embedded(embed) - probe_and_query
    assert every == len(files(folder)[1].splitlines()) + 1
    assert embedded(embed) == probe_and_query + 1  # the passage that is not full
    assert embedded(embed, "A weasel again, and again. " * 10) < probe_and_query + 8
    assert embedded(other) > every  # it embeds otherwise
    assert embedded(other) == probe_and_query + 1


# -- into the window ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 300)


def passage(text: str, start: int, score: float = 1.0) -> Passage:
    return Passage(text, start, start + len(text), start, start + len(text), 0, score)


@given(room=st.integers(0, 160), sizes=st.lists(st.integers(1, 120), max_size=5))
@settings(max_examples=60, deadline=None)
def test_passages_keep_to_their_room(room: int, sizes: list[int]) -> None:
    tokenizer = _TOKENIZER
    passages = [passage(TEXT[100 * i : 100 * i + size].strip() or "x", 100 * i) for i, size in enumerate(sizes)]
    prompt, sources = prompt_with_passages("Who came?", passages, tokenizer, room)
    ahead = prompt.removesuffix("Who came?")
    assert prompt != ahead and len(tokenizer.encode(ahead)) <= room
    assert all(source in passages and source.text in ahead for source in sources)
    assert sources == sorted(sources, key=passages.index)
    if not sources:
        assert ahead == ""
        assert all(len(tokenizer.encode(prompt_with_passages("", [p], tokenizer, 999)[0])) > room for p in passages)


_TOKENIZER = Tokenizer.train([TEXT], 300)


def test_the_best_passage_comes_last_and_each_with_its_place(tokenizer: Tokenizer) -> None:
    passages = [passage("The best.", 40), passage("The second.\n", 7)]
    prompt, sources = prompt_with_passages("And?", passages, tokenizer, 1000)
    assert prompt == "\n\n[7-19]\nThe second.\n\n[40-49]\nThe best.\n\nAnd?"
    assert sources == passages
    assert listing(passages) == "characters 40 to 49 (score 1)\nThe best.\n\ncharacters 7 to 19 (score 1)\nThe second."


@pytest.mark.parametrize("learn", [False, True])
def test_the_model_writes_on_with_what_was_noted_and_learns_only_if_asked(
    tmp_path: Path, tokenizer: Tokenizer, learn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = (
        small_model(vocab_size=tokenizer.vocab_size, sliding_window=240, mini_batch_size=10)
        .eval()
        .requires_grad_(False)
    )
    session = Session(model, tokenizer)
    with Notebook(tmp_path / "n", size=SIZE) as notebook:
        list(session.read_pieces(notebook.noting([TEXT[:2000]])))
        kept, position = session.fork(), session.position
        forks: list[Session] = []
        fork = Session.fork
        monkeypatch.setattr(Session, "fork", lambda self: forks.append(made := fork(self)) or made)
        options = {"max_tokens": 8, "temperature": 0.7, "seed": 3}
        pieces, sources = generate_with_notebook(
            session, notebook, "On day 9 the", count=2, room_tokens=200, learn=learn, **options
        )
        text = "".join(pieces)
        found = notebook.search("On day 9 the", 2)
    assert sources and sources == found[: len(sources)] and sources[0].text in TEXT
    assert session.position == position and np.array_equal(session._pending, kept._pending)
    assert not learned(session, kept)
    assert forks and any(learned(one, kept) for one in forks) == learn
    prompt, _ = prompt_with_passages("On day 9 the", found, tokenizer, 200)
    expected = kept if learn else fork(kept)
    expected.learn = learn
    assert text == "".join(expected.generate(prompt, **options))


def learned(one: Session, since: Session) -> bool:
    pairs = zip(one._state.loop.fast, since._state.loop.fast, strict=True)
    return any(not torch.equal(a, b) for w, v in pairs for a, b in zip(w, v, strict=True))


def test_names_and_sizes(tmp_path: Path) -> None:
    with Notebook(tmp_path / "n") as notebook, pytest.raises(UserError, match="needs a tokenizer"):
        generate_with_notebook(Session(small_model()), notebook, "x")
    assert notebook_folder(Path("a/moby.session")) == Path("a/moby.session.notebook")
    assert (passage_size(12), passage_size(256), passage_size(8192)) == (20, 192, 400)
