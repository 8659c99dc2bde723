"""Cutting a text into passages: the same ones however the text was split."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.retrieval.passages import Excerpt, Passage, format_passages


def cut(chunks: list[str], size: int) -> list[Excerpt]:
    passages = [Excerpt()]
    for chunk in chunks:
        *full, rest = passages
        passages = [*full, *rest._replace(text=rest.text + chunk).cut(size)]
    return passages


@given(
    text=st.text(st.sampled_from("ab é雨🌧.!。”\n\r\t"), max_size=600),
    size=st.integers(20, 60),
    cuts=st.lists(st.integers(0, 600), max_size=12),
)
@settings(max_examples=150, deadline=None)
def test_passages_do_not_depend_on_how_the_text_was_split(text: str, size: int, cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), len(text)]
    passages = cut([text], size)
    assert cut([text[a:b] for a, b in itertools.pairwise(ends)], size) == passages
    data, reached = text.encode(), 0
    for passage in passages:
        assert text[passage.start : passage.stop] == passage.text
        assert data[passage.start_byte : passage.stop_byte].decode() == passage.text
        assert passage.start <= reached <= passage.stop  # they overlap or touch
        assert len(passage.text) <= 2 * size
        reached = passage.stop
    assert reached == len(text) and len(passages[-1].text) < 2 * size
    for one, following in itertools.pairwise(passages):
        assert size < len(one.text) and one.start < following.start and one.stop - following.start <= size // 4


def test_passages_end_with_sentences_else_lines_else_anywhere() -> None:
    text = "It had rained. The street was wet. " * 20
    *full, rest = cut([text], 80)
    assert all(passage.text.endswith(". ") for passage in full)
    assert all(text[: passage.start].endswith(". ") for passage in [*full[1:], rest])
    lines = "no end of a sentence here\n" * 20
    assert all(passage.text.endswith("\n") for passage in cut([lines], 50)[:-1])
    assert {len(passage.text) for passage in cut(["x" * 500], 50)[:-1]} == {100}


def test_format_passages_shows_score_and_position() -> None:
    passages = [Passage("The best.", 40, 49, 40, 49, 0, 1.0), Passage("The second.\n", 7, 19, 7, 19, 0, 1.0)]
    expected = "characters 40 to 49 (score 1)\nThe best.\n\ncharacters 7 to 19 (score 1)\nThe second."
    assert format_passages(passages) == expected
