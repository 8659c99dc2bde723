"""Does a model recall what it read long ago: by what it learned, by its notebook, by both?

    python benchmarks/cloze.py val.parquet                       # the shipped model, 16384 tokens of every book
    python benchmarks/cloze.py val.parquet --books 3 --tokens 4096 --questions 8     # quicker

Needs the extra `parquet`; the file has the columns author, title, text. A book is read once by
a session that learns, by one that does not, and into a notebook. Then questions are asked about sentences at least two
windows before the end: a sentence is repeated up to a word that is rare in the text and does not occur in those two
windows; the answer is that word. Its loss, the mean over the answer's tokens in nats, is measured in five ways: with
neither memory nor notebook; with what the session learned; with passages from the notebook in the window; with both;
and with both, where the session also learns from the passages and the question as it reads them. Otherwise nothing is
learned from those. Differences are taken within each question, and their standard errors are over questions.
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
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session
from ttt_e2e.retrieval.generate import prompt_with_passages
from ttt_e2e.retrieval.notebook import Notebook, passage_size

WAYS = ("neither", "memory", "notebook", "both", "learned")
DIFFERENCES = {
    "memory, no notebook": ("memory", "neither"),
    "notebook, no memory": ("notebook", "neither"),
    "both": ("both", "neither"),
    "memory beside a notebook": ("both", "notebook"),
    "notebook beside a memory": ("both", "memory"),
    "both, and learning from the passages": ("learned", "neither"),
}
MIN_WORDS, MAX_WORDS = 6, 40  # of a sentence before the answer

_WORD = re.compile(r"[A-Za-z]+")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*\s+|\n\s*\n\s*")


class Question(NamedTuple):
    """A question that repeats the characters `start` to `stop` of the text; `answer`, from its space on, follows."""

    start: int
    stop: int
    prompt: str
    answer: str


def questions(text: str, far: int, rare: int, count: int, rng: np.random.Generator) -> list[Question]:
    """At most `count` questions, drawn from one for each sentence of `text` that ends before character `far`."""
    often = Counter(word.lower() for word in _WORD.findall(text))
    recent = {word.lower() for word in _WORD.findall(text[far:])}
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text, 0, far))]
    found = []
    for start, stop in itertools.pairwise(ends):
        words = list(_WORD.finditer(text, start, stop))
        fit = [
            word
            for i, word in enumerate(words)
            if MIN_WORDS <= i <= MAX_WORDS
            and len(word[0]) >= 4
            and text[word.start() - 1] == " "  # so that the answer does not change the tokens of the question
            and often[word[0].lower()] <= rare
            and word[0].lower() not in recent
            and word[0].lower() not in {other[0].lower() for other in words[:i]}
        ]
        if fit:
            cut = fit[rng.integers(len(fit))]
            found.append(Question(start, cut.start() - 1, text[start : cut.start() - 1], f" {cut[0]}"))
    return [found[i] for i in sorted(rng.permutation(len(found))[:count])]


def answer_loss(session: Session, tokenizer: Tokenizer, prompt: str, answer: str, learn: bool) -> float:
    """The mean loss of the answer's tokens after the prompt; the session does not change."""
    fork = session.fork()
    fork.learn = learn
    answer_ids = tokenizer.encode(answer)
    losses = fork.read(np.concatenate((tokenizer.encode(prompt), answer_ids)))
    return float(np.concatenate((losses, fork.score_pending()))[-len(answer_ids) :].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parquet", type=Path, help="books that the model was not trained on")
    parser.add_argument("--model", type=Path, help="a model folder (default: the shipped model)")
    parser.add_argument("--books", type=int, help="read at most N of them (default: all)")
    parser.add_argument("--questions", type=int, default=64, help="per book (default: 64)")
    parser.add_argument("--tokens", type=int, default=16384, help="read per book (default: 16384)")
    parser.add_argument("--rare", type=int, default=3, help="most occurrences of an answer in the text (default: 3)")
    parser.add_argument("--size", type=int, help="characters of a passage (default: by the window)")
    parser.add_argument("--count", type=int, default=3, help="passages per question (default: 3)")
    parser.add_argument("--room", type=int, help="tokens for them (default: half the window)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model)
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
        some = questions(text, far, args.rare, args.questions, rng)
        sums, found = dict.fromkeys(WAYS, 0.0), 0
        with tempfile.TemporaryDirectory() as folder, Notebook(Path(folder), size=size) as notebook:
            notebook.add(text)
            for question in some:
                with_passages, sources = prompt_with_passages(
                    question.prompt, notebook.search(question.prompt, args.count), tokenizer, room
                )
                without = f"\n\n{question.prompt}"
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
        if not some:
            print(f"{book['title']}: too short, or without rare words; no question", file=sys.stderr)
            continue
        means = {way: total / len(some) for way, total in sums.items()}
        rows.append({**{k: book[k] for k in ("author", "title")}, "tokens": len(tokens), "questions": len(some)})
        rows[-1] |= {"found": found, **means}
        shown = ", ".join(f"{way} {mean:.3f}" for way, mean in means.items())
        print(f"{book['title']}: {len(some)} questions, {found} found; {shown}", file=sys.stderr)
    if not rows:
        sys.exit("There is nothing to ask; read more tokens.")

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
            f"\n{result['questions']} questions on {len(result['books'])} books; for {result['found']} a passage in "
            "the window holds the whole sentence.",
        ]
    )


if __name__ == "__main__":
    main()
