"""Drawing a token, held against its definition; and tokens as text, up to a stop string, however they are split."""

import math
from collections import Counter

import pytest
import tokenizers
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.sampling import SamplingOptions, min_p, sample, top_k, top_p
from ttt_e2e.inference.text_stream import TextStream, partial_stop_length

BYTES = Tokenizer.train([""], 257)  # every byte is a token
TOKENIZER_CONFIG = Tokenizer.train(["the end of it. the end. ab abab Straße 雨 🌧️\n"] * 9, 290)


def literal(p: list[float], options: SamplingOptions) -> list[float]:
    """The probabilities that `sample` should draw with, token by token as the definitions have it."""
    weights = [q ** (1 / options.temperature) for q in p]
    p = [w / sum(weights) for w in weights]
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept = order[: options.top_k] if options.top_k else order
    mass, so_far, nucleus = sum(p[i] for i in kept), 0.0, []
    for i in kept:
        if so_far >= options.top_p * mass and options.top_p < 1:
            break
        nucleus.append(i)
        so_far += p[i]
    kept = [i for i in nucleus if p[i] >= options.min_p * p[order[0]]]
    return [p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(len(p))]


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(1.0, top_p=1),
        SamplingOptions(0.5, top_p=1),
        SamplingOptions(2.0, top_p=0.72),
        SamplingOptions(1.0, top_k=3, top_p=1),
        SamplingOptions(1.0, top_k=3, top_p=0.8),  # 0.8 of what top-k left is two tokens; of all it would be three
        SamplingOptions(1.0, top_p=1, min_p=0.3),
        SamplingOptions(3.0, top_k=4, top_p=0.9, min_p=0.65),
    ],
)
def test_tokens_are_drawn_as_defined(options: SamplingOptions) -> None:
    p = [0.05, 0.4, 0.15, 0.3, 0.1]
    generator = torch.Generator().manual_seed(options.seed)
    count = 3000
    drawn = Counter(sample(torch.tensor(p).log(), options, generator) for _ in range(count))
    expected = literal(p, options)
    assert 0 in expected or (options.top_p == 1 and not options.top_k and not options.min_p)
    for i, q in enumerate(expected):
        assert abs(drawn[i] / count - q) <= 5 * math.sqrt(q * (1 - q) / count)  # so nothing where it is zero


@given(
    logits=st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    k=st.integers(1, 12),
    p=st.floats(0.01, 1),
)
@settings(max_examples=60, deadline=None)
def test_filters_keep_the_likeliest(logits: list[float], k: int, p: float) -> None:
    p_V = torch.tensor(logits, dtype=torch.float64).softmax(-1).sort(descending=True)[0]
    for kept_V in (top_k(p_V, k), top_p(p_V, p), min_p(p_V, p)):
        assert kept_V[0] > 0 and float(kept_V.sum()) == pytest.approx(1)
        count = int((kept_V > 0).sum())
        torch.testing.assert_close(kept_V[:count], p_V[:count] / p_V[:count].sum())
    assert int((top_k(p_V, k) > 0).sum()) <= k
    nucleus = int((top_p(p_V, p) > 0).sum())
    assert p_V[:nucleus].sum() >= p - 1e-9 and (nucleus == 1 or p_V[: nucleus - 1].sum() < p + 1e-9)


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-9])
def test_cold_is_greedy(temperature: float) -> None:
    logits = torch.tensor([1.0, 88.0, 87.9, -math.inf])
    assert sample(logits, SamplingOptions(temperature), torch.Generator()) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_options_out_of_range(options: dict) -> None:
    (name,) = options
    with pytest.raises(UserError, match=name):
        SamplingOptions(**options)


# -- tokens as text ----------------------------------------------------------------------------------------------------


def written(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return [*pieces, stream.flush()], stream


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
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    expected = before_stop(text, stop)
    for tokenizer in (BYTES, TOKENIZER_CONFIG):
        pieces, _ = written(tokenizer, tokenizer.encode(text).tolist(), stop)
        assert "".join(pieces) == expected
        for i in range(len(pieces)):  # nothing is given out that would have to be taken back
            assert expected.startswith("".join(pieces[:i]))


@given(text=st.text(st.sampled_from("the nd.ab雨🌧"), min_size=1, max_size=12), cut=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_the_tokens_of_what_was_given_out(text: str, cut: int) -> None:
    ids = BYTES.encode(text).tolist()
    ids = ids[: len(ids) - cut]
    stream = TextStream(BYTES, ["the end", "ab雨"])
    since, given_out = [], []
    for token in ids:
        if not stream.has_pending:
            since = []
        since.append(token)
        given_out.append(stream.add(token))
        if stream.stopped:
            break
    given_out.append(stream.flush())
    before = BYTES.encode("".join(given_out)).tolist()
    kept = stream.emitted_tokens()
    assert before[len(before) - len(kept) :] == kept
    assert len(before) - len(kept) == len(ids[: len(given_out) - 1]) - len(since)


def test_a_token_that_a_stop_string_cuts_is_made_anew() -> None:
    ids = TOKENIZER_CONFIG.encode("ab the end").tolist()
    assert len(ids) < len("ab the end")
    stream = TextStream(TOKENIZER_CONFIG, "nd")
    given_out = "".join(stream.add(token) for token in ids)
    assert given_out == "ab the e" and stream.stopped
    assert (
        TOKENIZER_CONFIG.decode(stream.emitted_tokens())
        == "ab the e"[-len(TOKENIZER_CONFIG.decode(stream.emitted_tokens())) :]
    )


def test_what_may_be_the_beginning_of_a_stop_string_waits() -> None:
    assert partial_stop_length("The e", ["end", "x"]) == 1 and partial_stop_length("The en", ["end"]) == 2 and partial_stop_length("The end", ["end"]) == 0
    assert partial_stop_length("aab", ["aabaac"]) == 3 and partial_stop_length("", ["a"]) == 0
    stream = TextStream(BYTES, "end")
    assert [stream.add(token) for token in BYTES.encode("tene").tolist()] == ["t", "", "", "en"]
    assert stream.has_pending and stream.flush() == "e" and not stream.stopped


def sentencepiece_like() -> Tokenizer:
    """As Llama 2 and Mistral have it: words begin with a bar, what is not in the vocabulary is spelled in bytes."""
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
def test_text_of_a_tokenizer_that_falls_back_on_bytes(before: str, text: str) -> None:
    tokenizer = sentencepiece_like()
    begun, ids = tokenizer.encode(before).tolist(), tokenizer.encode(before + text).tolist()
    assume(ids[: len(begun)] == begun)
    stream = TextStream(tokenizer, context=begun)
    pieces = [stream.add(token) for token in ids[len(begun) :]]
    assert tokenizer.decode(begun) + "".join(pieces) + stream.flush() == tokenizer.decode(ids) == before + text


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        TextStream(BYTES, ["a", ""])
