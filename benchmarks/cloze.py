"""Does a model find again what it read long ago: by what it learned, by its notebook, by both?

    python benchmarks/cloze.py val.parquet                       # the shipped model, 16384 tokens of every book
    python benchmarks/cloze.py val.parquet --books 3 --tokens 4096 --questions 8     # quicker

Needs the extras `notebook` and `parquet`; the parquet file has the columns author, title, text. A book is read once,
by a session that learns, by one that does not, and into a notebook. Then questions are asked about sentences that lie
at least two windows before the end: a sentence is begun again and cut before a word that is rare in what was read and
does not occur in those two windows; the answer is that word. Its loss, in nats per token and averaged over a question's
answer first, is taken four ways: with neither, with what was learned, with noted passages in the window, with both; and
a fifth way, with both where the session also learns from the passages and the question as it reads them. Otherwise
nothing is learned from those. Differences are taken within each question, and their standard errors are over questions.
"""

import argparse
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet
import torch

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.evaluation.documents import standard_error
from ttt_e2e.hardware import machine
from ttt_e2e.inference.session import Session, load_reader
from ttt_e2e.retrieval.notebook import Notebook, passage_size, prompt_with_passages

WAYS = ("neither", "memory", "notebook", "both", "learned")
DIFFERENCES = {
    "memory, no notebook": ("memory", "neither"),
    "notebook, no memory": ("notebook", "neither"),
    "both": ("both", "neither"),
    "memory beside a notebook": ("both", "notebook"),
    "notebook beside a memory": ("both", "memory"),
    "both, and learning from the passages": ("learned", "neither"),
}
FEWEST_WORDS, MOST_WORDS = 6, 40  # of a sentence, ahead of the answer

_WORD = re.compile(r"[A-Za-z]+")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*\s+|\n\s*\n\s*")


class Question(NamedTuple):
    """Characters `start` to `stop` of what was read are asked, `answer` follows there, with the space before it."""

    start: int
    stop: int
    asked: str
    answer: str


def questions(text: str, far: int, rare: int, count: int, rng: np.random.Generator) -> list[Question]:
    """At most `count` questions, drawn among all: one of each sentence of `text` that ends before character `far`."""
    often = Counter(word.lower() for word in _WORD.findall(text))
    recent = {word.lower() for word in _WORD.findall(text[far:])}
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text, 0, far))]
    found = []
    for start, stop in itertools.pairwise(ends):
        words = list(_WORD.finditer(text, start, stop))
        fit = [
            word
            for i, word in enumerate(words)
            if FEWEST_WORDS <= i <= MOST_WORDS
            and len(word[0]) >= 4
            and text[word.start() - 1] == " "  # so that the question's tokens are the same with the answer after it
            and often[word[0].lower()] <= rare
            and word[0].lower() not in recent
            and word[0].lower() not in {other[0].lower() for other in words[:i]}
        ]
        if fit:
            cut = fit[rng.integers(len(fit))]
            found.append(Question(start, cut.start() - 1, text[start : cut.start() - 1], f" {cut[0]}"))
    return [found[i] for i in sorted(rng.permutation(len(found))[:count])]


def answer_loss(session: Session, tokenizer: Tokenizer, asked: str, answer: str, learn: bool) -> float:
    """The mean loss of the answer's tokens after what the session has read and the question; it stays as it is."""
    fork = session.fork()
    fork.learn = learn
    answer_ids = tokenizer.encode(answer)
    losses = fork.read(np.concatenate((tokenizer.encode(asked), answer_ids)))
    return float(np.concatenate((losses, fork.score_pending()))[-len(answer_ids) :].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parquet", type=Path, help="books that the model was not trained on")
    parser.add_argument("--model", type=Path, help="a model folder (default: the shipped model)")
    parser.add_argument("--books", type=int, help="only the first so many (default: all)")
    parser.add_argument("--questions", type=int, default=64, help="of each book (default: 64)")
    parser.add_argument("--tokens", type=int, default=16384, help="read of each book (default: 16384)")
    parser.add_argument("--rare", type=int, default=3, help="an answer occurs so often at most (default: 3)")
    parser.add_argument("--size", type=int, help="characters of a passage (default: what suits the window)")
    parser.add_argument("--count", type=int, default=3, help="passages to look up (default: 3)")
    parser.add_argument("--room", type=int, help="tokens for them (default: half the window)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_reader(args.model)
    window = model.config.sliding_window
    room = window // 2 if args.room is None else args.room
    size = passage_size(window) if args.size is None else args.size
    books = pyarrow.parquet.read_table(args.parquet, columns=["author", "title", "text"]).slice(0, args.books)

    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    rows, started = [], time.perf_counter()
    for number, book in enumerate(books.to_pylist()):
        tokens = tokenizer.encode(book["text"][: 16 * args.tokens])[: args.tokens]
        text = tokenizer.decode(tokens)
        far = len(tokenizer.decode(tokens[: -2 * window]))
        rng = np.random.default_rng((args.seed, number))
        memory, twin = Session(model, tokenizer), Session(model, tokenizer, learn=False)
        memory.read(tokens)
        twin.read(tokens)
        sums, found, asked = dict.fromkeys(WAYS, 0.0), 0, questions(text, far, args.rare, args.questions, rng)
        with tempfile.TemporaryDirectory() as folder, Notebook(Path(folder), size=size) as notebook:
            notebook.add(text)
            for question in asked:
                with_passages, sources = prompt_with_passages(
                    question.asked, notebook.search(question.asked, args.count), tokenizer, room
                )
                without = f"\n\n{question.asked}"
                ways = (
                    (twin, without, False),
                    (memory, without, False),
                    (twin, with_passages, False),
                    (memory, with_passages, False),
                    (memory, with_passages, memory.learn),
                )
                for way, (reader, prompt, learn) in zip(WAYS, ways, strict=True):
                    loss = answer_loss(reader, tokenizer, prompt, question.answer, learn)
                    losses[way].append(loss)
                    sums[way] += loss
                end = question.stop + len(question.answer)
                found += any(source.start <= question.start and end <= source.stop for source in sources)
        if not asked:
            print(f"{book['title']}: too short, or no rare words; no question", file=sys.stderr)
            continue
        means = {way: total / len(asked) for way, total in sums.items()}
        rows.append({**{k: book[k] for k in ("author", "title")}, "tokens": len(tokens), "questions": len(asked)})
        rows[-1] |= {"found": found, **means}
        shown = ", ".join(f"{way} {mean:.3f}" for way, mean in means.items())
        print(f"{book['title']}: {len(asked)} questions, {found} found; {shown}", file=sys.stderr)
    if not rows:
        sys.exit("There was nothing to ask; read more tokens.")

    def differences(of: str, against: str) -> list[float]:
        return [a - b for a, b in zip(losses[of], losses[against], strict=True)]

    result = {
        "losses": {w: {"mean": statistics.fmean(v), "error": standard_error(v)} for w, v in losses.items()},
        "differences": {
            name: {"mean": statistics.fmean(d), "error": standard_error(d)}
            for name, d in ((name, differences(*pair)) for name, pair in DIFFERENCES.items())
        },
        "questions": len(losses["neither"]),
        "found": sum(row["found"] for row in rows),
        "books": rows,
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "b": model.config.mini_batch_size,
            "k": window,
        },
        "options": {k: getattr(args, k) for k in ("tokens", "questions", "rare", "count", "seed", "threads")}
        | {"room": room, "size": size},
        "seconds": time.perf_counter() - started,
        "machine": machine(),
    }
    print(table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def table(result: dict) -> str:
    """The results as two tables of markdown."""

    def number(value: dict, sign: str = "") -> str:
        error = "" if value["error"] is None else f" ± {value['error']:.3f}"
        return f"{value['mean']:{sign}.3f}{error}"

    loss = {way: number(value) for way, value in result["losses"].items()}
    return "\n".join(
        [
            "| nats per answer token | no notebook | notebook |\n|---|---|---|",
            f"| no memory | {loss['neither']} | {loss['notebook']} |",
            f"| memory | {loss['memory']} | {loss['both']}; passages learned from: {loss['learned']} |",
            "\n| what it changes | difference |\n|---|---|",
            *(f"| {name} | {number(value, '+')} |" for name, value in result["differences"].items()),
            f"\n{result['questions']} questions on {len(result['books'])} books; for {result['found']} the sentence "
            "stood whole in a passage that found room.",
        ]
    )


if __name__ == "__main__":
    main()
