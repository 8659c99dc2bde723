"""Generating with passages of a notebook in the window."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_helpers import SIZE, TEXT

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session
from ttt_e2e.retrieval.generate import generate_with_notebook, prompt_with_passages
from ttt_e2e.retrieval.notebook import Notebook
from ttt_e2e.retrieval.passages import Passage

TOKENIZER = Tokenizer.train([TEXT], 300)


def passage(text: str, start: int) -> Passage:
    return Passage(text, start, start + len(text), start, start + len(text), 0, 1.0)


@given(room=st.integers(0, 160), sizes=st.lists(st.integers(1, 120), max_size=5))
@settings(max_examples=60, deadline=None)
def test_prompt_with_passages_keeps_to_its_tokens(room: int, sizes: list[int]) -> None:
    passages = [passage(TEXT[100 * i : 100 * i + size].strip() or "x", 100 * i) for i, size in enumerate(sizes)]
    prompt, sources = prompt_with_passages("Who came?", passages, TOKENIZER, room)
    ahead = prompt.removesuffix("Who came?")
    assert prompt != ahead and len(TOKENIZER.encode(ahead)) <= room
    assert all(source in passages and source.text in ahead for source in sources)
    assert sources == sorted(sources, key=passages.index)
    if not sources:
        assert ahead == ""
        assert all(len(TOKENIZER.encode(prompt_with_passages("", [p], TOKENIZER, 999)[0])) > room for p in passages)


def test_prompt_with_passages_puts_the_best_last() -> None:
    passages = [passage("The best.", 40), passage("The second.\n", 7)]
    prompt, sources = prompt_with_passages("And?", passages, TOKENIZER, 1000)
    assert prompt == "\n\n[7-19]\nThe second.\n\n[40-49]\nThe best.\n\nAnd?"
    assert sources == passages


@pytest.mark.parametrize("learn", [False, True])
def test_generate_with_notebook_uses_passages_and_learns_only_if_told(
    tmp_path: Path, learn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = (
        small_model(vocab_size=TOKENIZER.vocab_size, sliding_window=240, mini_batch_size=10)
        .eval()
        .requires_grad_(False)
    )
    session = Session(model, TOKENIZER)
    with Notebook(tmp_path / "n", size=SIZE) as notebook:
        list(session.read_stream(notebook.record([TEXT[:2000]])))
        kept, position = session.fork(), session.position
        forks: list[Session] = []
        fork = Session.fork
        monkeypatch.setattr(Session, "fork", lambda self: forks.append(made := fork(self)) or made)
        options = {"max_tokens": 8, "temperature": 0.7, "seed": 3}
        pieces, sources = generate_with_notebook(
            session, notebook, "On day 9 the", count=2, max_passage_tokens=200, learn=learn, **options
        )
        text = "".join(pieces)
        found = notebook.search("On day 9 the", 2)
    assert sources and sources == found[: len(sources)] and sources[0].text in TEXT
    assert session.position == position and np.array_equal(session.state().pending, kept.state().pending)
    assert not learned(session, kept)
    assert forks and any(learned(one, kept) for one in forks) == learn
    prompt, _ = prompt_with_passages("On day 9 the", found, TOKENIZER, 200)
    expected = kept if learn else fork(kept)
    expected.learn = learn
    assert text == "".join(expected.generate(prompt, **options))


def learned(one: Session, since: Session) -> bool:
    pairs = zip(one.state().read_state.loop.fast, since.state().read_state.loop.fast, strict=True)
    return any(not torch.equal(a, b) for w, v in pairs for a, b in zip(w, v, strict=True))


def test_generate_with_notebook_needs_a_tokenizer(tmp_path: Path) -> None:
    with Notebook(tmp_path / "n") as notebook, pytest.raises(UserError, match="needs a tokenizer"):
        generate_with_notebook(Session(small_model()), notebook, "x")
