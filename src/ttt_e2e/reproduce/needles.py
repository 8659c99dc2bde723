"""Needles in a haystack: one sentence hidden in a long text, and a question about it at the end.

The three single-needle tasks of RULER (arXiv 2404.06654, section 3.1): a number hidden in a few sentences that repeat
(1), a number in a real text (2), a UUID in a real text (3). A key of two words says which value is asked for. All
sentences, words and code are our own. The score is RULER's: whether the model, decoding greedily, writes the value. The
loss of the value's tokens is reported beside it, and tells models apart that are too small to write it.

A context counts all tokens: BOS, prompt and answer. The depth of a needle is its position in the haystack, in percent
of the haystack's characters, rounded to the end of a sentence.
"""

import bisect
import hashlib
import itertools
import json
import random
import re
import statistics
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttt_e2e.data.text import read_text, standard_library_document
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.files import check_digest, check_format, read_json, with_digest, write_text
from ttt_e2e.hardware import choose_device, machine
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import model_fingerprint
from ttt_e2e.model.cost import in_tokens
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.progress import ProgressBar
from ttt_e2e.reproduce.tables import markdown_table

FORMAT, VERSION = "ttt-e2e needles", 4

TASKS = {1: "a number in sentences that repeat", 2: "a number in a text", 3: "a UUID in a text"}
MAX_SENTENCE = 240  # characters; longer sentences are cut
EXTRA_TOKENS = 8  # that a model may write beyond the number that the value has
_MAX_DRAWS = 100

NOISE = (
    "A slow river passes the mill. ",
    "Two boats lie on the bank. ",
    "The miller sweeps the yard. ",
    "Clouds drift over the hills, and nobody is in a hurry.\n",
)
ADJECTIVES = (
    *("amber", "brisk", "copper", "dusty", "eager", "frozen", "gentle", "hollow", "ivory", "jagged", "kindly", "lunar"),
    *("mellow", "narrow", "opal", "pallid", "quiet", "rustic", "silver", "tidal", "umber", "velvet", "woven", "young"),
)
NOUNS = (
    *("anchor", "beacon", "candle", "desert", "engine", "fiddle", "garden", "harbor", "island", "jacket", "kettle"),
    *("ladder", "mirror", "needle", "orchid", "pepper", "quarry", "ribbon", "saddle", "temple", "urchin", "violin"),
)
# Sentences end with . ! or ? and a space, or with a line.
_SENTENCE_END = re.compile(r"(?<=[.!?]) +|\n+")


class Example(NamedTuple):
    """A prompt, and the value that should follow it after a space."""

    prompt: str
    answer: str
    key: str
    position: int  # tokens before the needle, with BOS
    tokens: int  # all of them, with BOS and the answer


Answerer = Callable[[str, str, int], tuple[str, float | None]]
"""Takes a prompt, the expected answer and most tokens to write; returns the text that a model writes, and its loss of
the expected answer in nats per token (None if it has none)."""


# -- examples ----------------------------------------------------------------------------------------------------------


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, with the white space after each, in parts of at most `MAX_SENTENCE` characters.

    Joined they are the text, without white space at its start.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)] + [len(text)]
    whole = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    cut = [s[i : i + MAX_SENTENCE] for s in whole for i in range(0, len(s), MAX_SENTENCE)]
    first = next((i for i, s in enumerate(cut) if s.strip()), len(cut))
    return cut[first:]


def make_example(
    task: int, tokenizer: Tokenizer, context: int, depth: float, rng: random.Random, haystack: str | None = None
) -> Example:
    """Draw an example.

    Args:
        task: A key of `TASKS`.
        tokenizer: What counts the tokens.
        context: Most tokens of the example; another sentence of haystack would not fit.
        depth: Where the needle is, in percent.
        rng: What draws key, value, and the sentence that the haystack begins with.
        haystack: The text of tasks 2 and 3, repeated if it is short. Key and value do not occur in it.

    Raises:
        UserError: For an unknown task or depth, no haystack, or a context without room for one sentence of it.
    """
    if task not in TASKS:
        raise UserError(f"There is no needle task {task}; there are: {', '.join(map(str, TASKS))}.")
    if not 0 <= depth <= 100:
        raise UserError(f"The depth of a needle is in percent, from 0 to 100, not {depth:g}.")
    if task > 1 and not (haystack or "").strip():
        raise UserError(f"Needle task {task} needs a text to hide the needle in; give a haystack.")
    text = "".join(NOISE) if task == 1 or haystack is None else haystack
    for _ in range(_MAX_DRAWS):
        key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        value = str(rng.randrange(10**6, 10**7)) if task < 3 else str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if key not in text and value not in text:
            break
    else:
        raise UserError("All keys or values that were drawn occur in the haystack; give another text.")
    hay = split_sentences(text)
    start = rng.randrange(len(hay))
    what = "number" if task < 3 else "identifier"
    intro = (
        f"Somewhere in the text below, one {what} is given to a name. Keep it in mind, you will be asked for it.\n\n"
    )
    needle = f"The secret {what} of {key} is {value}."
    question = f"\n\nWhich secret {what} does the text give for {key}? The secret {what} of {key} is"
    answer_tokens = len(tokenizer.encode(f" {value}"))

    def around_needle(count: int) -> tuple[str, str]:
        """What is before and after the needle, with `count` sentences of the haystack."""
        picked = [hay[(start + i) % len(hay)] for i in range(count)]
        # Where the text repeats, a new line begins.
        picked = [s if s[-1].isspace() or (start + i + 1) % len(hay) else s + "\n" for i, s in enumerate(picked)]
        ends = np.cumsum([0, *map(len, picked)])
        at = int(np.abs(ends - depth / 100 * ends[-1]).argmin())
        before, after = "".join(picked[:at]), "".join(picked[at:])
        # The sentence before the needle may have been cut, or be the text's last.
        space = "" if not before or before[-1].isspace() else " "
        return intro + before + space, f" {after}".rstrip() + question

    def tokens(count: int) -> int:
        return 1 + len(tokenizer.encode(needle.join(around_needle(count)))) + answer_tokens

    least = tokens(1)
    if least > context:
        raise UserError(
            f"A context of {context} tokens is too small for needle task {task}: instructions, needle, question and "
            f"one sentence of haystack take {least}; choose a longer one."
        )
    high = 2
    while tokens(high) <= context:
        high *= 2
    # The largest count that fits, where the next does not.
    count = high // 2 + bisect.bisect_right(range(high // 2 + 1, high), context, key=tokens)
    before, after = around_needle(count)
    return Example(before + needle + after, value, key, 1 + len(tokenizer.encode(before)), tokens(count))


def example_for(
    task: int, tokenizer: Tokenizer, context: int, depth: float, sample: int, seed: int, haystack: str | None
) -> Example:
    """The example number `sample` for a task, context and depth; it depends on nothing else."""
    rng = random.Random(f"{seed}/{task}/{context}/{depth:g}/{sample}")
    return make_example(task, tokenizer, context, depth, rng, haystack)


# -- questions ---------------------------------------------------------------------------------------------------------


NeedleResult = dict[str, Any]
"""A question and its answer, as in needles.json: "model", "task", "context", "depth", "sample", and see `ask`."""


def ask(answerer: Answerer, tokenizer: Tokenizer, example: Example) -> dict[str, Any]:
    """Have an example's question answered.

    Returns "found" (whether the value was written), "nll" (its loss in nats per token, or None), "written", and
    "diverged" (why the prompt could not be read, or None).
    """
    expected = f" {example.answer}"
    try:
        written, nll = answerer(example.prompt, expected, len(tokenizer.encode(expected)) + EXTRA_TOKENS)
    except Diverged as error:
        return {"found": False, "nll": None, "written": "", "diverged": str(error)}
    return {"found": example.answer in written, "nll": nll, "written": written, "diverged": None}


def answer_in_session(
    model: Transformer, tokenizer: Tokenizer, prompt: str, expected: str, max_tokens: int
) -> tuple[str, float]:
    """The `Answerer` of a model, which decodes greedily and learns from the prompt if it can. Raises Diverged."""
    session, ids = Session(model, tokenizer), tokenizer.encode(expected)
    session.read(prompt)
    written = "".join(session.generate(max_tokens=max_tokens, temperature=0.0))
    fork = session.fork()
    losses = np.concatenate((fork.read(ids), fork.score_pending()))
    return written, float(losses[-len(ids) :].mean())


# -- the command -------------------------------------------------------------------------------------------------------


def run_needles(
    out: Path,
    *,
    models: Mapping[str, Path],
    tasks: Sequence[int] = (1, 2, 3),
    contexts: Sequence[int],
    depths: Sequence[float] = (0, 25, 50, 75, 100),
    samples: int = 5,
    seed: int = 0,
    haystack: Path | None = None,
    device: str = "auto",
    progress: bool = True,
) -> list[NeedleResult]:
    """Ask every model about every task, context and depth; writes needles.json, needles.md and needles.png.

    Every answer is on the disk before the next question. The same call continues where it was interrupted, and further
    tasks, contexts, depths, samples and models are added to the results that are there.

    Args:
        out: The folder to write.
        models: Model folders by name.
        tasks: Keys of `TASKS`.
        contexts: Lengths in tokens.
        depths: In percent.
        samples: Questions for each task, context and depth.
        seed: Of the questions.
        haystack: A text file for tasks 2 and 3. None: the source of a package of Python's library.
        device: "auto", "cpu" or "cuda".
        progress: Whether to show a progress bar.

    Returns:
        All results in `out`.

    Raises:
        UserError: For values out of range, a folder without a model or tokenizer, a context that is too small, or if
            `out` has results of another seed or text, or of another model of the same name.
    """
    if not models or not tasks or not contexts or not depths or samples < 1:
        raise UserError(
            "Needles need at least one model, task, context, depth and sample; "
            f"there are {len(models)}, {len(tasks)}, {len(contexts)}, {len(depths)} and {samples}."
        )
    text = standard_library_document().text if haystack is None else read_text(haystack)
    facts: dict[str, Any] = {"format": FORMAT, "version": VERSION, "seed": seed, "dtype": "float32"}
    facts["haystack"] = hashlib.sha256(text.encode()).hexdigest()
    path = out / "needles.json"
    found: dict[str, Any] = facts | {"models": {}, "results": []}
    if path.exists():
        found = {"format": FORMAT, "version": 2} | read_json(path)  # version 2 had no such entries
        check_format(found, path, FORMAT, VERSION, "choose another folder")
        check_digest(found, path)
        del found["sha256"]
        different = [key for key, value in facts.items() if found.get(key) != value]
        if different:
            raise UserError(f"{path} has results of another {' and another '.join(different)}; choose another folder.")
    facts, results = found, found.pop("results")
    chosen = choose_device(device)
    facts["machine"] = machine(chosen)
    for name, folder in models.items():  # what cannot be asked is refused before the first question
        model, tokenizer = load_model(folder, chosen)
        digest = model_fingerprint(model)
        if facts["models"].setdefault(name, digest) != digest:
            raise UserError(f"{out} has results of another model called {name!r}; give {folder} another name.")
        for task in tasks:
            example_for(task, tokenizer, min(contexts), depths[0], 0, seed, text)
    questions = list(itertools.product(range(samples), tasks, contexts, map(float, depths)))
    answered = {(r["model"], r["sample"], r["task"], r["context"], r["depth"]) for r in results}
    with ProgressBar(total=len(models) * len(questions), disable=not progress, desc="needles", unit="question") as bar:
        for name, folder in models.items():
            model, tokenizer = load_model(folder, chosen)
            answerer = partial(answer_in_session, model, tokenizer)
            for sample, task, context, depth in questions:
                if (name, sample, task, context, depth) not in answered:
                    bar.set_postfix_str(f"{name}, task {task} at {in_tokens(context)}")
                    answer = ask(answerer, tokenizer, example_for(task, tokenizer, context, depth, sample, seed, text))
                    question = {"model": name, "task": task, "context": context, "depth": depth, "sample": sample}
                    results.append({**question, **answer})
                    # A line for each result, so that the file can be read by people.
                    lines = ",\n".join(map(json.dumps, results))
                    digest = with_digest({**facts, "results": results})["sha256"]
                    head = json.dumps({**facts, "sha256": digest}, indent=1).removesuffix("\n}")
                    write_text(path, f'{head},\n "results": [\n{lines}\n]}}\n')
                bar.update()
    from ttt_e2e.reproduce.plots import plot_needles  # matplotlib is slow to import

    write_text(out / "needles.md", needles_table(results, facts))
    cells: dict[tuple[str, int, int, float], list[NeedleResult]] = {}
    for result in results:
        cells.setdefault((result["model"], result["task"], result["context"], result["depth"]), []).append(result)
    plot_needles({key: (score(some)[0], _format(some, "\n")) for key, some in cells.items()}, out / "needles.png")
    return results


def score(results: Sequence[NeedleResult]) -> tuple[float, float | None]:
    """Percent found, and the mean loss of the values in nats per token, None if there is none."""
    losses = [result["nll"] for result in results if result["nll"] is not None]
    return 100 * statistics.mean(result["found"] for result in results), statistics.mean(losses) if losses else None


def _format(results: Sequence[NeedleResult], separator: str) -> str:
    found, nll = score(results)
    return f"{found:.0f} %" + ("" if nll is None else f"{separator}{nll:.2f}")


def needles_table(results: Sequence[NeedleResult], facts: dict[str, Any]) -> str:
    """Markdown: percent found and the value's loss by model, task and context, over all depths; then by depth."""
    contexts = sorted({result["context"] for result in results})
    rows: list[list[str]] = []
    for name, task in sorted({(r["model"], r["task"]) for r in results}, key=lambda pair: (pair[1], pair[0])):
        own = [r for r in results if (r["model"], r["task"]) == (name, task)]
        for depth in (None, *sorted({r["depth"] for r in own})):
            row = [name, f"{task}: {TASKS[task]}", "all" if depth is None else f"{depth:g} %"]
            for context in contexts:
                some = [r for r in own if r["context"] == context and depth in (None, r["depth"])]
                row.append(_format(some, " / ") if some else "-")
            rows.append(row)
    rows.sort(key=lambda row: row[2] != "all")
    host = ", ".join(f"{key} {value}" for key, value in facts["machine"].items())
    head = f"""# Needles in a haystack

Seed {facts["seed"]}, {facts["dtype"]}. {host}.

Percent of the values that were written, and the loss of their tokens in nats per token.
"""
    return "\n".join([head, *markdown_table(["model", "task", "depth", *map(in_tokens, contexts)], rows)])
