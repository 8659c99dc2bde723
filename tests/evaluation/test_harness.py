"""Models under `lm-eval`, the evaluation harness: its numbers against those that a session gives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_model

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session
from ttt_e2e.model.checkpoint import save_model

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; it is in the extra `harness`")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from ttt_e2e.evaluation.harness import HarnessModel  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["red", "green", "blue", "fish", "bird", "tree", "sings", "swims", "grows"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: mini-batches of 5 tokens, and a learning rate that moves something."""
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 3, 280)
    model = small_model(vocab_size=tokenizer.vocab_size, inner_loop__lr=0.3)
    folder = tmp_path_factory.mktemp("harness") / "model"
    save_model(model, folder, None)
    tokenizer.save(folder / "tokenizer.json")
    return folder


def sentence(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def score(folder: Path, context: str, continuation: str, learn: bool) -> float:
    """The log-likelihood by a session alone, as it reads."""
    model, tokenizer = load_model(folder)
    session = Session(model, tokenizer, learn=learn)
    losses = np.concatenate([session.read(tokenizer.encode(context + continuation)), session.score_pending()])
    return -float(losses[len(tokenizer.encode(context)) :].sum())


def is_greedy(folder: Path, context: str, continuation: str, learn: bool) -> bool:
    """Whether a session alone writes the continuation."""
    model, tokenizer = load_model(folder)
    ids = tokenizer.encode(context + continuation)
    for end in range(len(tokenizer.encode(context)), len(ids)):
        session = Session(model, tokenizer, learn=learn)
        session.read(ids[:end])
        if next(session.generate_tokens(max_tokens=1, temperature=0), tokenizer.bos) != ids[end]:
            return False
    return True


@pytest.mark.parametrize("learn", [True, False])
def test_continuations_are_scored_as_a_session_reads_them(folder: Path, learn: bool) -> None:
    lm = HarnessModel(str(folder), learn=learn, batch_size=3)
    pairs = [(sentence(n, n), " " + sentence(1 + n % 4, 100 + n)) for n in (1, 1, 2, 3, 8, 9, 20, 40)]
    pairs += [(pairs[-1][0], " fish"), ("", sentence(2, 7)), ("", sentence(30, 8)), ("red ", "fish")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    pairs[-1] = ("red", " fish")  # the harness moves a blank at a context's end to the continuation
    for pair, (found_score, greedy) in zip(pairs, found, strict=True):
        assert found_score == pytest.approx(score(folder, *pair, learn), abs=2e-4), pair
        assert greedy == is_greedy(folder, *pair, learn), pair
    if learn:  # the test would not see it if nothing were learned
        assert found[7][0] != pytest.approx(score(folder, *pairs[7], False), abs=1e-3)


def test_greedy_generation_is_scored_as_greedy(folder: Path) -> None:
    lm = HarnessModel(str(folder))
    context = sentence(12, 3)
    request = Instance("generate_until", {}, (context, {"until": [], "max_gen_toks": 6}), 0)
    text = lm.generate_until([request], True)[0]
    model, tokenizer = load_model(folder)
    assert text == "".join(Session(model, tokenizer).generate(context, max_tokens=6, temperature=0))
    ids = tokenizer.encode(context)
    written = list(Session(model, tokenizer).generate_tokens(ids, max_tokens=6, temperature=0))
    other = [*written[:-1], (written[-1] + 1) % tokenizer.vocab_size]
    scores = lm._loglikelihood_tokens([(("", ""), ids.tolist(), some) for some in (written, other)], True)
    assert [greedy for _, greedy in scores] == [True, False] and scores[0][0] > scores[1][0]


def test_repeated_request_draws_another_text(folder: Path) -> None:
    lm = HarnessModel(str(folder))
    request = Instance(
        "generate_until", {}, ("red fish", {"max_gen_toks": 20, "do_sample": True, "temperature": 1.0}), 0
    )
    one, two, three = lm.generate_until([request] * 3, True)
    assert len({one, two, three}) == 3
    assert lm.generate_until([request], True) == [one]


def test_scores_do_not_depend_on_the_logits_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = HarnessModel(str(folder))
    requests = [Instance("loglikelihood", {}, ("red", f" {word}"), i) for i, word in enumerate(WORDS[:5])]
    expected = lm.loglikelihood(requests, disable_tqdm=True)
    monkeypatch.setattr("ttt_e2e.evaluation.harness.MAX_LOGITS", 1)
    for found, whole in zip(lm.loglikelihood(requests, disable_tqdm=True), expected, strict=True):
        assert found[0] == pytest.approx(whole[0], abs=1e-5) and found[1] == whole[1]


def test_generation_ends_before_a_stop_string(folder: Path) -> None:
    lm = HarnessModel(str(folder))
    whole = lm.generate_until([Instance("generate_until", {}, ("red fish", {"max_gen_toks": 40}), 0)], True)[0]
    stop = whole[5:8]
    request = Instance("generate_until", {}, ("red fish", {"max_gen_toks": 40, "until": [stop]}), 0)
    assert lm.generate_until([request], True) == [whole[: whole.index(stop)]]


@pytest.mark.parametrize("learn", ["true", "False"])
def test_rolling_loglikelihood_is_that_of_the_whole_text(folder: Path, learn: str) -> None:
    text = sentence(60, 5)
    found = HarnessModel(str(folder), learn=learn).loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0)], True
    )
    assert found == [pytest.approx(score(folder, "", text, learn == "true"), abs=1e-3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn": "perhaps"}, "learn must be true or false"),
        ({"dtype": "int8"}, "no dtype"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_invalid_arguments_are_rejected(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        HarnessModel(**{"pretrained": str(folder), **options})


def test_missing_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        HarnessModel(str(tmp_path / "nowhere"))


def test_divergence_is_an_error_and_not_a_score(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 3, 280)
    save_model(small_model(vocab_size=tokenizer.vocab_size, inner_loop__lr=1e30), tmp_path / "model", None)
    tokenizer.save(tmp_path / "model" / "tokenizer.json")
    request = Instance("loglikelihood", {}, ("red", " " + sentence(40, 1)), 0)
    with pytest.raises(Diverged, match=r"the loss at tokens 5 to 10 is .*learn=false"):
        HarnessModel(str(tmp_path / "model")).loglikelihood([request], disable_tqdm=True)


def test_task_from_local_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{"question": sentence(10, n), "choices": ["fish", "bird", "tree"], "answer": n % 3} for n in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    torch.manual_seed(0)
    report = lm_eval.simple_evaluate(
        model="ttt-e2e",
        model_args={"pretrained": str(folder), "learn": True},
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    right = 0
    for line in lines:
        scores = [score(folder, line["question"], f" {choice}", True) for choice in line["choices"]]
        right += int(np.argmax(scores)) == line["answer"]
    assert report["results"]["local"]["acc,none"] == pytest.approx(right / len(lines))
