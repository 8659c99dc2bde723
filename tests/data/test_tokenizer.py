"""Tokenizers: texts survive the round trip however they are split, and special tokens are never spelled."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from ttt_e2e.data import tokenizer as module
from ttt_e2e.data.text import standard_library_document
from ttt_e2e.data.tokenizer import BOS, Tokenizer
from ttt_e2e.errors import UserError

CODE = standard_library_document("json").text
TOKENIZER = Tokenizer.train([CODE], 1000)
texts = st.text(st.one_of(st.sampled_from("ab \n\r\té'9<|>"), st.characters(exclude_categories=["Cs"])), max_size=80)


@st.composite
def split_texts(draw: st.DrawFn) -> list[str]:
    return draw(st.lists(texts, max_size=6))


@settings(deadline=None)
@given(text=texts)
def test_round_trip(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(deadline=None)
@given(chunks=split_texts())
def test_chunks_encode_like_the_whole(chunks: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SEGMENT_CHARS", 3)
        whole = TOKENIZER.encode("".join(chunks))
        streamed = [np.empty(0, np.int64), *TOKENIZER.encode_chunks(chunks)]
    np.testing.assert_array_equal(np.concatenate(streamed), whole)


def test_cuts_between_lines_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.array(TOKENIZER.backend.encode(CODE).ids)
    monkeypatch.setattr(module, "SEGMENT_CHARS", 4000)
    np.testing.assert_array_equal(TOKENIZER.encode(CODE), whole)


def test_text_never_becomes_a_special_token(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for tokenizer in (TOKENIZER, Tokenizer.load(tmp_path)):
        ids = tokenizer.encode(f"a{BOS}b")
        assert tokenizer.bos == 0
        assert tokenizer.bos not in ids
        assert tokenizer.decode(ids) == f"a{BOS}b"
        assert tokenizer.decode([tokenizer.bos, *ids]) == f"a{BOS}b"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *[(c, -9.0) for c in "a</s>"]], 0), "34567"),
        (models.WordLevel({"?": 0, "<s>": 1, "</s>": 2, "a</s>": 3}, unk_token="?"), "3"),
        (models.WordPiece({"?": 0, "<s>": 1, "a": 2, "##<": 3, "##/s": 4, "##>": 5}, unk_token="?"), "2345"),
        (models.BPE({"<s>": 0, "</s>": 1, "a</s>": 2, "a": 3}, [], ignore_merges=True), "2"),
    ],
)
def test_no_model_spells_a_special_token(model: models.Model, expected: str) -> None:
    """Not by its own vocabulary either. expected: the ids of "a</s>", worked out by hand."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer, unchanged = Tokenizer(backend), backend.to_str()
    assert "".join(map(str, tokenizer.encode("a</s>"))) == expected
    for text in ("</s>", "<s>", " </s> a", "a <s>", "<s></s>"):
        assert not {*tokenizer.encode(text).tolist()} & {*tokenizer.special.values()}
    assert backend.to_str() == unchanged


def test_encode_gives_int64() -> None:
    assert TOKENIZER.encode("").dtype == TOKENIZER.encode("abc").dtype == np.int64
    assert TOKENIZER.encode("").shape == (0,)


def test_indentation_is_one_token() -> None:
    spaces = [TOKENIZER.encode("\n" + " " * width + "x = 1") for width in (4, 8)]
    assert len(spaces[0]) == len(spaces[1])


def test_tokenizer_survives_saving(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.digest == TOKENIZER.digest
    assert loaded.vocab_size == TOKENIZER.vocab_size == 1000
    np.testing.assert_array_equal(loaded.encode(CODE), TOKENIZER.encode(CODE))
    assert Tokenizer.train([CODE], 1000).digest == TOKENIZER.digest
    assert Tokenizer.train([CODE], 500).digest != TOKENIZER.digest


def test_load_an_existing_tokenizer(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no token that begins a document"):
        Tokenizer.load(tmp_path)
    backend.add_special_tokens(["<|begin_of_text|>"])
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos, tokenizer.vocab_size) == (3, 4)
    assert tokenizer.encode("a b a b").tolist() == [0, 1, 0, 1]


def test_a_special_token_begins_documents_even_where_an_ordinary_one_is_spelled_so() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "?": 2}, unk_token="?"))
    assert Tokenizer(backend).bos == 0
    backend.add_special_tokens(["<|endoftext|>"])
    assert Tokenizer(backend).bos == 3


def test_named_token_begins_documents(tmp_path: Path) -> None:
    """It stays so wherever the tokenizer is saved to."""
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).bos == 2
    for name, content in (
        ("special_tokens_map.json", {"bos_token": {"content": "<|im_start|>"}}),
        ("tokenizer_config.json", {"bos_token": "<|im_start|>"}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        named = Tokenizer.load(tmp_path)
        assert named.bos == 3 and named.end_ids == {3}
        (tmp_path / name).unlink()
    (tmp_path / "saved").mkdir()
    named.save(tmp_path / "saved" / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "saved").bos == 3
    for other in (None, "<s>"):  # as Qwen's, and one that the tokenizer does not have
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": other}))
        assert Tokenizer.load(tmp_path).bos == 2


def test_tokens_that_a_model_has_no_embedding_of_are_refused_in_texts_alone() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_tokens(["<b>"])
    tokenizer = Tokenizer(backend)
    tokenizer.leave_out(2)  # an ordinary token
    assert tokenizer.vocab_size == 4 and tokenizer.encode("a <b>").tolist() == [1, 3]
    tokenizer.leave_out(3)
    assert tokenizer.vocab_size == 3 and tokenizer.encode("a c").tolist() == [1, 2]
    with pytest.raises(UserError, match="'<b>', of which the model has no embedding"):
        tokenizer.encode("a <b>")


def test_bad_tokenizers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load("nowhere/tokenizer.json")
    for content in ("{", "{}", "[]", '{"model": {}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer"):
            Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="at least 257"):
        Tokenizer.train(["abc"], 256)
    with pytest.raises(UserError, match="surrogate"):
        TOKENIZER.encode("a\ud800b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="neither a file or folder here nor a tokenizer"):
        Tokenizer.load("no-such-owner/no-such-tokenizer")
