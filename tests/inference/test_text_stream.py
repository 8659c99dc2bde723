"""Tokens as text, up to a stop string, however they are split."""

import pytest
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizer_kinds import kinds
from tokenizers import decoders, models, normalizers

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.text_stream import TextStream, partial_stop_length

BYTES = Tokenizer.train([""], 257)  # every byte is a token
TOKENIZER = Tokenizer.train(["the end of it. the end. ab abab Straße 雨 🌧️\n"] * 9, 290)


def written(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    parts = []
    for token in ids:
        parts.append(stream.add(token))
        if stream.stopped_by:
            break
    return [*parts, stream.flush()], stream


def before_stop(text: str, stop: list[str]) -> str:
    """The text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        if whole := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - len(max(whole, key=len))]
    return text


@given(
    text=st.text(st.sampled_from("ab. 雨🌧\n"), max_size=30),
    stop=st.lists(st.text(st.sampled_from("ab. 雨🌧\n"), min_size=1, max_size=5), max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    expected = before_stop(text, stop)
    for tokenizer in (BYTES, TOKENIZER):
        parts, _ = written(tokenizer, tokenizer.encode(text).tolist(), stop)
        assert "".join(parts) == expected
        for i in range(len(parts)):  # nothing is emitted that would have to be taken back
            assert expected.startswith("".join(parts[:i]))


@given(text=st.text(st.sampled_from("the nd.ab雨🌧"), min_size=1, max_size=12), cut=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_emitted_tokens_are_those_of_the_emitted_text(text: str, cut: int) -> None:
    ids = BYTES.encode(text).tolist()
    ids = ids[: len(ids) - cut]
    stream = TextStream(BYTES, ["the end", "ab雨"])
    since, emitted = [], []
    for token in ids:
        if not stream.has_pending:
            since = []
        since.append(token)
        emitted.append(stream.add(token))
        if stream.stopped_by:
            break
    emitted.append(stream.flush())
    before = BYTES.encode("".join(emitted)).tolist()
    kept = stream.emitted_tokens()
    assert before[len(before) - len(kept) :] == kept
    assert len(before) - len(kept) == len(ids[: len(emitted) - 1]) - len(since)


def test_token_that_a_stop_string_cuts_is_encoded_anew() -> None:
    ids = TOKENIZER.encode("ab the end").tolist()
    assert len(ids) < len("ab the end")
    stream = TextStream(TOKENIZER, "nd")
    emitted = "".join(stream.add(token) for token in ids)
    assert emitted == "ab the e" and stream.stopped_by
    last = TOKENIZER.decode(stream.emitted_tokens())
    assert last and "ab the e".endswith(last)


def test_partial_stop_string_is_pending() -> None:
    cases = [("The e", "end", 1), ("The en", "end", 2), ("The end", "end", 0), ("aab", "aabaac", 3), ("", "a", 0)]
    assert [partial_stop_length(text, ["xy", stop]) for text, stop, _ in cases] == [n for _, _, n in cases]
    stream = TextStream(BYTES, "end")
    assert [stream.add(token) for token in BYTES.encode("tene").tolist()] == ["t", "", "", "en"]
    assert stream.has_pending and stream.flush() == "e" and not stream.stopped_by


def sentencepiece_like() -> Tokenizer:
    """A tokenizer like that of Llama 2 and Mistral: words begin with a bar, unknown characters are spelled in bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", ".", "▁a", "▁b"]
    backend = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [("▁", "a"), ("▁", "b")], byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend)


@given(before=st.text("ab. 雨🌧", min_size=1, max_size=8), text=st.text("ab. 雨🌧", max_size=12))
@example(before="雨" * 6, text="雨雨a")  # more bytes than are looked at, and no whole number of characters
@settings(max_examples=100, deadline=None)
def test_text_of_a_tokenizer_with_byte_fallback(before: str, text: str) -> None:
    tokenizer = sentencepiece_like()
    begun, ids = tokenizer.encode(before).tolist(), tokenizer.encode(before + text).tolist()
    assume(ids[: len(begun)] == begun)
    stream = TextStream(tokenizer, context=begun)
    parts = [stream.add(token) for token in ids[len(begun) :]]
    assert tokenizer.decode(begun) + "".join(parts) + stream.flush() == tokenizer.decode(ids) == before + text


@pytest.mark.parametrize("kind", kinds())
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_stream_shows_what_the_whole_decodes_to(kind: str, data: st.DataObject) -> None:
    """With special tokens, spaces and empty tokens anywhere: as transformers decodes the whole text."""
    tokenizer = Tokenizer(kinds()[kind])
    text = data.draw(st.text("ab. the雨🌧\n", max_size=40))
    ids = tokenizer.encode(text).tolist()
    others = st.sampled_from([*tokenizer.special.values(), *tokenizer.encode("  a b").tolist()])
    for token in data.draw(st.lists(others, max_size=6)):
        ids.insert(data.draw(st.integers(0, len(ids))), token)
    context = ids[: data.draw(st.integers(0, len(ids)))]
    before, whole = tokenizer.decode(context), tokenizer.decode(ids)
    assume(not before.endswith("\ufffd") and whole.startswith(before))
    # Bytes that make no character spoil the whole run of bytes in the library, also what a stream has shown of it.
    assume("\ufffd" not in whole.rstrip("\ufffd"))
    stream = TextStream(tokenizer, context=context)
    shown = "".join([*(stream.add(token) for token in ids[len(context) :]), stream.flush()])
    assert before + shown == whole.rstrip("\ufffd")


@pytest.mark.parametrize("kind", ["llama2", "metaspace always False", "metaspace first True", "gpt4"])
def test_cut_token_is_encoded_as_a_part_of_its_word(kind: str) -> None:
    tokenizer = Tokenizer(kinds()[kind])
    begun, ids = tokenizer.encode("The street").tolist(), tokenizer.encode("The street again").tolist()
    stream = TextStream(tokenizer, "ain", context=begun)
    emitted, complete = "", begun
    for i, token in enumerate(ids[len(begun) :], len(begun) + 1):
        emitted += stream.add(token)
        complete = complete if stream.has_pending else ids[:i]
        if stream.stopped_by:
            break
    assert ids[: len(begun)] == begun and emitted == " ag" and stream.stopped_by
    assert tokenizer.decode(complete + stream.emitted_tokens()) == "The street ag"


def test_empty_stop_string_is_rejected() -> None:
    with pytest.raises(UserError, match="empty"):
        TextStream(BYTES, ["a", ""])
