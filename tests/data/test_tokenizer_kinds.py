"""Tokenizers of all kinds: a text that is encoded in pieces gives the tokens of the whole text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import TEXT, kinds

from ttt_e2e.data import tokenizer as module
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError

PIECES = [
    *("a", "the", " ", "  ", "\n", "\n\n", "\r\n", " \n \n", "\n ", "1", "23", "1234567", "again", " street was"),
    *("-", "_", ".", ", ", "'s", "é", "e\u0301", "雨", "。", "▁", "<tag>", "    ", "\n\tIt", "It", "aaaaaaa"),
    *("\u3000", "\x85", "\x1c"),
]


@st.composite
def long_texts(draw: st.DrawFn) -> str:
    """Of a few pieces, many times, and longer than what is looked at around a cut."""
    some = draw(st.lists(st.sampled_from(PIECES), min_size=2, max_size=9))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    return "".join(generator.choice(some, int(generator.integers(60, 160))))


@pytest.mark.parametrize("kind", kinds())
@settings(max_examples=6, deadline=None)
@given(text=long_texts(), segment_chars=st.integers(1, 12), chunk_chars=st.integers(1, 300))
def test_pieces_encode_like_the_whole(kind: str, text: str, segment_chars: int, chunk_chars: int) -> None:
    tokenizer = Tokenizer(kinds()[kind])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SEGMENT_CHARS", segment_chars)
        found = list(tokenizer.encode_chunks(text[i : i + chunk_chars] for i in range(0, len(text), chunk_chars)))
        one = [len(ids) for ids in tokenizer.encode_chunks([text])]
    expected = tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert np.concatenate(found).tolist() == expected
    assert [len(ids) for ids in found] == one  # the cuts depend on the text alone


@pytest.mark.parametrize("kind", kinds())
def test_no_kind_spells_a_special_token(kind: str) -> None:
    tokenizer = Tokenizer(kinds()[kind])
    unknown = {tokenizer.special.get(name) for name in ("<unk>", "[UNK]")}
    for token, number in tokenizer.special.items():
        for text in (token, f"the {token} again", f"a{token}{token}"):
            assert number in unknown or number not in tokenizer.encode(text)


@pytest.mark.parametrize("kind", kinds())
def test_ordinary_text_is_cut(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So memory does not grow with it."""
    monkeypatch.setattr(module, "SEGMENT_CHARS", 20)
    for text in (TEXT * 9, TEXT.replace("\n", " ") * 9):
        count = len(list(Tokenizer(kinds()[kind]).encode_chunks([text])))
        assert (count == 1) == (kind == "unigram without words")


@pytest.mark.parametrize("kind", ["gpt4", "llama2", "metaspace first False", "metaspace always True", "bert"])
def test_text_without_lines_at_its_full_length(kind: str) -> None:
    text = ("Over and over again, " * 4_000)[:80_000]
    tokenizer = Tokenizer(kinds()[kind])
    assert tokenizer.encode(text).tolist() == tokenizer.backend.encode(text, add_special_tokens=False).ids


def test_text_without_any_place_for_a_cut_is_encoded_whole_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = Tokenizer(kinds()["gpt4"]), "a" * 200_000
    assert tokenizer.encode(text).tolist() == tokenizer.backend.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(module, "MAX_SEGMENT_CHARS", 70_000)
    with pytest.raises(UserError, match="70,000 characters without a place"):
        tokenizer.encode(text)
