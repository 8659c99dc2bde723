"""Grammars in a session pool: each is for one text, and nothing else changes."""

import json
from typing import Any

import pytest
from helpers import small_model
from inference_helpers import tokens_of
from pool_helpers import F64, run

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.grammar import Grammar, GrammarCompiler, Matcher, json_rule
from ttt_e2e.inference.pool_requests import Done, Event, Token
from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_pool import SessionPool

pytest.importorskip("llguidance", reason="the extra serve is not installed")

TOKENIZER = Tokenizer.train(['{"name": "a"} [true, false]'], 270)
MODEL = small_model(F64, vocab_size=TOKENIZER.vocab_size).requires_grad_(False)
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size)
PEOPLE = {"type": "array", "items": {"enum": ["Anna", "Ben", 7]}, "minItems": 2, "maxItems": 2}


def compiled(schema: dict[str, Any]) -> Grammar:
    return COMPILER.compile(f"start: {json_rule(schema)}")


def tokens_by_id(events: list[Event]) -> dict[int, list[Token]]:
    found: dict[int, list[Token]] = {event.id: [] for event in events}
    for event in events:
        if isinstance(event, Token):
            found[event.id].append(event)
    return found


def generate(grammars: list[Grammar | None], count: int, **options: Any) -> list[tuple[list[Token], Matcher | None]]:
    """Texts side by side, each with the grammar in its place."""
    pool, matchers = SessionPool(Session(MODEL, TOKENIZER, dtype=F64), max_batch=3), []
    for number, grammar in enumerate(grammars):
        matchers.append(grammar.matcher() if grammar else None)
        given = SamplingOptions(seed=number, **options)
        ids = tokens_of(9, number) % TOKENIZER.vocab_size
        pool.submit_generate(pool.add(), ids, max_tokens=count, options=given, top_logprobs=1, matcher=matchers[-1])
    events = run(pool)
    assert [event.error for event in events if isinstance(event, Done)] == [None] * len(grammars)
    return [*zip(tokens_by_id(events).values(), matchers, strict=True)]


def test_texts_without_a_grammar_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: their tokens, and the log-probabilities, which show the logits."""
    monkeypatch.setattr(TOKENIZER, "end_ids", frozenset({TOKENIZER.bos}))
    endless = compiled({"type": "string"})  # so that the calls of the model have the same rows
    bias = {"temperature": 1.3, "logit_bias": {TOKENIZER.bos: -100, TOKENIZER.encode('"')[0]: -100}}
    alone = generate([None] * 5, 12, **bias)
    beside = generate([None, endless, None, endless, None], 12, **bias)
    for number in (0, 2, 4):
        assert beside[number][0] == alone[number][0] and len(alone[number][0]) == 12
    assert beside[1][0] != alone[1][0] and TOKENIZER.decode([one.token for one in beside[1][0]]).startswith('"')


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 3.0, "top_p": 0.5, "min_p": 0.2},
        {"top_k": 1, "frequency_penalty": 2.0, "presence_penalty": -1.0},
        {"logit_bias": dict.fromkeys(TOKENIZER.encode('["').tolist(), -100) | {TOKENIZER.bos: 100}},
    ],
)
def test_texts_match_their_grammars_and_end_with_them(options: dict[str, Any]) -> None:
    """Whatever the options are: also where the first token and all but the end have a bias against them."""
    for tokens, matcher in generate(
        [compiled(PEOPLE), compiled({"const": "Ben"}), None, compiled(PEOPLE)], 60, **options
    ):
        if matcher is not None:
            value = json.loads(TOKENIZER.decode([one.token for one in tokens]))
            assert value == "Ben" or (len(value) == 2 and {*value} <= {"Anna", "Ben", 7})
            assert matcher.complete and len(tokens) < 60
            assert all(one.logprob and one.logprob.logprob and one.logprob.logprob < 0 for one in tokens)


def test_nothing_is_drawn_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = Matcher.mask
    monkeypatch.setattr(Matcher, "mask", lambda self, logits: calls.append(1) or original(self, logits))
    ((tokens, _),) = generate([compiled({"const": True})], 60)
    assert len(calls) - 1 == len(tokens)  # one is of `compile`


def test_a_grammar_that_fails_ends_its_text_only() -> None:
    class Failing(Matcher):
        def add(self, token: int) -> None:
            raise UserError("The schema cannot be followed (because of this test); send a simpler one.")

    pool = SessionPool(Session(MODEL, TOKENIZER, dtype=F64), max_batch=3)
    first, second = pool.add(), pool.add()
    failing = compiled(PEOPLE).matcher()
    failing.__class__ = Failing
    pool.submit_generate(first, tokens_of(5, 1), max_tokens=5, matcher=failing)
    pool.submit_generate(second, tokens_of(5, 2), max_tokens=60, matcher=compiled(PEOPLE).matcher())
    events = run(pool)
    ended = {event.id: event.error for event in events if isinstance(event, Done)}
    assert "because of this test" in str(ended[first]) and ended[second] is None
    found = tokens_by_id(events)
    assert found[first] == [] and json.loads(TOKENIZER.decode([one.token for one in found[second]]))
