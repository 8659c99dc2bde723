"""What learning while reading is worth on whole documents, by document and by position.

Several documents are read at once, each as a row of a batch with fast weights of its own, from its first token. The
rows are sorted by length, so that documents that have ended are dropped from the end of the batch. The losses are those
of a `Session` that reads the document alone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from ttt_e2e.data.text import Document
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.divergence import Diverged, find_divergence
from ttt_e2e.inference.row_batch import chunk_size, read_rows
from ttt_e2e.inference.streaming import start_reading
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.progress import ProgressBar


@dataclass(frozen=True)
class DocumentResult:
    """One document. Losses in nats per token; None for what a standard model or a short document does not have."""

    name: str
    tokens: int
    bytes: int
    loss: float
    loss_without: float | None  # learning
    gain: float | None
    bits_per_byte: float
    bits_per_byte_without: float | None
    first_quarter: float | None  # the gain in this part of the document
    last_quarter: float | None


@dataclass(frozen=True)
class PositionResult:
    """Tokens `start` to `stop` of the documents: means over the `documents` that reach `stop`."""

    start: int
    stop: int
    documents: int
    loss: float
    loss_without: float | None
    gain: float | None


@dataclass(frozen=True)
class EvaluationReport:
    """Means over documents, each of which counts the same."""

    documents: list[DocumentResult]
    positions: list[PositionResult]  # bins that double in length
    tokens: int
    loss: float
    loss_without: float | None
    loss_per_token: float  # mean over all tokens instead
    gain: float | None
    gain_error: float | None  # standard error of the paired difference
    bits_per_byte: float
    bits_per_byte_without: float | None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self)


class _Text(NamedTuple):
    name: str
    tokens: np.ndarray  # with BOS
    bytes: int


def evaluate_documents(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    *,
    batch: int = 8,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> EvaluationReport:
    """Read every document with learning, and with the same weights without.

    Args:
        model, tokenizer: as `load_model` returns them.
        documents: to read. Their tokens are in memory all at once.
        batch: how many documents are read at once.
        max_tokens: read at most so many tokens of each; None: all.
        dtype: of the matrix products.
        progress: whether to show a bar.

    Raises:
        UserError: a document is empty or cannot be read, or there are none.
        Diverged: learning diverged on a document.
    """
    if batch < 1 or (max_tokens is not None and max_tokens < 1):
        raise UserError(f"batch ({batch}) and max_tokens ({max_tokens}) must be at least 1.")
    texts = [_tokenise(tokenizer, document, max_tokens) for document in documents]
    if not texts:
        raise UserError("There are no documents to evaluate on; name text files.")
    by_length = sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens))
    learns = model.config.can_learn
    losses: list[list[np.ndarray]] = [[] for _ in texts]  # without learning, and with it if the model can learn
    total = sum(len(text.tokens) - 1 for text in texts) * (1 + learns)
    with ProgressBar(total=total, unit="token", unit_scale=True, disable=not progress, desc="evaluating") as bar:
        for first in range(0, len(texts), batch):
            rows = by_length[first : first + batch]
            for learn in (False, True) if learns else (False,):
                for i, nll in zip(rows, _read(model, [texts[i] for i in rows], learn, dtype, bar), strict=True):
                    losses[i].append(nll)
    results = [_document_result(text, *both) for text, both in zip(texts, losses, strict=True)]
    positions = _by_position([losses[i] for i in by_length], model.config.tokens_per_read)

    means: dict[str, Any] = {}
    for name in ("loss", "loss_without", "gain", "bits_per_byte", "bits_per_byte_without"):
        values = [getattr(document, name) for document in results]
        means[name] = None if None in values else _mean(values)
    tokens = sum(document.tokens for document in results)
    per_token = sum(document.loss * document.tokens for document in results) / tokens
    error = standard_error([document.gain for document in results if document.gain is not None])
    return EvaluationReport(results, positions, tokens, loss_per_token=per_token, gain_error=error, **means)


def _tokenise(tokenizer: Tokenizer, document: Document, max_tokens: int | None) -> _Text:
    parts, count = [np.array([tokenizer.bos])], 0
    for tokens in tokenizer.encode_chunks(document.chunks()):
        parts.append(tokens if max_tokens is None else tokens[: max_tokens - count])
        count += len(parts[-1])
        if count == max_tokens:
            break
    if count == 0:
        raise UserError(f"{document.name} is empty; leave it out.")
    size = sum(len(tokenizer.decode(tokens).encode("utf-8", "replace")) for tokens in parts[1:])
    return _Text(document.name, np.concatenate(parts).astype(np.int32), size)


def _read(
    model: Transformer, texts: list[_Text], learn: bool, dtype: torch.dtype, bar: ProgressBar
) -> list[np.ndarray]:
    """The losses of every text, float32. `texts` are sorted by length, the longest first."""
    size, vocab_size = chunk_size(model, learn), model.config.vocab_size
    counts = [len(text.tokens) - 1 for text in texts]
    losses = [np.empty(count, np.float32) for count in counts]
    rows, state = len(texts), start_reading(model, len(texts), dtype)
    if learn:  # in memory of its own, to be donated; without learning all rows share the model's weights
        state = state.map(torch.clone)
    for start in range(0, counts[0], size):
        if counts[rows - 1] <= start:
            rows = sum(count > start for count in counts)
            state = state.map(itemgetter(slice(rows)))
        stop = min(start + size, counts[0])
        parts = [text.tokens[start : stop + 1].astype(np.int64) for text in texts[:rows]]
        ids = [np.pad(part, (0, stop - start + 1 - len(part))) for part in parts]
        mask = np.stack([np.arange(stop - start) < len(part) - 1 for part in parts]).astype(np.float32)
        mask_BT = torch.from_numpy(mask).to(model.embedding.device)
        state, nll, norms = read_rows(model, state, ids, mask_Bb=mask_BT, learn=learn, dtype=dtype, donate_state=learn)
        for row in range(rows):
            count = min(counts[row], stop) - start
            losses[row][start : start + count] = nll[row, :count]
            norm = norms[row] if counts[row] > stop else 0.0  # nothing more is read with what was learned
            found = find_divergence(nll[row, :count], norm, start, vocab_size, learns=learn, text=texts[row].name)
            if found is not None:
                advice = "Use a model with a smaller inner_loop.lr, or --max-tokens to stop before."
                raise Diverged(f"Learning diverged: {found[0]}. {advice}", start, found[0])
        bar.update(int(mask.sum()))
    return losses


def _document_result(text: _Text, without: np.ndarray, learned: np.ndarray | None = None) -> DocumentResult:
    tokens, quarter = len(without), len(without) // 4
    loss, loss_without, gain = _compare(_mean(without), None if learned is None else _mean(learned))
    first = last = None
    if learned is not None and quarter:
        first = _mean(without[:quarter]) - _mean(learned[:quarter])
        last = _mean(without[-quarter:]) - _mean(learned[-quarter:])
    to_bits = tokens / math.log(2) / max(text.bytes, 1)
    bits = loss * to_bits, None if loss_without is None else loss_without * to_bits
    return DocumentResult(text.name, tokens, text.bytes, loss, loss_without, gain, *bits, first, last)


def _by_position(losses: list[list[np.ndarray]], b: int) -> list[PositionResult]:
    """Means over tokens 0 to b, b to 2 b, 2 b to 4 b, ... of the documents that fill the bin."""
    results: list[PositionResult] = []
    start, stop = 0, b
    while reaching := [both for both in losses if len(both[0]) >= stop]:
        means = [_mean([_mean(nll[start:stop]) for nll in one]) for one in zip(*reaching, strict=True)]
        results.append(PositionResult(start, stop, len(reaching), *_compare(*means)))
        start, stop = stop, 2 * stop
    return results


def _compare(without: float, learned: float | None = None) -> tuple[float, float | None, float | None]:
    """The loss, that without learning, and the gain of learning."""
    return (without, None, None) if learned is None else (learned, without, without - learned)


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64))


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of `values`, with the unbiased variance; None for fewer than two."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def format_report(report: EvaluationReport) -> str:
    """The report as text: one line for each document, their mean, and the losses by position."""

    def number(value: float | None, form: str = ".4f") -> str:
        return "-" if value is None else format(value, form)

    def losses(result: DocumentResult | PositionResult | EvaluationReport) -> str:
        learned, without = (None, result.loss) if result.gain is None else (result.loss, result.loss_without)
        return f"{number(without):>10}{number(learned):>10}{number(result.gain, '+.4f'):>9}"

    columns = f"{'without':>10}{'learning':>10}{'gain':>9}"
    lines = [f"{'document':<28}{'tokens':>10}{columns}{'bits/byte':>11}{'last quarter':>14}"]
    for document in report.documents:
        name = document.name if len(document.name) <= 27 else f"{document.name[:26]}…"
        lines.append(
            f"{name:<28}{document.tokens:>10,}{losses(document)}{document.bits_per_byte:>11.4f}"
            f"{number(document.last_quarter, '+.4f'):>14}"
        )
    error = f"  (gain ± {report.gain_error:.4f})" if report.gain_error is not None else ""
    lines.append(f"{'mean over documents':<28}{report.tokens:>10,}{losses(report)}{report.bits_per_byte:>11.4f}{error}")
    if report.positions:
        lines += ["", f"{'position in the document':<28}{'documents':>10}{columns}"]
        for position in report.positions:
            span = f"{position.start:,} to {position.stop:,}"
            lines.append(f"{span:<28}{position.documents:>10}{losses(position)}")
    lines += ["", "Losses and gains in nats per token; the gain of learning is positive where it helps."]
    return "\n".join(lines)
