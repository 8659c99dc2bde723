"""Log-probabilities, penalties and biases in a session pool, against a plain walk over the model's logits."""

import numpy as np
import pytest
import torch
from inference_helpers import tokens_of
from pool_helpers import F64, MODELS, of, read_alone, run

from ttt_e2e.errors import UserError
from ttt_e2e.inference.pool_requests import Event, PromptLogprobs, Token
from ttt_e2e.inference.sampling import SamplingOptions, TokenLogprob
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_pool import SessionPool
from ttt_e2e.inference.streaming import forward, start_reading
from ttt_e2e.model.transformer import Transformer


def logprobs_alone(model: Transformer, text: np.ndarray) -> torch.Tensor:
    """The plain log_softmax after each token of a text [T, V], which is learned from by full mini-batches."""
    b, rows = model.config.mini_batch_size, []
    assert b is not None
    for start in range(0, len(text), b):
        state = read_alone(model, text[: start + 1])[0] if start else start_reading(model, 1, F64)
        logits, _ = forward(model, state, torch.from_numpy(text[start : start + b])[None], F64)
        rows.append(logits[0].log_softmax(-1))
    return torch.cat(rows)


def assert_logprobs(found: list[TokenLogprob], expected_TV: torch.Tensor, top: int) -> None:
    for one, expected_V in zip(found, expected_TV, strict=True):
        assert one.logprob == pytest.approx(float(expected_V[one.token]), abs=1e-5)
        values, ids = expected_V.topk(top)
        assert [token for token, _ in one.top] == ids.tolist()
        assert [logprob for _, logprob in one.top] == pytest.approx(values.tolist(), abs=1e-5)


def told(events: list[Event], id: int) -> tuple[list[TokenLogprob], list[TokenLogprob]]:
    """What was told of a prompt, and of what was generated."""
    mine = [event for event in events if event.id == id]
    prompt = [one for event in mine if isinstance(event, PromptLogprobs) for one in event.logprobs]
    return prompt, [event.logprob for event in mine if isinstance(event, Token) and event.logprob]


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_the_model(name: str) -> None:
    """Of prompts that end in all places of a mini-batch, in sessions that have read before, side by side."""
    model = MODELS[name]
    b = model.config.mini_batch_size
    assert b is not None
    pool = SessionPool(Session(model, dtype=F64), max_batch=3)
    texts = {}
    for read, prompt, count in ((1, 1, 2), (1, b, 1), (3, b - 3, 0), (b, 2 * b + 1, 3), (0, b + 2, 1), (0, 1, 0)):
        id = pool.add()
        ids = tokens_of(read + prompt, read + 7 * prompt)
        pool.submit_read(id, ids[:read])
        options = SamplingOptions(temperature=0.5, top_k=9)
        pool.submit_generate(
            id,
            ids[read:],
            max_tokens=count,
            options=options,
            top_logprobs=3,
            score_prompt=True,
            learn_from_writing=True,
        )
        texts[id] = ids, read, count
    events = run(pool)
    for id, (ids, read, count) in texts.items():
        prompt, generated = told(events, id)
        _, tokens, errors = of(events, id)
        assert errors == [None, None] and len(tokens) == count == len(generated)
        assert [one.token for one in prompt + generated] == [*ids[read:], *tokens]
        if read == 0:  # nothing comes before the first token
            assert prompt.pop(0) == TokenLogprob(ids[0], None)
        expected = logprobs_alone(model, np.array([*ids, *tokens], np.int64))
        assert_logprobs(prompt + generated, expected[max(read - 1, 0) : len(ids) + count - 1], 3)


def test_penalties_and_biases_change_what_is_drawn_and_not_the_log_probabilities() -> None:
    model = MODELS["window"]
    pool, ids = SessionPool(Session(model, dtype=F64)), tokens_of(3, 1)
    penalty, forced = pool.add(), pool.add()
    # A reward that grows with each repetition, and a bias for one token.
    options = SamplingOptions(temperature=0, frequency_penalty=-9.0, presence_penalty=50.0)
    pool.submit_generate(penalty, ids, max_tokens=6, options=options, top_logprobs=0)
    pool.submit_generate(forced, ids, max_tokens=2, options=SamplingOptions(temperature=0, logit_bias={5: 100.0}))
    events = run(pool)
    text, logits_TV = [*ids], torch.empty(0)
    for _ in range(6):
        ids_1T = torch.tensor(text)[None]
        logits_TV = forward(model, start_reading(model, 1, F64), ids_1T, F64)[0][0]  # too short to learn from
        counts_V = torch.tensor(np.bincount(text[3:], minlength=logits_TV.shape[-1]))
        text.append(int((logits_TV[-1] + 9.0 * counts_V - 50.0 * (counts_V > 0)).argmax()))
    assert of(events, penalty)[1] == text[3:] and of(events, forced)[1] == [5, 5]
    assert_logprobs(told(events, penalty)[1], logits_TV[2:].log_softmax(-1), 0)
    with pytest.raises(UserError, match="whole numbers"):
        pool.submit_generate(forced, ids, options=SamplingOptions(logit_bias={model.config.vocab_size: 1.0}))
