"""Cutting a text into passages: the same ones however the text was split."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.retrieval.passages import OpenPassage, Passage, Span, format_passages


def cut(chunks: list[str], size: int) -> tuple[list[Span], OpenPassage]:
    full, open_passage = [], OpenPassage()
    for chunk in chunks:
        more, open_passage = open_passage.add(chunk, size)
        full += more
    return full, open_passage


@given(
    text=st.text(st.sampled_from("ab é雨🌧.!。”\n\r\t"), max_size=600),
    size=st.integers(20, 60),
    cuts=st.lists(st.integers(0, 600), max_size=12),
)
@settings(max_examples=150, deadline=None)
def test_passages_do_not_depend_on_how_the_text_was_split(text: str, size: int, cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), len(text)]
    full, open_passage = cut([text], size)
    assert cut([text[a:b] for a, b in itertools.pairwise(ends)], size) == (full, open_passage)
    rest = open_passage.span()
    spans = full if rest is None else [*full, rest]
    data, reached, previous_digest = text.encode(), 0, ""
    for span in spans:
        part = text[span.start : span.stop]
        assert data[span.start_byte : span.stop_byte].decode() == part
        assert span == Span.of(part, span.start, span.start_byte, previous_digest)
        assert span.start <= reached < span.stop  # they overlap or touch, and advance
        assert span.stop - span.start <= 2 * size
        reached, previous_digest = span.stop, span.digest
    assert not text[reached:].strip()
    for one, following in itertools.pairwise(full):
        assert size < one.stop - one.start and one.stop - following.start <= size // 4
    if full:
        assert OpenPassage.after(full[-1], text[full[-1].start : full[-1].stop], size).start == open_passage.start


def test_passages_end_with_sentences_else_lines_else_anywhere() -> None:
    text = "It had rained. The street was wet. " * 20
    full, _ = cut([text], 80)
    assert all(text[: span.stop].endswith(". ") for span in full)
    assert all(text[: span.start].endswith(". ") for span in full[1:])
    lines = "no end of a sentence here\n" * 20
    assert all(lines[: span.stop].endswith("\n") for span in cut([lines], 50)[0])
    unbroken = "x" * 500
    assert {span.stop - span.start for span in cut([unbroken], 50)[0]} == {100}


def test_span_as_json_has_a_fixed_form() -> None:
    line = b'{"start": 1, "stop": 4, "start_byte": 1, "stop_byte": 5, "digest": "ab"}\n'
    assert Span(1, 4, 1, 5, "ab").to_json() == line
    assert Span.from_json(line) == Span(1, 4, 1, 5, "ab")


@pytest.mark.parametrize(
    "line",
    [
        b"[1, 2]",
        b'{"start": 1}',
        b'{"start": 1.5, "stop": 4, "start_byte": 1, "stop_byte": 5, "digest": "ab"}',
        b'{"start": 1, "stop": 4, "start_byte": 5, "stop_byte": 5, "digest": "ab"}',
        b'{"start": 1, "stop": 4, "start_byte": -1, "stop_byte": 5, "digest": "ab"}',
        b'{"start": 1',
    ],
)
def test_span_from_json_rejects_anything_else(line: bytes) -> None:
    with pytest.raises(ValueError):
        Span.from_json(line)


def test_format_passages_shows_score_and_position() -> None:
    passages = [Passage("The best.", 40, 49, 40, 49, 0, 1.0), Passage("The second.\n", 7, 19, 7, 19, 0, 1.0)]
    expected = "characters 40 to 49 (score 1)\nThe best.\n\ncharacters 7 to 19 (score 1)\nThe second."
    assert format_passages(passages) == expected
