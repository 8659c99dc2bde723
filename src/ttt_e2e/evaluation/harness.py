"""The models of this project under `lm-eval`, the evaluation harness, with learning or without.

    python -m ttt_e2e.evaluation.harness run --model ttt-e2e --model_args pretrained=run/model --tasks arc_easy

It is the harness's own command line with one model more. A request's context is read as a text is: the model learns
from each whole mini-batch of it, and then scores or writes what the request asks for. Every request begins afresh.
`learn=false` reads without learning.

Shapes: B requests, T tokens, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import DTYPES, LOGITS, Session, load_reader
from ttt_e2e.inference.streaming import forward, read_mini_batch, start_reading
from ttt_e2e.training.parallelize import choose_device

Score = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether every token of it was the likeliest."""


@register_model("ttt-e2e")
class HarnessModel(TemplateLM):
    """A model folder as the harness wants it.

    pretrained: the folder (default: the shipped model). learn: whether the model learns while it reads. dtype: of the
    matrix products, "float32" or "bfloat16". device: "auto", "cpu" or "cuda". batch_size: requests at once where none
    of them is long enough to learn from. max_gen_toks: tokens to write where a task does not say. Raises UserError for
    values that do not fit.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        learn: bool | str = True,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 16,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise UserError(f"There is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
        if str(learn).lower() not in ("true", "false"):
            raise UserError(f"learn must be true or false, not {learn!r}.")
        if batch_size == "auto":
            batch_size = 16
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size must be a number from 1 on, not {batch_size!r}.")
        # The harness's command line asks for cuda:0 unless it is told otherwise.
        absent = device is None or (device.startswith("cuda") and not torch.cuda.is_available())
        self._device = choose_device("auto" if absent else str(device))
        self.model, self.texts = load_reader(None if pretrained is None else Path(pretrained), self._device)
        self.fresh = Session(self.model, self.texts, learn=str(learn).lower() == "true", dtype=DTYPES[dtype])
        self.batch_size, self.max_gen_toks = int(batch_size), max_gen_toks
        self._name = f"ttt-e2e {pretrained or 'shipped'}"

    @property
    def eot_token_id(self) -> int:
        """The token that begins every document, and so ends the one before."""
        return self.texts.bos

    @property
    def tokenizer_name(self) -> str:
        """Tells the caches of requests apart."""
        return self._name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of `string`, without BOS: a session begins with it by itself."""
        return self.texts.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Score]:
        scores: list[Score] = [(0.0, True)] * len(requests)
        # Requests of one context stand together, and those of about the same length.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i][1]), requests[i][1], len(requests[i][2])))
        longest = self.fresh.mini_batch
        short = [i for i in order if len(requests[i][1]) + len(requests[i][2]) <= longest]
        long = [i for i in order if len(requests[i][1]) + len(requests[i][2]) > longest]
        with tqdm(total=len(requests), disable=disable_tqdm, desc="scoring") as bar:
            for start in range(0, len(short), self.batch_size):
                some = short[start : start + self.batch_size]
                found = self._score_short([(self._body(requests[i][1]), requests[i][2]) for i in some])
                for i, score in zip(some, found, strict=True):
                    scores[i] = score
                bar.update(len(some))
            context: list[int] | None = None
            session = self.fresh
            for i in long:
                if requests[i][1] != context:
                    context, session = requests[i][1], self.fresh.fork()
                    session.read(np.array(self._body(context), np.int64))
                scores[i] = self._score(session, requests[i][2])
                bar.update(1)
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], score)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each read from its first token to its last, as one."""
        sums = []
        for request in tqdm(requests, disable=disable_tqdm, desc="reading"):
            session = self.fresh.fork()
            losses = [*session.read_pieces([request.args[0]]), session.score_pending()]
            sums.append(-float(np.concatenate(losses).astype(np.float64).sum()))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[-1])
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written after each context, up to the first stop string of the request, or its number of tokens."""
        texts = []
        asked: Counter[str] = Counter()  # the harness repeats a request to have another text
        for request in tqdm(requests, disable=disable_tqdm, desc="writing"):
            context, options = request.args
            again = asked[repr(request.args)]
            asked[repr(request.args)] += 1
            wanted = dict(normalize_gen_kwargs(options, self.max_gen_toks))
            names = ("temperature", "top_p", "top_k", "min_p")
            sampling = {"temperature": 0.0} | {name: wanted[name] for name in names if name in wanted}
            stop = [text for text in wanted["until"] if text]
            pieces = self.fresh.generate(context, max_tokens=wanted["max_gen_toks"], stop=stop, seed=again, **sampling)
            texts.append("".join(pieces))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    # -- scoring ---------------------------------------------------------------------------------------------------

    def _body(self, context: Sequence[int]) -> list[int]:
        """The context without the BOS that the harness puts where there is none: a session has it already."""
        return list(context[1:] if context and context[0] == self.texts.bos else context)

    def _score_short(self, pairs: list[tuple[list[int], list[int]]]) -> list[Score]:
        """Score continuations, each after its context; all that nothing is learned from, in one call."""
        rows = [[self.texts.bos, *context, *continuation] for context, continuation in pairs]
        ids_BT = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for row, ids in zip(ids_BT, rows, strict=True):
            row[: len(ids)] = ids  # what stands behind is never seen: every mixer is causal
        tokens_BT = torch.from_numpy(ids_BT).to(self._device)
        at_once = max(1, LOGITS // (ids_BT.shape[1] * self.model.config.vocab_size))
        judged = []
        for some_BT in tokens_BT.split(at_once):
            state = start_reading(self.model, len(some_BT), self.fresh.dtype)
            logits_BTV, _ = forward(self.model, state, some_BT[:, :-1], self.fresh.dtype)
            judged.append(_judged(logits_BTV, some_BT[:, 1:]))
        nll_BT, greedy_BT = (np.concatenate(parts) for parts in zip(*judged, strict=True))
        spans = [slice(len(ids) - 1 - len(pair[1]), len(ids) - 1) for ids, pair in zip(rows, pairs, strict=True)]
        return [
            (-float(nll[span].sum()), bool(greedy[span].all()))
            for nll, greedy, span in zip(nll_BT, greedy_BT, spans, strict=True)
        ]

    def _score(self, session: Session, continuation: list[int]) -> Score:
        """Score a continuation after what `session` has read, and learn on the way where a mini-batch fills."""
        if not continuation:
            return 0.0, True
        parts = list(self._walk(session, continuation))
        nll, greedy = (np.concatenate([part[i] for part in parts])[-len(continuation) :] for i in (0, 1))
        return -float(nll.sum()), bool(greedy.all())

    def _walk(self, session: Session, ids: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Losses and likeliest-or-not of everything that is pending in `session`, and of `ids` after it."""
        state, pending = session.standing().state, session.standing().pending
        left, size = np.concatenate((pending, np.array(ids, np.int64))), session.mini_batch
        while len(left) > 1:
            tokens_1T = torch.from_numpy(left[: size + 1]).to(self._device)[None]
            inputs_1T, targets_1T = tokens_1T[:, :-1], tokens_1T[:, 1:]
            logits_1TV, _ = forward(self.model, state, inputs_1T, session.dtype)
            nll_1T, greedy_1T = _judged(logits_1TV, targets_1T)
            yield nll_1T[0], greedy_1T[0]
            if len(left) > size + 1:  # else nothing would read what is learned
                state, _, _ = read_mini_batch(
                    self.model, state, inputs_1T, targets_1T, learn=session.learn, dtype=session.dtype
                )
            left = left[size:]


def _judged(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Each target's loss in nats, float64 [B, T], and whether it was the likeliest token."""
    logits_BTV = logits_BTV.float()
    nll_BT = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)
    greedy_BT = logits_BTV.argmax(-1) == targets_BT
    return nll_BT.double().cpu().numpy(), greedy_BT.cpu().numpy()


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
