"""Models of this package under `lm-eval`, the evaluation harness.

    python -m ttt_e2e.evaluation.harness run --model ttt-e2e --model_args pretrained=run/model --tasks arc_easy

This is the harness's own command line with one more model. A request's context is read as any text is: the model learns
from each full mini-batch of it, and then scores or generates what the request asks for. Every request starts from the
model's own weights. `learn=false` reads without learning.

Shapes: B requests, T tokens, V vocabulary.
"""

import copy
import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from torch.nn.utils.rnn import pad_sequence

from ttt_e2e.errors import UserError
from ttt_e2e.hardware import choose_device
from ttt_e2e.inference.chat_template import JinjaTemplate, MessagesRefusedError
from ttt_e2e.inference.divergence import Diverged, find_divergence
from ttt_e2e.inference.load import ChatTemplate, chat_template, load_model, shipped_model
from ttt_e2e.inference.row_batch import MAX_LOGITS
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import DTYPES
from ttt_e2e.inference.streaming import forward, start_reading
from ttt_e2e.progress import ProgressBar

# Why this model has no such argument.
_REFUSED = {
    "tokenizer": "its tokenizer is that in the folder, leave it out",
    "max_length": "it reads texts of any length, leave it out",
    "truncation": "it reads texts of any length, leave it out",
}

Score = tuple[float, bool]  # log-likelihood of a continuation in nats, and whether all its tokens were the likeliest


@register_model("ttt-e2e")
class HarnessModel(TemplateLM):
    """A model folder with the harness's interface.

    Args:
        pretrained: the folder (default: the shipped model).
        learn: whether the model learns while it reads.
        dtype: of the matrix products, "float32" or "bfloat16"; "auto" is float32, as the weights are.
        device: "auto", "cpu" or "cuda".
        batch_size: requests at once that are too short to learn from; "auto" is 16.
        max_gen_toks: how many tokens to generate where a task does not say.
        add_bos_token, max_batch_size, trust_remote_code: what the harness passes to any model. A text always begins
            with BOS; the others change nothing.
        others: what other models accept.

    Raises:
        UserError: a value is invalid, or another argument is given.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        learn: bool | str = True,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str | None = 16,
        max_gen_toks: int | str = 256,
        add_bos_token: bool | str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        others = {name: value for name, value in others.items() if value is not None}
        if others:
            why = _REFUSED.get(next(iter(others)), "it has pretrained, learn, dtype, device, batch_size, max_gen_toks")
            raise UserError(f"The model ttt-e2e takes no {next(iter(others))}=: {why}.")
        dtype = str(dtype).removeprefix("torch.").replace("auto", "float32")
        if dtype not in DTYPES:
            raise UserError(f"There is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
        if str(learn).lower() not in ("true", "false"):
            raise UserError(f"learn must be true or false, not {learn!r}.")
        if str(add_bos_token).lower() not in ("true", "none"):
            raise UserError("The model ttt-e2e begins every text with BOS; leave add_bos_token= out.")
        automatic = batch_size is None or re.fullmatch(r"auto(:\d+)?", str(batch_size)) is not None
        counts = {"batch_size": 16 if automatic else batch_size, "max_gen_toks": max_gen_toks}
        for name, value in counts.items():
            if not re.fullmatch("[0-9]{1,9}", str(value)) or int(str(value)) < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}.")
        # The harness's command line asks for cuda:0 unless it is told otherwise.
        absent = device is None or (str(device).startswith("cuda") and not torch.cuda.is_available())
        self._device = choose_device("auto" if absent else str(device))
        self._folder = shipped_model() if pretrained is None else Path(pretrained)
        self._model, self._tokenizer = load_model(self._folder, self._device, DTYPES[dtype])
        self._template = Session(self._model, self._tokenizer, learn=str(learn).lower() == "true", dtype=DTYPES[dtype])
        self.batch_size, self.max_gen_toks = (int(str(value)) for value in counts.values())
        self._backend = copy.deepcopy(self._tokenizer.backend)
        self._backend.encode_special_tokens = False

    @property
    def eot_token_id(self) -> int:
        """The token that begins every document, and so ends the one before."""
        return self._tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes the harness's caches of requests, as a part of a file's name."""
        return f"ttt-e2e {self._folder.resolve()}".replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of `string`, without a BOS of its own: a session begins with one.

        What spells a special token is one, as in the harness's other models: chat templates write them so.
        """
        if not any(token in string for token in self._tokenizer.special):
            return self._tokenizer.encode(string).tolist()
        return list(self._backend.encode(string, add_special_tokens=False).ids)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the model's chat template, for the harness's report; a name can only be "default".

        Raises UserError if the model has none.
        """
        if chat_template not in (False, None, True, "default"):
            raise UserError(f"The model ttt-e2e has one chat template, not {chat_template!r}; leave the name out.")
        return self._chat_template().source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without `add_generation_prompt`, to the end of the last message, to be continued.

        Where the template refuses a conversation it is tried without its system message. Raises UserError if the model
        has no template, or it fails.
        """
        template = self._compiled_template
        try:
            text = template.render(chat_history, {}, add_generation_prompt=add_generation_prompt)
        except MessagesRefusedError:
            chat_history = [message for message in chat_history if message["role"] != "system"]
            text = template.render(chat_history, {}, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        before, found, _ = text.rpartition(last.strip())
        if not found:
            raise UserError("The model's chat template changes the last message, so that it cannot be continued.")
        whole = last.lstrip()
        return before + (whole if text.startswith(whole, len(before)) else found)

    @cached_property
    def _compiled_template(self) -> JinjaTemplate:
        return JinjaTemplate(self._chat_template())

    def _chat_template(self) -> ChatTemplate:
        template = chat_template(self._folder)
        if template is None:
            raise UserError(f"{self._folder} has no chat template; leave --apply_chat_template out.")
        return template

    def _without_bos(self, ids: list[int]) -> list[int]:
        """The harness or a chat template may put BOS in front, which a session has already."""
        return ids[1:] if ids[:1] == [self._tokenizer.bos] else ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Score]:
        scores: dict[int, Score] = {}
        contexts = [self._without_bos(one[1]) for one in requests]
        # Requests with one context come together, and those of about the same length.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i][1]), requests[i][1], len(requests[i][2])))
        is_short = [len(one[1]) + len(one[2]) <= self._template.mini_batch_size for one in requests]
        short, long = [i for i in order if is_short[i]], [i for i in order if not is_short[i]]
        with ProgressBar(total=len(requests), disable=disable_tqdm, desc="scoring") as bar:
            for start in range(0, len(short), self.batch_size):
                some = short[start : start + self.batch_size]
                pairs = [(contexts[i], requests[i][2]) for i in some]
                scores.update(zip(some, self._score_short(pairs), strict=True))
                bar.update(len(some))
            context, session = None, self._template
            for i in long:
                if contexts[i] != context:
                    context, session = contexts[i], self._template.fork()
                    session.read(np.array(context, np.int64))
                scores[i] = self._score_long(session, requests[i][2])
                bar.update(1)
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("loglikelihood", request[0], scores[i])
        return [scores[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each read from its first token to its last."""
        sums = []
        for request in ProgressBar(requests, disable=disable_tqdm, desc="reading"):
            session = self._template.fork()
            losses = [*session.read_stream([request.args[0]]), session.score_pending()]
            sums.append(-float(np.concatenate(losses).astype(np.float64).sum()))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[-1])
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text generated after each context, up to the request's first stop string or number of tokens."""
        texts: list[str] = []
        repeats: Counter[str] = Counter()  # the harness repeats a request to get another text
        for request in ProgressBar(requests, disable=disable_tqdm, desc="generating"):
            (context, options), name = request.args, repr(request.args)
            wanted = dict(normalize_gen_kwargs(options, self.max_gen_toks))
            sampling = {option: wanted[option] for option in ("top_p", "top_k", "min_p") if option in wanted}
            sampling["temperature"] = wanted.get("temperature", 0.0)
            stop = [text for text in wanted["until"] if text]
            sampling |= {"max_tokens": wanted["max_gen_toks"], "seed": repeats[name]}
            session = self._template.fork()
            session.read(np.array(self._without_bos(self.tok_encode(context)), np.int64))
            texts.append("".join(session.generate(stop=stop, **sampling)))
            repeats[name] += 1
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _score_short(self, pairs: list[tuple[list[int], list[int]]]) -> list[Score]:
        """Score continuations, each after its context, which are too short to learn from, in one call."""
        rows = [torch.tensor([self._tokenizer.bos, *context, *continuation]) for context, continuation in pairs]
        # The padding behind is never seen: every mixer is causal.
        tokens_BT = pad_sequence(rows, batch_first=True).to(self._device)
        at_once = max(1, MAX_LOGITS // (tokens_BT.shape[1] * self._model.config.vocab_size))
        parts = []
        for some_BT in tokens_BT.split(at_once):
            state = start_reading(self._model, len(some_BT), self._template.dtype)
            logits_BTV, _ = forward(self._model, state, some_BT[:, :-1], self._template.dtype)
            parts.append(_losses(logits_BTV, some_BT[:, 1:]))
        nll_BT, greedy_BT = (np.concatenate(part) for part in zip(*parts, strict=True))
        scores = []
        for row, (_, continuation), nll_T, greedy_T in zip(rows, pairs, nll_BT, greedy_BT, strict=True):
            span = slice(len(row) - 1 - len(continuation), len(row) - 1)
            scores.append((-float(nll_T[span].sum()), bool(greedy_T[span].all())))
        return scores

    def _score_long(self, session: Session, continuation: list[int]) -> Score:
        """Score a continuation after what `session` has read, and learn from every mini-batch that it fills."""
        if not continuation:
            return 0.0, True
        reader, size, pending = session.fork(), session.chunk_size, session.state().pending
        ids, num_pending = np.concatenate((pending, np.array(continuation, np.int64))), len(pending)
        parts = []
        while len(ids) > 1:
            tokens_1T = torch.from_numpy(ids[: size + 1]).to(self._device)[None]
            logits_1TV, _ = forward(self._model, reader.state().read_state, tokens_1T[:, :-1], session.dtype)
            nll_1T, greedy_1T = _losses(logits_1TV, tokens_1T[:, 1:])
            found = find_divergence(
                nll_1T[0], 0.0, reader.position, self._model.config.vocab_size, learns=session.learn
            )
            if found is not None:
                advice = "Use a model with a smaller inner_loop.lr, or learn=false."
                raise Diverged(f"Learning diverged: {found[0]}. {advice}", reader.position, found[0])
            parts.append((nll_1T[0], greedy_1T[0]))
            if len(ids) > size + 1:  # else nothing would be read with what is learned
                reader.read(ids[num_pending : size + 1])
            ids, num_pending = ids[size:], 1
        nll, greedy = (np.concatenate(part)[-len(continuation) :] for part in zip(*parts, strict=True))
        return -float(nll.sum()), bool(greedy.all())


def _losses(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Each target's loss in nats, float64 [B, T], and whether it was the likeliest token."""
    logits_BTV = logits_BTV.float()
    nll_BT = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)
    greedy_BT = logits_BTV.argmax(-1) == targets_BT
    return nll_BT.double().cpu().numpy(), greedy_BT.cpu().numpy()


if __name__ == "__main__":
    import sys

    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"ttt-e2e: error: {error}")
