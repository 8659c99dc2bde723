"""Whole documents, several at once: what learning while reading is worth, by document and by position.

Every document is a row of a batch with fast weights of its own, all starting at its first token. The rows are sorted by
length, so that those that have ended are dropped from the end of the batch. The losses are those that a `Session` gives
for each document by itself.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ttt_e2e.data.text import Document
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Diverged, batches_without_learning
from ttt_e2e.inference.streaming import read_mini_batch, start_reading
from ttt_e2e.model.transformer import Transformer


@dataclass(frozen=True)
class DocumentResult:
    """One document. Losses in nats per token; None for what a model that does not learn, or a short text, lacks.

    first_quarter, last_quarter: gain of learning in these parts of the document.
    """

    name: str
    tokens: int
    bytes: int
    loss: float
    loss_without: float | None
    gain: float | None
    bits_per_byte: float
    bits_per_byte_without: float | None
    first_quarter: float | None
    last_quarter: float | None


@dataclass(frozen=True)
class PositionResult:
    """Tokens `start` to `stop` of the documents: means over the `documents` that reach to `stop`."""

    start: int
    stop: int
    documents: int
    loss: float
    loss_without: float | None
    gain: float | None


@dataclass(frozen=True)
class EvaluationReport:
    """Means are over documents, each counting the same; `gain_error` is the standard error of the paired difference.

    loss_per_token: over all tokens instead. positions: bins that double in length.
    """

    documents: list[DocumentResult]
    positions: list[PositionResult]
    tokens: int
    loss: float
    loss_without: float | None
    loss_per_token: float
    gain: float | None
    gain_error: float | None
    bits_per_byte: float
    bits_per_byte_without: float | None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self)


class _Text(NamedTuple):
    name: str
    tokens: np.ndarray  # with BOS
    bytes: int


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    *,
    batch: int = 8,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> EvaluationReport:
    """Read every document, up to `max_tokens` of each, with learning and with the same weights frozen.

    batch: how many documents are walked at once. Raises UserError for documents that cannot be read, if there are
    none, and Diverged if a loss is not finite.
    """
    if batch < 1 or (max_tokens is not None and max_tokens < 1):
        raise UserError(f"batch ({batch}) and max_tokens ({max_tokens}) must be at least 1.")
    texts = [_tokenise(tokenizer, document, max_tokens) for document in documents]
    if not texts:
        raise UserError("There are no documents to evaluate on; name text files.")
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens))
    learns = model.config.can_learn
    results: list[DocumentResult | None] = [None] * len(texts)
    bins = _PositionBins(model.config.read_batch)
    total = sum(len(text.tokens) - 1 for text in texts) * (1 + learns)
    with tqdm(total=total, unit="token", unit_scale=True, disable=not progress, desc="evaluating") as bar:
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            some = [texts[i] for i in rows]
            frozen = _walk(model, some, False, dtype, bar)
            learned = _walk(model, some, True, dtype, bar) if learns else None
            for row, i in enumerate(rows):
                loss, without = (frozen[row], None) if learned is None else (learned[row], frozen[row])
                results[i] = _result(texts[i], loss, without)
                bins.add(loss, without)
    return _report([result for result in results if result is not None], bins.results())


def _tokenise(tokenizer: Tokenizer, document: Document, max_tokens: int | None) -> _Text:
    parts, count = [np.array([tokenizer.bos])], 0
    for tokens in tokenizer.encode_pieces(document.pieces()):
        parts.append(tokens if max_tokens is None else tokens[: max_tokens - count])
        count += len(parts[-1])
        if count == max_tokens:
            break
    if count == 0:
        raise UserError(f"{document.name} is empty; leave it out.")
    size = sum(len(tokenizer.decode(tokens).encode("utf-8", "replace")) for tokens in parts[1:])
    return _Text(document.name, np.concatenate(parts).astype(np.int32), size)


def _walk(model: Transformer, texts: list[_Text], learn: bool, dtype: torch.dtype, bar: tqdm) -> list[np.ndarray]:
    """The losses of every text, float32; `texts` sorted by length, the longest first."""
    config, device = model.config, model.embedding.device
    length = config.read_batch * (1 if learn else batches_without_learning(config))
    counts = [len(text.tokens) - 1 for text in texts]
    losses = [np.empty(count, np.float32) for count in counts]
    state = start_reading(model, len(texts), dtype)
    if learn:  # memory of each text's own, to learn in place; without learning all share the model's
        state = state.map(torch.clone)
    for start in range(0, counts[0], length):
        rows = sum(count > start for count in counts)
        state = state.map(itemgetter(slice(rows)))
        stop = min(start + length, counts[0])
        ids = np.zeros((rows, stop - start + 1), np.int64)
        mask = np.zeros((rows, stop - start), np.float32)
        for row in range(rows):
            some = texts[row].tokens[start : stop + 1]
            ids[row, : len(some)] = some
            mask[row, : len(some) - 1] = 1
        ids_BT = torch.from_numpy(ids).to(device)
        state, nll_BT, _ = read_mini_batch(
            model,
            state,
            ids_BT[:, :-1],
            ids_BT[:, 1:],
            torch.from_numpy(mask).to(device),
            learn=learn,
            dtype=dtype,
            in_place=learn,
        )
        nll = nll_BT.float().cpu().numpy()
        for row in range(rows):
            count = min(counts[row], stop) - start
            losses[row][start : start + count] = nll[row, :count]
            if not np.isfinite(nll[row, :count]).all():
                how = "with learning" if learn else "without learning"
                raise Diverged(
                    f"Reading {texts[row].name} {how}, a loss is not finite at tokens {start} to {start + count}; "
                    "use another model, or --max-tokens to stop before.",
                    start,
                )
        bar.update(int(mask.sum()))
    return losses


def _result(text: _Text, loss: np.ndarray, without: np.ndarray | None) -> DocumentResult:
    tokens = len(loss)
    to_bits = tokens / math.log(2) / max(text.bytes, 1)
    mean = _mean(loss)
    mean_without = None if without is None else _mean(without)
    quarter = tokens // 4
    first = last = None
    if without is not None and quarter:
        first = _mean(without[:quarter]) - _mean(loss[:quarter])
        last = _mean(without[-quarter:]) - _mean(loss[-quarter:])
    return DocumentResult(
        name=text.name,
        tokens=tokens,
        bytes=text.bytes,
        loss=mean,
        loss_without=mean_without,
        gain=None if mean_without is None else mean_without - mean,
        bits_per_byte=mean * to_bits,
        bits_per_byte_without=None if mean_without is None else mean_without * to_bits,
        first_quarter=first,
        last_quarter=last,
    )


def _mean(losses: np.ndarray) -> float:
    return float(losses.mean(dtype=np.float64))


class _PositionBins:
    """Mean losses of documents in [0, b), [b, 2b), [2b, 4b), ...; only where a document fills the bin."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._bins: list[list[tuple[float, float | None]]] = []

    def _edges(self, i: int) -> tuple[int, int]:
        return (self._first << (i - 1) if i else 0), self._first << i

    def add(self, loss: np.ndarray, without: np.ndarray | None) -> None:
        i = 0
        while self._edges(i)[1] <= len(loss):
            start, stop = self._edges(i)
            if i == len(self._bins):
                self._bins.append([])
            self._bins[i].append((_mean(loss[start:stop]), None if without is None else _mean(without[start:stop])))
            i += 1

    def results(self) -> list[PositionResult]:
        results = []
        for i, pairs in enumerate(self._bins):
            loss = sum(pair[0] for pair in pairs) / len(pairs)
            withouts = [pair[1] for pair in pairs if pair[1] is not None]
            without = sum(withouts) / len(withouts) if withouts else None
            gain = None if without is None else without - loss
            results.append(PositionResult(*self._edges(i), len(pairs), loss, without, gain))
        return results


def _report(documents: list[DocumentResult], positions: list[PositionResult]) -> EvaluationReport:
    def mean(values: list[float | None]) -> float | None:
        present = [value for value in values if value is not None]
        return float(np.mean(present)) if present else None

    gains = [document.gain for document in documents if document.gain is not None]
    tokens = sum(document.tokens for document in documents)
    return EvaluationReport(
        documents=documents,
        positions=positions,
        tokens=tokens,
        loss=float(np.mean([document.loss for document in documents])),
        loss_without=mean([document.loss_without for document in documents]),
        loss_per_token=sum(document.loss * document.tokens for document in documents) / tokens,
        gain=mean([document.gain for document in documents]),
        gain_error=standard_error(gains),
        bits_per_byte=float(np.mean([document.bits_per_byte for document in documents])),
        bits_per_byte_without=mean([document.bits_per_byte_without for document in documents]),
    )


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of their mean, with the unbiased variance; None for fewer than two."""
    if len(values) < 2:
        return None
    middle = sum(values) / len(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


def table(report: EvaluationReport) -> str:
    """The report as text: one line a document, their mean, and the losses by position."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    columns = f"{'without':>10}{'learning':>10}{'gain':>9}"
    lines = [f"{'document':<28}{'tokens':>10}{columns}{'bits/byte':>11}{'last quarter':>14}"]
    for document in report.documents:
        name = document.name if len(document.name) <= 27 else f"{document.name[:26]}…"
        learned = document.loss if document.gain is not None else None
        without = document.loss if document.gain is None else document.loss_without
        lines.append(
            f"{name:<28}{document.tokens:>10,}{number(without, '.4f'):>10}{number(learned, '.4f'):>10}"
            f"{number(document.gain, '+.4f'):>9}{document.bits_per_byte:>11.4f}"
            f"{number(document.last_quarter, '+.4f'):>14}"
        )
    learned = report.loss if report.gain is not None else None
    without = report.loss if report.gain is None else report.loss_without
    error = f"  (gain ± {report.gain_error:.4f})" if report.gain_error is not None else ""
    lines.append(
        f"{'mean over documents':<28}{report.tokens:>10,}{number(without, '.4f'):>10}{number(learned, '.4f'):>10}"
        f"{number(report.gain, '+.4f'):>9}{report.bits_per_byte:>11.4f}{error}"
    )
    if report.positions:
        lines += [
            "",
            f"{'position in the document':<28}{'documents':>10}{'without':>10}{'learning':>10}{'gain':>9}",
        ]
        for bin_ in report.positions:
            learned = bin_.loss if bin_.gain is not None else None
            without = bin_.loss if bin_.gain is None else bin_.loss_without
            lines.append(
                f"{f'{bin_.start:,} to {bin_.stop:,}':<28}{bin_.documents:>10}{number(without, '.4f'):>10}"
                f"{number(learned, '.4f'):>10}{number(bin_.gain, '+.4f'):>9}"
            )
    lines += ["", "Losses and gains in nats per token; the gain of learning is positive where it helps."]
    return "\n".join(lines)
