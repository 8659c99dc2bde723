"""Needles in a haystack: the examples, the scores, and runs that are interrupted and continued."""

import json
import random
import re
from pathlib import Path

import pytest
import tokenizers
from helpers import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.data.text import standard_library_document
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.session import Session
from ttt_e2e.model.checkpoint import save_model
from ttt_e2e.reproduce import needles
from ttt_e2e.reproduce.needles import (
    ADJECTIVES,
    MAX_SENTENCE,
    NOISE,
    NOUNS,
    Answerer,
    Example,
    NeedleResult,
    answer_in_session,
    ask,
    example_for,
    make_example,
    run_needles,
    score,
    split_sentences,
)

STORY = (
    "The lamp had gone out. Nobody in the house could say when! Had it been the wind?\n\n"
    "Mrs. Hale looked at the clock, which said 4567890; then she went upstairs - slowly, as always.\n"
    "  def light(lamp):\n      return lamp.on\n" * 3
)


def word_tokenizer() -> Tokenizer:
    """A tokenizer that is neither byte-level nor lossless."""
    vocabulary = {"[UNK]": 0, "<s>": 1} | {word: i for i, word in enumerate(sorted(set(STORY.split())), 2)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(backend)


TOKENIZERS = {
    "bytes": Tokenizer.train([STORY], 257),
    "pairs": Tokenizer.train([STORY], 400),
    "words": word_tokenizer(),
}
texts = st.one_of(
    st.just(STORY),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=400),
    st.lists(st.sampled_from(["a", "word.", "Yes! ", "\n", "x" * 300, "é 雨 "]), min_size=1, max_size=9).map("".join),
).filter(lambda text: bool(text.strip()))


def oracle(prompt: str, expected: str, max_tokens: int) -> tuple[str, float | None]:
    """Looks the value up in the prompt."""
    key = prompt.rsplit(" of ", 1)[1].removesuffix(" is")
    found = re.search(rf"of {re.escape(key)} is (\S+)\.\s", prompt)
    assert found is not None
    return f" {found[1]}. And so on", 0.0


def guesser(prompt: str, expected: str, max_tokens: int) -> tuple[str, float | None]:
    """Writes a random value of the right kind."""
    return f" {random.Random(prompt).randrange(10**6, 10**7)}", None


# -- examples ----------------------------------------------------------------------------------------------------------


@given(text=texts)
@settings(max_examples=50, deadline=None)
def test_sentences_join_to_the_text(text: str) -> None:
    cut = split_sentences(text)
    assert text.endswith("".join(cut)) and text.strip() in "".join(cut)
    assert all(0 < len(s) <= MAX_SENTENCE for s in cut)


def test_sentences_end_with_marks_or_lines() -> None:
    assert split_sentences("  \nOne. Two!  Three?\n\nx = 1.5\ny") == ["One. ", "Two!  ", "Three?\n\n", "x = 1.5\n", "y"]


@given(
    task=st.sampled_from([1, 2, 3]),
    kind=st.sampled_from(sorted(TOKENIZERS)),
    context=st.integers(560, 2500),
    depth=st.floats(0, 100),
    seed=st.integers(0, 2**32),
    text=texts,
)
@settings(max_examples=60, deadline=None)
def test_example_fills_the_context_and_has_one_needle_at_its_depth(
    task: int, kind: str, context: int, depth: float, seed: int, text: str
) -> None:
    tokenizer = TOKENIZERS[kind]
    try:
        example = make_example(task, tokenizer, context, depth, random.Random(seed), text)
    except UserError as error:
        # One sentence may have 960 bytes, and one of characters that a tokenizer of words does not know hardly a token.
        endless = kind == "words" and "without a place" in str(error)
        assert endless or ("too small" in str(error) and context < 1600)
        return
    prompt = example.prompt
    # Length: it fits, and another sentence would not.
    count = 1 + len(tokenizer.encode(prompt)) + len(tokenizer.encode(f" {example.answer}"))
    hay = NOISE if task == 1 else split_sentences(text)
    longest = max(len(tokenizer.encode(s)) for s in hay)
    assert count == example.tokens <= context
    assert context - count <= longest + 8
    # One needle: key and value stand nowhere else.
    assert prompt.count(example.answer) == 1
    assert re.fullmatch(r"\d{7}" if task < 3 else r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", example.answer)
    what = "identifier" if task == 3 else "number"
    needle = f"The secret {what} of {example.key} is {example.answer}."
    assert prompt.count(needle) == 1 and prompt.count(example.key) == 3
    assert prompt.endswith(f"The secret {what} of {example.key} is")
    # Depth, in characters of the haystack, to the nearest border.
    first, last = prompt.index("\n\n") + 2, prompt.rindex("\n\n")
    total = last - first - len(needle) - 1
    at = prompt.index(needle) - first
    assert abs(at - depth / 100 * total) <= MAX_SENTENCE / 2 + 200 * (total == 0) + 3 + _blanks(text)
    # Tokens before it.
    assert example.position == 1 + len(tokenizer.encode(prompt[: prompt.index(needle)]))


def _blanks(text: str) -> int:
    """How many blanks may have been dropped from the haystack's end."""
    return max((len(run) for run in re.findall(r"\s+", text)), default=0)


def test_depths_0_and_100_are_the_ends_of_the_text() -> None:
    first, last = (
        make_example(2, TOKENIZERS["pairs"], 700, depth, random.Random(0), STORY).prompt for depth in (0, 100)
    )
    assert first.split("\n\n")[1].startswith("The secret number of")
    question = last.rsplit("\n\n", 1)[1]
    assert question.startswith("Which secret number")
    assert re.search(r"The secret number of \S+ is \d{7}\.\n\nWhich", last)


def test_example_depends_on_the_seed_alone() -> None:
    def example(seed: int, **changes: object) -> Example:
        values = dict(task=2, context=500, depth=25.0, sample=0) | changes
        return example_for(
            values["task"], TOKENIZERS["pairs"], values["context"], values["depth"], values["sample"], seed, STORY
        )

    assert example(0) == example(0)
    others = [example(1), example(0, sample=1), example(0, depth=50.0), example(0, context=501), example(0, task=3)]
    assert len({e.answer for e in (example(0), *others)}) == 6


def test_key_does_not_occur_in_the_haystack() -> None:
    taken = " ".join(f"{a}-{b}." for a in ADJECTIVES for b in NOUNS if (a, b) != ("opal", "mirror"))
    tokenizer = TOKENIZERS["bytes"]
    for seed in range(3):
        try:
            assert make_example(2, tokenizer, 20_000, 50, random.Random(seed), taken).key == "opal-mirror"
        except UserError as error:
            assert "occur in the haystack" in str(error)


def test_make_example_rejects_invalid_values() -> None:
    tokenizer, rng = TOKENIZERS["pairs"], random.Random(0)
    with pytest.raises(UserError, match="no needle task 4"):
        make_example(4, tokenizer, 500, 50, rng, STORY)
    with pytest.raises(UserError, match="from 0 to 100"):
        make_example(1, tokenizer, 500, 101, rng, STORY)
    with pytest.raises(UserError, match="give a haystack"):
        make_example(2, tokenizer, 500, 50, rng, " \n")
    with pytest.raises(UserError, match="too small for needle task 3") as error:
        make_example(3, tokenizer, 60, 50, rng, STORY)
    least = int(re.findall(r"take (\d+)", str(error.value))[0])
    assert make_example(3, tokenizer, least + MAX_SENTENCE, 50, rng, STORY).tokens <= least + MAX_SENTENCE


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answerer", "expected"), [(oracle, (100.0, 0.0)), (guesser, (0.0, None))])
def test_oracle_scores_100_and_guesser_0(answerer: Answerer, expected: tuple[float, float | None]) -> None:
    tokenizer = TOKENIZERS["pairs"]
    for task in (1, 2, 3):
        for depth in (0.0, 50.0, 100.0):
            results: list[NeedleResult] = []
            for sample in range(3):
                answer = ask(answerer, tokenizer, example_for(task, tokenizer, 600, depth, sample, 0, STORY))
                question = {"model": "it", "task": task, "context": 600, "depth": depth, "sample": sample}
                results.append({**question, **answer})
            assert score(results) == expected


def test_model_answers_as_its_session_does() -> None:
    tokenizer = TOKENIZERS["pairs"]
    model = small_model(vocab_size=tokenizer.vocab_size, inner_loop__lr=0.01)
    prompt = "The lamp had gone out. Nobody in the house could say"
    session = Session(model, tokenizer)
    session.read(prompt)
    written, nll = answer_in_session(model, tokenizer, prompt, " when", 9)
    assert written == "".join(session.generate(max_tokens=9, temperature=0.0))
    ids = tokenizer.encode(" when")
    fork = session.fork()
    losses = [*fork.read(ids), *fork.score_pending()]
    assert nll == pytest.approx(sum(losses[-len(ids) :]) / len(ids))
    assert answer_in_session(model, tokenizer, "The lamp", " when", 9)[1] != nll


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    TOKENIZERS["pairs"].save(folder / "tokenizer.json")
    kinds = {"ttt-e2e": dict(inner_loop__lr=0.01), "window": dict(suffix_layers=0, mini_batch_size=None)}
    for name, changes in kinds.items():
        model = small_model(vocab_size=TOKENIZERS["pairs"].vocab_size, **changes)
        save_model(model, folder / name, folder / "tokenizer.json")
    return {name: folder / name for name in kinds}


@pytest.fixture()
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    return path


QUESTIONS: dict = dict(tasks=(1, 3), contexts=(300, 400), depths=(0, 100), device="cpu", progress=False)


def test_interrupted_run_continues_with_the_same_results(
    models: dict[str, Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_needles(tmp_path / "whole", models=models, haystack=story, samples=1, **QUESTIONS)
    assert len(whole) == 16 and all(result["nll"] is not None and result["nll"] > 0 for result in whole)
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == ["needles.json", "needles.md", "needles.png"]
    assert "| ttt-e2e | 3: a UUID in a text | all |" in (tmp_path / "whole" / "needles.md").read_text()
    assert (tmp_path / "whole" / "needles.png").read_bytes().startswith(b"\x89PNG")

    calls = 0

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return ask(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(needles, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_needles(tmp_path / "split", models=models, haystack=story, samples=1, **QUESTIONS)
    assert len(json.loads((tmp_path / "split" / "needles.json").read_text())["results"]) == 5
    assert run_needles(tmp_path / "split", models=models, haystack=story, samples=1, **QUESTIONS) == whole
    assert calls == 17
    for name in ("needles.json", "needles.md"):
        assert (tmp_path / "split" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_questions_are_added_but_not_for_another_text_or_model(
    models: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    one = {"window": models["window"]}
    few = QUESTIONS | dict(tasks=(1,), contexts=(300,))
    first = run_needles(tmp_path / "out", models=one, haystack=story, samples=1, **few)
    more = run_needles(tmp_path / "out", models=one, haystack=story, samples=2, **few)
    assert len(first) == 2 and len(more) == 4 and all(result in more for result in first)
    with pytest.raises(UserError, match="another seed"):
        run_needles(tmp_path / "out", models=one, haystack=story, samples=1, seed=1, **few)
    with pytest.raises(UserError, match="another haystack"):
        run_needles(tmp_path / "out", models=one, haystack=None, samples=1, **few)
    with pytest.raises(UserError, match="another model called 'window'"):
        run_needles(tmp_path / "out", models={"window": models["ttt-e2e"]}, haystack=story, samples=1, **few)


def test_divergence_is_not_found(
    models: dict[str, Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(self: Session, tokens: object) -> object:
        raise Diverged("Learning diverged: the loss is inf.", 0)

    monkeypatch.setattr(Session, "read", diverges)
    few = QUESTIONS | dict(tasks=(1,), contexts=(300,))
    results = run_needles(tmp_path / "out", models=models, haystack=story, samples=1, **few)
    assert {(r["found"], r["nll"], r["diverged"]) for r in results} == {
        (False, None, "Learning diverged: the loss is inf.")
    }
    assert "| 0 % |" in (tmp_path / "out" / "needles.md").read_text()


def test_invalid_run_is_refused_before_it_begins(models: dict[str, Path], story: Path, tmp_path: Path) -> None:
    def refused(match: str, **changes: object) -> None:
        values = dict(models=models, haystack=story, samples=1) | QUESTIONS | changes
        with pytest.raises(UserError, match=match):
            run_needles(tmp_path / "out", **values)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()

    refused("at least one model", models={})
    refused("at least one model", samples=0)
    refused("no needle task 7", tasks=(1, 7))
    refused("too small", contexts=(400, 50))
    refused("does not exist", haystack=tmp_path / "none.txt")
    refused("no model folder", models={"a": tmp_path / "none"})
    save_model(small_model(), tmp_path / "bare", None)
    refused("no tokenizer.json", models={"a": tmp_path / "bare"})
    assert standard_library_document().text.startswith("# file: asyncio")  # the default haystack


def test_results_of_an_older_version_are_refused(models: dict[str, Path], story: Path, tmp_path: Path) -> None:
    (tmp_path / "needles.json").write_text('{"seed": 0, "dtype": "float32", "models": {}, "results": []}')
    with pytest.raises(UserError, match=r"format version 2, .* reads version 4; choose another folder"):
        run_needles(tmp_path, models=models, haystack=story, samples=1, **QUESTIONS)


def test_needles_file_has_these_keys(models: dict[str, Path], story: Path, tmp_path: Path) -> None:
    few = QUESTIONS | dict(tasks=(1,), contexts=(300,), depths=(0,))
    run_needles(tmp_path, models=models, haystack=story, samples=1, **few)
    found = json.loads((tmp_path / "needles.json").read_text())
    assert (found["format"], found["version"]) == ("ttt-e2e needles", 4)
    keys = ["dtype", "format", "haystack", "machine", "models", "results", "seed", "sha256", "version"]
    assert sorted(found) == keys
    assert sorted(found["results"][0]) == [
        *("context", "depth", "diverged", "found", "model", "nll", "sample", "task", "written"),
    ]
    (tmp_path / "needles.json").write_text(json.dumps(found | {"dtype": "bfloat16"}))
    with pytest.raises(UserError, match="altered after it was written"):
        run_needles(tmp_path, models=models, haystack=story, samples=1, **few)
