"""Log-probabilities, echo, best_of, penalties, biases and token ids, with the clients of OpenAI and lm-eval."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from engine_helpers import F64, MODEL, STORY, TEMPLATE, TOKENIZER
from server_helpers import served

from ttt_e2e.inference.streaming import forward
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.store import Store

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 4}
PROMPT = "The rain"
IDS = TOKENIZER.encode(PROMPT).tolist()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(Engine(TEMPLATE.fork(), Store(tmp_path_factory.mktemp("store")))) as address:
        yield address


@pytest.fixture(scope="module")
def official(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def logprobs_of(prompt: list[int], written: list[int]) -> torch.Tensor:
    """The plain log_softmax in the place of each token [n, V]: learned is what a session learns from the prompt."""
    rows = []
    for count in range(1, len(prompt) + 1):
        session = TEMPLATE.fork()
        session.read(np.array(prompt[:count]))
        state = session.state()
        ids = torch.tensor([*state.pending, *(written[:-1] if count == len(prompt) else ())])[None]
        logits, _ = forward(MODEL, state.read_state, ids, F64)
        rows.append(logits[0, len(state.pending) - 1 :])
    first, _ = forward(MODEL, TEMPLATE.state().read_state, torch.tensor([[TOKENIZER.bos]]), F64)
    return torch.cat((first[0], *rows)).log_softmax(-1)


def text_of(token: int) -> str:
    return TOKENIZER.decode([*TOKENIZER.encode("a"), token])[1:]


def test_completion_logprobs_are_the_models(official: Any) -> None:
    done = official.completions.create(prompt=PROMPT, **GREEDY, logprobs=3, echo=True)
    (choice,) = done.choices
    told = choice.logprobs
    assert choice.text.startswith(PROMPT) and done.usage.completion_tokens == 4 and len(told.tokens) == len(IDS) + 4
    written = [*TEMPLATE.fork().generate_tokens(IDS, max_tokens=4, temperature=0)]
    expected = logprobs_of(IDS, written)
    for i, token in enumerate([*IDS, *written]):
        assert told.tokens[i] == text_of(token)
        assert told.token_logprobs[i] == pytest.approx(float(expected[i, token]), abs=1e-5)
        assert told.top_logprobs[i][told.tokens[i]] >= told.token_logprobs[i]
        best = int(expected[i].argmax())
        assert max(told.top_logprobs[i].values()) == pytest.approx(float(expected[i, best]), abs=1e-5)
    assert told.text_offset == [sum(map(len, told.tokens[:i])) for i in range(len(told.tokens))]
    parts = [*official.completions.create(prompt=PROMPT, **GREEDY, logprobs=3, echo=True, stream=True)]
    assert parts[0].choices[0].text == PROMPT
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        joined = [one for part in parts for one in getattr(part.choices[0].logprobs, name)]
        assert joined == getattr(told, name)
    plain = official.completions.create(prompt=PROMPT, **GREEDY)
    assert plain.choices[0].logprobs is None and PROMPT + plain.choices[0].text == choice.text


def test_chat_logprobs(official: Any) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    prompt = TOKENIZER.encode(f"User: {PROMPT}\nAssistant:").tolist()
    done = official.chat.completions.create(messages=messages, **GREEDY, logprobs=True, top_logprobs=2)
    written = [*TEMPLATE.fork().generate_tokens(prompt, max_tokens=4, temperature=0)]
    told = done.choices[0].logprobs.content
    assert [one.token for one in told] == [text_of(token) for token in written]
    for one, token, expected in zip(told, written, logprobs_of(prompt, written)[len(prompt) :], strict=True):
        assert one.logprob == pytest.approx(float(expected[token]), abs=1e-5)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(expected.topk(2).values.tolist(), abs=1e-5)
        assert one.bytes == (None if "\ufffd" in one.token else [*one.token.encode()])
    parts = official.chat.completions.create(messages=messages, **GREEDY, logprobs=True, top_logprobs=2, stream=True)
    joined = [one for part in parts if part.choices[0].logprobs for one in part.choices[0].logprobs.content]
    assert joined == told
    done = official.chat.completions.create(messages=messages, **GREEDY, logprobs=True)
    assert [one.top_logprobs for one in done.choices[0].logprobs.content] == [[]] * 4


def test_tokens_that_a_stop_string_cuts_are_not_told(official: Any) -> None:
    whole = official.completions.create(prompt=PROMPT, **GREEDY | {"max_tokens": 12}, logprobs=0).choices[0]
    stop = whole.logprobs.tokens[5]
    cut = official.completions.create(prompt=PROMPT, **GREEDY | {"max_tokens": 12}, logprobs=0, stop=stop).choices[0]
    told = cut.logprobs.tokens
    assert cut.text == whole.text[: whole.text.index(stop)] and told == whole.logprobs.tokens[: len(told)]
    assert len("".join(told)) <= len(cut.text) and len(told) <= whole.logprobs.tokens.index(stop)


def test_token_ids_are_the_text_that_they_encode(official: Any) -> None:
    text = official.completions.create(prompt=PROMPT, **GREEDY)
    for prompt in (IDS, [TOKENIZER.bos, *IDS]):
        ids = official.completions.create(prompt=prompt, **GREEDY)
        assert ids.choices[0].text == text.choices[0].text and ids.usage.prompt_tokens == len(prompt)
    both = official.completions.create(prompt=[IDS, IDS[:1]], **GREEDY, echo=True)
    assert [choice.text[:3] for choice in both.choices] == [
        PROMPT[:3],
        (text_of(IDS[0]) + both.choices[1].text[1:])[:3],
    ]
    first = official.completions.create(
        prompt=[TOKENIZER.bos, *IDS], **GREEDY | {"max_tokens": 0}, echo=True, logprobs=0
    )
    told = first.choices[0].logprobs
    assert (told.token_logprobs[0], told.top_logprobs[0], told.tokens[0]) == (None, None, "<|bos|>")
    assert first.choices[0].text == PROMPT and first.usage.completion_tokens == 0 and len(told.tokens) == len(IDS) + 1
    with pytest.raises(openai.BadRequestError, match="4,761 tokens, and this one has 4,762") as caught:
        official.completions.create(prompt=IDS[:1] * 4762, **GREEDY, echo=True, logprobs=20)
    assert caught.value.param == "echo"
    with pytest.raises(openai.BadRequestError, match="token ids go from 0") as caught:
        official.completions.create(prompt=[TOKENIZER.vocab_size], **GREEDY)
    assert caught.value.param == "prompt"


def test_best_of_gives_the_likeliest_texts(official: Any) -> None:
    body = {"model": "tiny", "max_tokens": 5, "temperature": 1.5, "prompt": [PROMPT, "Wet"]}
    tried = official.completions.create(**body, seed=3, n=6, logprobs=0)
    for prompt in (0, 1):
        choices = tried.choices[6 * prompt : 6 * prompt + 6]
        means = {one.text: sum(one.logprobs.token_logprobs) / len(one.logprobs.token_logprobs) for one in choices}
        best = official.completions.create(**body, seed=3, n=2, best_of=6)
        expected = sorted(means, key=lambda text: -means[text])[:2]
        assert [one.text for one in best.choices[2 * prompt : 2 * prompt + 2]] == expected
    assert [one.index for one in best.choices] == [0, 1, 2, 3] and best.choices[0].logprobs is None
    assert best.usage == tried.usage


def test_penalties_and_biases(official: Any) -> None:
    token = TOKENIZER.encode("!").tolist()[0]
    for create, prompt in (
        (official.completions.create, {"prompt": PROMPT}),
        (official.chat.completions.create, {"messages": [{"role": "user", "content": PROMPT}]}),
    ):
        forced = create(**prompt, **GREEDY, logit_bias={str(token): 100})
        assert (forced.choices[0].to_dict().get("text") or forced.choices[0].message.content) == "!!!!"
        body = {**GREEDY, "logit_bias": {str(token): 4}, "max_tokens": 8}
        for penalty in ("frequency_penalty", "presence_penalty"):
            texts = {create(**prompt, **body, **{penalty: value}).choices[0].to_json() for value in (-2, 0, 2)}
            assert len(texts) > 1
    with pytest.raises(openai.BadRequestError) as caught:
        official.completions.create(prompt=PROMPT, **GREEDY, logit_bias={str(TOKENIZER.vocab_size): 1})
    assert caught.value.param == "logit_bias"


def test_prompts_longer_than_a_mini_batch_are_learned_from_on_the_way(official: Any) -> None:
    ids = TOKENIZER.encode(STORY).tolist()
    size = MODEL.config.mini_batch_size
    assert size and len(ids) > 2 * size
    done = official.completions.create(prompt=ids, **GREEDY | {"max_tokens": 0}, echo=True, logprobs=0)
    losses = [loss for part in TEMPLATE.fork().read_chunks(ids) for loss in part]
    told = done.choices[0].logprobs.token_logprobs
    assert len(told) == len(ids) and told[: len(losses)] == pytest.approx([-loss for loss in losses], abs=1e-4)


def test_lm_eval_scores_texts_as_a_session_does(address: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    pytest.importorskip("tenacity", reason="lm-eval has its client of a service with the extra api only")
    models = pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval is not installed")
    transformers.PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend, eos_token="<|bos|>").save_pretrained(
        tmp_path
    )
    client = models.LocalCompletionsAPI(
        base_url=f"{address}/v1/completions",
        model="tiny",
        tokenizer=str(tmp_path),
        tokenizer_backend="huggingface",
        max_length=512,
    )
    continuation = " had stopped"
    requests = [((PROMPT, text), IDS, TOKENIZER.encode(text).tolist()) for text in (continuation, " was")]
    (found, _), _ = client._loglikelihood_tokens(requests, disable_tqdm=True)
    ids = TOKENIZER.encode(continuation).tolist()
    rows = logprobs_of([*IDS, *ids], [])[len(IDS) : -1]
    assert found == pytest.approx(float(sum(rows[i, id] for i, id in enumerate(ids))), abs=1e-4)
