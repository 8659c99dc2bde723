"""Needles in a haystack: one sentence hidden in a long text, and a question about it at the end.

The three tasks with a single needle of RULER (arXiv 2404.06654, section 3.1): 1 hides a number in a few sentences that
repeat, 2 a number in a real text, 3 a UUID in a real text. A key of two words says what is asked for. All sentences,
words and code are our own. RULER's score is kept: whether the model, always writing the likeliest token, writes the
value. Beside it stands the loss of the value's tokens, which also tells apart models too small to write it.

A context counts all tokens: BOS, the prompt, and the answer. Depth is where in the haystack the needle lies, in percent
of its characters, to the nearest border between sentences.
"""

import bisect
import hashlib
import json
import random
import re
import statistics
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from ttt_e2e.data.text import read_text, standard_library_document
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path, write_text
from ttt_e2e.hardware import machine
from ttt_e2e.inference.session import Diverged, Session, load_reader
from ttt_e2e.inference.session_file import model_fingerprint
from ttt_e2e.model.checkpoint import model_digest, read_json
from ttt_e2e.model.cost import in_tokens
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training.parallelize import choose_device

TASKS = {1: "a number in sentences that repeat", 2: "a number in a text", 3: "a UUID in a text"}
SENTENCE = 240  # characters at most; longer ones are cut
MORE_TOKENS = 8  # that a model may write beyond as many as the value has
_TRIES = 100

_NOISE = (
    "A slow river passes the mill. ",
    "Two boats lie on the bank. ",
    "The miller sweeps the yard. ",
    "Clouds drift over the hills, and nobody is in a hurry.\n",
)
_FIRST = (
    *("amber", "brisk", "copper", "dusty", "eager", "frozen", "gentle", "hollow", "ivory", "jagged", "kindly", "lunar"),
    *("mellow", "narrow", "opal", "pallid", "quiet", "rustic", "silver", "tidal", "umber", "velvet", "woven", "young"),
)
_SECOND = (
    *("anchor", "beacon", "candle", "desert", "engine", "fiddle", "garden", "harbor", "island", "jacket", "kettle"),
    *("ladder", "mirror", "needle", "orchid", "pepper", "quarry", "ribbon", "saddle", "temple", "urchin", "violin"),
)
# Whole sentences end in . ! or ? and a space, or with a line.
_BORDER = re.compile(r"(?<=[.!?]) +|\n+")


class Example(NamedTuple):
    """A prompt, and the value that should follow it after a space.

    position: how many tokens stand before the needle, BOS among them. tokens: of all, BOS and answer included.
    """

    prompt: str
    answer: str
    key: str
    position: int
    tokens: int


class Reader(Protocol):
    """Who is asked."""

    def answer(self, prompt: str, max_tokens: int) -> str:
        """What it writes after `prompt`."""

    def nll(self, prompt: str, answer: str) -> float | None:
        """Its loss for `answer` after `prompt`, in nats per token; None if it has none."""


# -- making examples ---------------------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """The text cut into sentences of at most `SENTENCE` characters, what separates them at their ends; they join to it.

    Blanks at the start of the text are dropped.
    """
    ends = [match.end() for match in _BORDER.finditer(text)] + [len(text)]
    whole = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    cut = [s[i : i + SENTENCE] for s in whole for i in range(0, len(s), SENTENCE)]
    first = next((i for i, s in enumerate(cut) if s.strip()), len(cut))
    return cut[first:]


def make(
    task: int, tokenizer: Tokenizer, context_tokens: int, depth: float, rng: random.Random, haystack: str | None = None
) -> Example:
    """An example of `task` (see `TASKS`) with its needle at `depth` percent, drawn with `rng`.

    It has at most `context_tokens` tokens, and one more sentence of the haystack would be too much. haystack: the text
    of tasks 2 and 3, begun at a sentence that is drawn, and repeated if it is short. Key and value stand nowhere else
    in it. Raises UserError for an unknown task or depth, and if the context has no room for a sentence of haystack.
    """
    if task not in TASKS:
        raise UserError(f"There is no needle task {task}; there are: {', '.join(map(str, TASKS))}.")
    if not 0 <= depth <= 100:
        raise UserError(f"The depth of a needle is in percent, from 0 to 100, not {depth:g}.")
    if task > 1 and not (haystack or "").strip():
        raise UserError(f"Needle task {task} needs a text to hide the needle in; give a haystack.")
    text = "".join(_NOISE) if task == 1 or haystack is None else haystack
    for _ in range(_TRIES):
        key = f"{rng.choice(_FIRST)}-{rng.choice(_SECOND)}"
        value = str(rng.randrange(10**6, 10**7)) if task < 3 else str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if key not in text and value not in text:
            hay = sentences(text)
            return _fill(task, tokenizer, context_tokens, depth, key, value, hay, rng.randrange(len(hay)))
    raise UserError("The haystack is full of needles: keys and values that were drawn stand in it; give another text.")


def _fill(
    task: int,
    tokenizer: Tokenizer,
    context: int,
    depth: float,
    key: str,
    value: str,
    hay: Sequence[str],
    start: int,
) -> Example:
    """The example with as many sentences of `hay`, from `start` on and around, as the context has room for."""
    what = "number" if task < 3 else "identifier"
    intro = (
        f"Somewhere in the text below, one {what} is given to a name. Keep it in mind, you will be asked for it.\n\n"
    )
    needle = f"The secret {what} of {key} is {value}."
    question = f"\n\nWhich secret {what} does the text give for {key}? The secret {what} of {key} is"
    answer = len(tokenizer.encode(f" {value}"))

    def chosen(count: int) -> list[str]:
        # Where a text begins anew, a line does.
        picked = [hay[(start + i) % len(hay)] for i in range(count)]
        return [s if s[-1].isspace() or (start + i + 1) % len(hay) else s + "\n" for i, s in enumerate(picked)]

    def around(count: int) -> tuple[str, str]:
        """What stands before and after the needle."""
        picked = chosen(count)
        ends = np.cumsum([0, *map(len, picked)])
        at = int(np.abs(ends - depth / 100 * ends[-1]).argmin())
        before, after = "".join(picked[:at]), "".join(picked[at:])
        # The last sentence before it may have been cut, or the text's last.
        space = "" if not before or before[-1].isspace() else " "
        return intro + before + space, f" {after}".rstrip() + question

    def tokens(count: int) -> int:
        return 1 + len(tokenizer.encode(needle.join(around(count)))) + answer

    most = _most(lambda count: tokens(count) <= context, tokens(1), context)
    if most < 1:
        raise UserError(
            f"A context of {context} tokens is too small for needle task {task}: instructions, needle, question and "
            f"one sentence of haystack take {tokens(1)}; choose a longer one."
        )
    before, after = around(most)
    position = 1 + len(tokenizer.encode(before))
    return Example(before + needle + after, value, key, position, tokens(most))


def _most(fits: Callable[[int], bool], least: int, room: int) -> int:
    """The largest count that fits while the next does not, 0 if 1 does not fit. Doubles, then bisects."""
    if least > room:
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    return low + bisect.bisect_left(range(low + 1, high), True, key=lambda count: not fits(count))


def default_haystack() -> str:
    """A long text that every Python has: a package of its own library."""
    return standard_library_document().text


# -- asking ------------------------------------------------------------------------------------------------------------


class ModelReader:
    """A model that reads the prompt, learning from it if it is one that learns, and writes on."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._read: tuple[str, Session] | None = None

    def answer(self, prompt: str, max_tokens: int) -> str:
        """The likeliest token, again and again. Raises Diverged."""
        return "".join(self._after(prompt).generate(max_tokens=max_tokens, temperature=0.0))

    def nll(self, prompt: str, answer: str) -> float:
        """The loss of `answer` when it is read on after `prompt`. Raises Diverged."""
        session, ids = self._after(prompt).fork(), self.tokenizer.encode(answer)
        losses = np.concatenate((session.read(ids), session.score_pending()))
        return float(losses[-len(ids) :].mean())

    def _after(self, prompt: str) -> Session:
        if self._read is None or self._read[0] != prompt:
            session = Session(self.model, self.tokenizer)
            session.read(prompt)
            self._read = prompt, session
        return self._read[1]


class Result(NamedTuple):
    """What became of one example. found: whether the value was written. nll: nats per token of it; None if none.

    written: what was written. diverged: why the model could not read the prompt, if it could not.
    """

    model: str
    task: int
    context: int
    depth: float
    sample: int
    found: bool
    nll: float | None
    written: str
    diverged: str | None = None


def ask(reader: Reader, tokenizer: Tokenizer, example: Example) -> tuple[bool, float | None, str]:
    """Whether the reader writes the value, its loss for it, and what it writes."""
    expected = f" {example.answer}"
    written = reader.answer(example.prompt, len(tokenizer.encode(expected)) + MORE_TOKENS)
    return example.answer in written, reader.nll(example.prompt, expected), written


def example_of(
    task: int, tokenizer: Tokenizer, context: int, depth: float, sample: int, seed: int, haystack: str | None
) -> Example:
    """The example that `seed` gives for this cell and sample, whatever else is asked."""
    return make(task, tokenizer, context, depth, random.Random(f"{seed}/{task}/{context}/{depth:g}/{sample}"), haystack)


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
) -> list[Result]:
    """Ask every model (a name and its folder); writes needles.json, needles.md and needles.png into the folder `out`.

    samples: examples for each task, context and depth. haystack: a text file for tasks 2 and 3; None for a package of
    Python's own library. Every answer is on the disk before the next question: the same call goes on where it was
    interrupted, and other tasks, contexts, depths, samples and models are added to what is there. Raises UserError
    for values out of range, folders that are no model or have no tokenizer, contexts too small, and if `out` holds
    results of another seed or text, or of another model by the same name.
    """
    if not models or not tasks or not contexts or not depths or samples < 1:
        raise UserError(
            "Needles need at least one model, task, context, depth and sample; "
            f"there are {len(models)}, {len(tasks)}, {len(contexts)}, {len(depths)} and {samples}."
        )
    text = default_haystack() if haystack is None else read_text(Path(haystack))
    plan = {"seed": seed, "dtype": "float32", "haystack": hashlib.sha256(text.encode()).hexdigest()}
    out = Path(out)
    facts, results = _results(out, plan)
    facts["machine"] = machine(choose_device(device))
    done = {result[:5] for result in results}
    asked = [(s, t, c, d) for s in range(samples) for t in tasks for c in contexts for d in depths]
    for name, folder in models.items():  # what could be refused in the middle is refused now
        _, tokenizer = _load(name, folder, device, facts)
        for task in tasks:
            example_of(task, tokenizer, min(contexts), depths[0], 0, seed, text)
    with tqdm(total=len(models) * len(asked), disable=not progress, desc="needles", unit="question") as bar:
        for name, folder in models.items():
            model, tokenizer = _load(name, folder, device, facts)
            reader = ModelReader(model, tokenizer)
            for sample, task, context, depth in asked:
                where = (name, task, context, float(depth), sample)
                if where not in done:
                    bar.set_postfix_str(f"{name}, task {task} at {in_tokens(context)}")
                    example = example_of(task, tokenizer, context, depth, sample, seed, text)
                    try:
                        results.append(Result(*where, *ask(reader, tokenizer, example)))
                    except Diverged as error:
                        results.append(Result(*where, False, None, "", str(error)))
                    _write(out, facts, results)
                bar.update()
    wanted = {(name, t, c, float(d), s) for name in models for s, t, c, d in asked}
    chosen = [result for result in results if result[:5] in wanted]
    write_text(out / "needles.md", needles_table(results, facts))
    needles_picture(results, out / "needles.png")
    return chosen


def _load(name: str, folder: Path, device: str, facts: dict[str, Any]) -> tuple[Transformer, Tokenizer]:
    """A model to ask; its digest is noted. Raises UserError if the results are another's of this name."""
    model, tokenizer = load_reader(Path(folder), choose_device(device))
    digest = model_fingerprint(model)
    before = facts["models"].get(name, digest)
    if before != digest and before != model_digest(model):  # of weights alone: results of before
        raise UserError(f"The results there are of another model called {name!r}; give {folder} another name.")
    facts["models"][name] = digest
    return model, tokenizer


def _results(out: Path, plan: dict[str, Any]) -> tuple[dict[str, Any], list[Result]]:
    """What needles.json holds: its facts, and its results so far."""
    path = out / "needles.json"
    if not path.exists():
        return {**plan, "models": {}}, []
    facts = read_json(path)
    other = [key for key, value in plan.items() if facts.get(key) != value]
    if other:
        raise UserError(f"{path} has results with another {' and another '.join(other)}; choose another folder.")
    return facts, [Result(**result) for result in facts.pop("results")]


def _write(out: Path, facts: dict[str, Any], results: Iterable[Result]) -> None:
    lines = ",\n".join(json.dumps(result._asdict()) for result in results)
    head = json.dumps(facts, indent=1).removesuffix("\n}")
    write_text(out / "needles.json", f'{head},\n "results": [\n{lines}\n]}}\n')


# -- table and picture -------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """The mean over samples: percent found, nats per token of the value (None where there is none), how many."""

    found: float
    nll: float | None
    samples: int


def cells(results: Iterable[Result]) -> dict[tuple[str, int, int, float], Cell]:
    """Means by model, task, context and depth."""
    grouped: dict[tuple[str, int, int, float], list[Result]] = {}
    for result in results:
        grouped.setdefault((result.model, result.task, result.context, result.depth), []).append(result)
    return {key: _cell(some) for key, some in grouped.items()}


def _cell(results: Sequence[Result]) -> Cell:
    losses = [result.nll for result in results if result.nll is not None]
    found = 100 * statistics.mean(result.found for result in results)
    return Cell(found, statistics.mean(losses) if losses else None, len(results))


def needles_table(results: Sequence[Result], facts: dict[str, Any]) -> str:
    """Markdown: percent found and the value's loss by model, task and context, over all depths; then by depth."""
    contexts = sorted({result.context for result in results})
    host = ", ".join(f"{key} {value}" for key, value in facts["machine"].items())
    lines = ["# Needles in a haystack", "", f"Seed {facts['seed']}, {facts['dtype']}. {host}.", ""]
    lines += ["Percent of the values that were written, and the loss of their tokens in nats per token.", ""]
    lines += [
        f"| model | task | depth | {' | '.join(map(in_tokens, contexts))} |",
        "|---|---|---|" + "---|" * len(contexts),
    ]
    by_depth: list[str] = []
    for name, task in sorted({(r.model, r.task) for r in results}, key=lambda pair: (pair[1], pair[0])):
        some = [r for r in results if (r.model, r.task) == (name, task)]
        for depth in (None, *sorted({r.depth for r in some})):
            row = []
            for context in contexts:
                of = [r for r in some if r.context == context and depth in (None, r.depth)]
                row.append(_in_words(_cell(of), " / ") if of else "-")
            line = (
                f"| {name} | {task}: {TASKS[task]} | {'all' if depth is None else f'{depth:g} %'} | {' | '.join(row)} |"
            )
            (lines if depth is None else by_depth).append(line)
    return "\n".join([*lines, *by_depth]) + "\n"


def _in_words(cell: Cell, between: str) -> str:
    return f"{cell.found:.0f} %" + ("" if cell.nll is None else f"{between}{cell.nll:.2f}")


def needles_picture(results: Sequence[Result], path: Path) -> None:
    """Draw a heat map for every model (a column) and task (a row): percent found by context and depth, and the loss."""
    from matplotlib.figure import Figure

    at = cells(results)
    models = list(dict.fromkeys(result.model for result in results))
    tasks = sorted({result.task for result in results})
    contexts, depths = sorted({key[2] for key in at}), sorted({key[3] for key in at})
    size = (2.0 + (1.0 + 0.75 * len(contexts)) * len(models), 0.8 + (0.9 + 0.42 * len(depths)) * len(tasks))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(len(tasks), len(models), squeeze=False)
    for row, task in enumerate(tasks):
        for column, name in enumerate(models):
            axes = panels[row, column]
            grid = np.full((len(depths), len(contexts)), np.nan)
            for i, depth in enumerate(depths):
                for j, context in enumerate(contexts):
                    if (cell := at.get((name, task, context, depth))) is not None:
                        grid[i, j] = cell.found
                        dark = cell.found > 60
                        words = _in_words(cell, "\n")
                        axes.text(j, i, words, ha="center", va="center", fontsize=6, color="w" if dark else "k")
            image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=100, aspect="auto")
            axes.set_xticks(range(len(contexts)), [in_tokens(context) for context in contexts], fontsize=7)
            axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths], fontsize=7)
            if row == 0:
                axes.set_title(name, fontsize=10, parse_math=False)
            if column == 0:
                axes.set_ylabel(f"task {task}\ndepth", fontsize=8)
    bar = figure.colorbar(image, ax=panels, shrink=0.8)
    bar.set_label("found (percent); below it the loss of the value", fontsize=8)
    figure.supxlabel("context (tokens)", fontsize=9)
    with atomic_path(path) as part:
        figure.savefig(part, format="png")
