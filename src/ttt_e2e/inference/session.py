"""Test time: one text that is being read, by a model that learns from it (or, as a baseline, does not).

A `Session` is fed tokens in pieces of any size and advances by whole mini-batches only: what came in between waits. So
its state depends on the tokens alone and not on how they were split, and it never grows beyond the fast weights, the
window and one mini-batch. It can be copied (`fork`), saved, loaded, and asked to write on.
"""

import copy
import importlib.resources
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import Divergence, UserError
from ttt_e2e.inference.pretrained_metadata import end_tokens
from ttt_e2e.inference.sampling import CONTEXT, SamplingOptions, TextStream, sample
from ttt_e2e.inference.session_file import (
    DTYPES,
    Precision,
    SessionInfo,
    learned_norm,
    memory_bytes,
    model_fingerprint,
    read_session_file,
    state_from_tensors,
    state_tensors,
    write_session_file,
)
from ttt_e2e.inference.streaming import ReadState, forward, has_fixed_caches, read_mini_batch, start_reading
from ttt_e2e.inference.text_digest import TextDigest, token_bytes
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.inner_loop.step import EAGER
from ttt_e2e.model.checkpoint import load_model
from ttt_e2e.model.transformer import Transformer

_BATCHES_WITHOUT_LEARNING = 8
LOGITS = 1 << 26  # at most so many at once when nothing is learned: 256 MiB
_ABSURD = 10.0  # a mean loss of so many times ln(vocabulary), the loss of a uniform guess, is divergence


class Diverged(Divergence):
    """Inner learning went wrong, and the session is back at its last good state, at token `position`.

    what: the loss, or the gradient, that showed it; empty if it was no learning that went wrong.
    """

    def __init__(self, message: str, position: int, what: str = "") -> None:
        super().__init__(message)
        self.position = position
        self.what = what


class SessionState(NamedTuple):
    """Where a session stands in its text: a value.

    state: what the tokens have left that were read, in whole mini-batches; text: their digest and size. pending: the
    token ids [n] after them, int64. The first is the input to the next prediction; every other one has its loss still
    to come.
    """

    state: ReadState
    text: TextDigest
    pending: np.ndarray


class Session:
    """One text, as a model reads it.

    model: as `load_reader` gives it; it is never changed. tokenizer: needed for texts, not for token ids; with one,
    the text begins with its BOS token. learn: whether the model learns while it reads (a standard model never does).
    dtype: of the matrix products; the fast weights are float32. compile: run the mini-batches compiled, which is worth
    it for long texts; `compiled` says whether that is done, namely where the model learns and has a window. The state
    is of the same form either way.

    Positions count tokens with BOS. Every token but the first gets a loss, in nats, before anything is learned of it.
    token_sizes: how many bytes of text each token is, [V]; None without a tokenizer that works on bytes.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        learn: bool = True,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        config = model.config
        self.model = model
        self.tokenizer = tokenizer
        self.learn = learn and config.can_learn
        self.dtype = dtype
        self.compiled = compile and self.learn and has_fixed_caches(config)
        if compile and self.learn and not self.compiled:
            others = ", ".join(sorted({*config.mixers} - {"window"}))
            warnings.warn(f"Reading without compilation, which needs a window everywhere, not {others}.", stacklevel=2)
        self._functions = compiled_functions(model.embedding.device) if self.compiled else EAGER
        self.token_sizes = None if tokenizer is None else token_bytes(tokenizer)
        self.reset()

    def reset(self) -> None:
        """Forget everything: the session is as it was made. Forks of it stay as they are."""
        begin = np.array([] if self.tokenizer is None else [self.tokenizer.bos], np.int64)
        self._restore(SessionState(start_reading(self.model, 1, self.dtype), TextDigest(), begin))

    def _restore(self, standing: SessionState, before: SessionState | None = None) -> None:
        """Go to where a session of the same model stood; before: one mini-batch ago, when the loss was good."""
        self._state = standing.state
        self._text = standing.text  # of the tokens that the state has read
        self._pending = standing.pending
        self._before = before

    @property
    def mini_batch(self) -> int:
        """Tokens of a mini-batch, see `ModelConfig.read_batch`."""
        return self.model.config.read_batch

    @property
    def piece(self) -> int:
        """How many tokens the session takes at once: a mini-batch, or several where nothing is learned."""
        return self.mini_batch * (1 if self.learn else batches_without_learning(self.model.config))

    @property
    def position(self) -> int:
        """Tokens that the state has read, in whole mini-batches."""
        return self._state.position

    @property
    def pending(self) -> int:
        """Tokens after those that have no loss yet; they get it when their mini-batch is full."""
        return max(0, len(self._pending) - 1)

    @cached_property
    def _model_digest(self) -> str:
        return model_fingerprint(self.model)

    def info(self) -> SessionInfo:
        """What the session is at this moment."""
        text = self._text.add(self._pending, self.mini_batch, self.token_sizes)
        return SessionInfo(
            position=self.position,
            pending=self.pending,
            tokens=self.position + len(self._pending),
            text_bytes=None if self.token_sizes is None else text.bytes,
            text_digest=text.digest.hex(),
            model=self._model_digest,
            learn=self.learn,
            dtype=str(self.dtype).removeprefix("torch."),
            memory_bytes=memory_bytes(self._state),
            learned_norm=learned_norm(self.model, self._state),
        )

    def read(self, tokens: str | np.ndarray | Iterable[int]) -> np.ndarray:
        """Read on; returns the losses of the tokens that have become part of a whole mini-batch, float32 [n].

        A str is tokenised by itself; for a text in pieces use `read_pieces`. Raises UserError for ids outside of the
        vocabulary, and Diverged.
        """
        return np.concatenate([np.empty(0, np.float32), *self.steps(tokens)])

    def read_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Read a text that comes in pieces, as one text however it is split; yields losses as `read` does."""
        for tokens in self._tokenizer().encode_pieces(pieces):
            yield from self.steps(tokens)

    def steps(self, tokens: str | np.ndarray | Iterable[int]) -> Iterator[np.ndarray]:
        """`read`, one mini-batch each time the iterator is advanced."""
        ids = self._ids(tokens)
        self._pending = np.concatenate((self._pending, ids))
        while len(self._pending) > self.piece:
            yield self._step()
        self._pending = self._pending.copy()  # a view would keep all the ids

    def score_pending(self) -> np.ndarray:
        """The losses of the pending tokens, float32 [pending]; nothing is learned and the session stays as it is."""
        if self.pending == 0:
            return np.empty(0, np.float32)
        ids_1T = self._tensor(self._pending)
        inputs_1T, targets_1T = ids_1T[:, :-1], ids_1T[:, 1:]
        _, nll_1T, _ = read_mini_batch(self.model, self._state, inputs_1T, targets_1T, learn=False, dtype=self.dtype)
        losses = nll_1T[0].float().cpu().numpy()
        self._check(losses, 0.0)
        return losses

    def fork(self) -> "Session":
        """A session that goes on from here by itself. It costs nothing: states are values."""
        return copy.copy(self)

    def standing(self) -> SessionState:
        """Where the session stands: all that reading has changed in it."""
        return SessionState(self._state, self._text, self._pending)

    def standing_at(self, standing: SessionState) -> "Session":
        """A session made as this one was, that goes on from where another one of the same model stood."""
        other = self.fork()
        other._restore(standing)
        return other

    def generate_tokens(
        self,
        prompt: str | np.ndarray | Iterable[int] = "",
        *,
        max_tokens: int = 200,
        learn_from_writing: bool = False,
        **sampling: Any,
    ) -> Iterator[int]:
        """Write on after what was read and `prompt`; yields token ids, up to one that ends the text or `max_tokens`.

        sampling: the fields of `SamplingOptions`. The session itself stays as it is: a fork reads the prompt, and
        learns from its whole mini-batches, but not from what it writes. With `learn_from_writing` the session itself
        goes on: prompt and written tokens become part of it as if they had been read, each when it is yielded, and
        nothing else may be read until the writing has ended. Raises UserError for numbers out of range and if there is
        nothing to go on from, and Diverged.
        """
        options = sampling_options(max_tokens, sampling)
        writer = self if learn_from_writing else self.fork()
        if not isinstance(prompt, str) or prompt:
            writer.read(prompt)
        if len(writer._pending) == 0:
            raise UserError("There is nothing to go on from; give a prompt.")
        generator = torch.Generator().manual_seed(options.seed)
        state, ids_1T = writer._state, writer._tensor(writer._pending)
        for _ in range(max_tokens):
            logits_1TV, state = forward(self.model, state, ids_1T, self.dtype)
            logits_V = logits_1TV[0, -1].float().cpu()
            if not logits_V.isfinite().all():
                writer._check(np.array([math.nan]), 0.0)
            chosen = sample(logits_V, options, generator)
            if self.tokenizer is not None and chosen in self.tokenizer.ends:
                return
            token = np.array([chosen])
            if learn_from_writing:
                for _ in writer.steps(token):
                    state = writer._state  # a mini-batch was full: on with what was learned, the token alone pending
            yield chosen
            ids_1T = writer._tensor(token)

    def generate(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 200,
        stop: str | Sequence[str] = (),
        learn_from_writing: bool = False,
        **sampling: Any,
    ) -> Iterator[str]:
        """`generate_tokens` as text, in whole characters: a character whose bytes are not all there yet waits.

        stop: strings before which the text ends. With `learn_from_writing` the session goes on with exactly the text
        that was yielded, whatever was drawn beyond it.
        """
        sampling_options(max_tokens, sampling)  # nothing becomes part of the session before all is checked
        ids = self._tokenizer().encode(prompt)
        stream = TextStream(self._tokenizer(), stop, before=np.concatenate((self._pending, ids))[-CONTEXT:].tolist())
        reader = self if learn_from_writing else self.fork()
        reader.read(ids)
        # The writer runs ahead: a stop string may turn out to have begun some tokens ago.
        writer, behind = reader.fork(), False
        written = writer.generate_tokens(max_tokens=max_tokens, learn_from_writing=learn_from_writing, **sampling)
        try:
            for token in written:
                text = stream.add(token)
                behind = stream.waiting
                if not behind:
                    reader._adopt(writer)
                if text:
                    yield text
                if stream.stopped:
                    break
            if text := stream.rest():
                yield text
        except Diverged:
            reader._adopt(writer)
            behind = False
            raise
        finally:
            if learn_from_writing and behind:
                reader.read(np.array(stream.tokens_given(), np.int64))

    def save(self, path: Path, precision: Precision = "float32") -> None:
        """Write the session to one file, whole or not at all: what was learned, what is cached, what is pending.

        precision: "float32" keeps the fast weights bit for bit; "bfloat16" and "float16" keep what they differ from
        the model's by, rounded, in half the space. Raises UserError if `path` is something other than a session, if
        the disk is full or the place not writable.
        """
        write_session_file(path, *self.pack(precision))

    @classmethod
    def load(
        cls, path: Path, model: Transformer, tokenizer: Tokenizer | None = None, *, compile: bool = False
    ) -> "Session":
        """The session in the file `path`, to go on with exactly where it was saved, compiled or not.

        Raises UserError if it is no session, truncated or altered, or if it belongs to another model or tokenizer.
        """
        facts, tensors = read_session_file(Path(path))
        learn, dtype = facts["learn"], DTYPES[facts["dtype"]]
        session = cls(model, tokenizer, learn=learn, dtype=dtype, compile=compile)
        session.unpack(facts, tensors, str(path))
        return session

    def pack(self, precision: Precision = "float32") -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The session as facts, which are plain values, and tensors on the CPU; see `session_files`."""
        facts = {
            **asdict(self.info()),
            "precision": precision,
            "tokenizer": None if self.tokenizer is None else self.tokenizer.digest,
            "state_digest": self._text.digest.hex(),
            "state_bytes": self._text.bytes,
        }
        tensors = state_tensors(self.model, self._state, self.learn, precision)
        return facts, {**tensors, "pending": torch.from_numpy(self._pending.copy())}

    def unpack(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str = "The session") -> None:
        """Become what was packed, learning or not as this session was made. Raises UserError as `load` does."""
        if facts["model"] != self._model_digest:
            raise UserError(
                f"The session {name} belongs to another model than this one; give the model that it was read with."
            )
        if facts["tokenizer"] != (None if self.tokenizer is None else self.tokenizer.digest):
            raise UserError(
                f"The session {name} was read with another tokenizer; give the model folder it was read with."
            )
        try:
            state = state_from_tensors(self.model, tensors, facts["position"], facts["learn"], facts["precision"])
            pending = tensors["pending"].numpy()
        except KeyError as error:
            raise UserError(f"The session {name} lacks {error}; use an unaltered copy.") from error
        text = TextDigest(bytes.fromhex(facts["state_digest"]), facts["state_bytes"])
        self._restore(SessionState(state, text, pending))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _adopt(self, other: "Session") -> None:
        self._restore(other.standing(), other._before)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("This session has no tokenizer; give it token ids, or make it with a tokenizer.")
        return self.tokenizer

    def _ids(self, tokens: str | np.ndarray | Iterable[int]) -> np.ndarray:
        if isinstance(tokens, str):
            return self._tokenizer().encode(tokens)
        return token_ids(tokens, self.model.config.vocab_size)

    def _tensor(self, ids: np.ndarray) -> Tensor:
        return torch.tensor(ids, device=self.model.embedding.device)[None]

    def _step(self) -> np.ndarray:
        """Read one piece of the pending tokens. The state changes last and at once, or not at all."""
        piece = self.piece
        ids_1T = self._tensor(self._pending[: piece + 1])
        inputs_1T, targets_1T = ids_1T[:, :-1], ids_1T[:, 1:]
        after, nll_1T, norm_1 = read_mini_batch(
            self.model,
            self._state,
            inputs_1T,
            targets_1T,
            learn=self.learn,
            dtype=self.dtype,
            functions=self._functions,
        )
        losses = nll_1T[0].float().cpu().numpy()
        self._check(losses, float(norm_1))
        before = SessionState(self._state, self._text, self._pending[:1].copy()) if self.learn else None
        text = self._text.add(self._pending[:piece], self.mini_batch, self.token_sizes)
        self._restore(SessionState(after, text, self._pending[piece:]), before)
        return losses

    def _check(self, losses: np.ndarray, norm: float) -> None:
        """Raise Diverged unless the losses are sound; the session then has forgotten what led to them."""
        learned = self.learn and self.position > 0
        found = find_divergence(losses, norm, self.position, learned, self.model.config.vocab_size)
        if found is None:
            return
        what, update = found
        known = not update or self._before is not None
        if update and self._before is not None:
            self._restore(self._before)
        self._before, self._pending = None, self._pending[:1]
        raise rolled_back_error(what, self.position, known)


def token_ids(tokens: np.ndarray | Iterable[int], vocabulary: int) -> np.ndarray:
    """Token ids as int64 [n]. Raises UserError if they are no row of whole numbers below `vocabulary`."""
    ids = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
    if ids.size == 0:
        return np.empty(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocabulary:
        raise UserError(
            f"Tokens must be a row of whole numbers from 0 to {vocabulary - 1}; "
            "was the text tokenised with another tokenizer?"
        )
    return ids.astype(np.int64)


def find_divergence(
    losses: np.ndarray, norm: float, position: int, learned: bool, vocabulary: int
) -> tuple[str, bool] | None:
    """What is wrong with a mini-batch read at `position`, and whether the update before it is to blame; None: nothing.

    A mini-batch's loss judges the update before it, if one was `learned`: the last good state is then the one before
    that. A gradient that is not finite would only spoil the next state. Raises Diverged if nothing was learned yet and
    the loss is not finite: then the weights themselves are to blame.
    """
    at = f"at tokens {position} to {position + len(losses)}"
    loss, limit = float(losses.mean()), _ABSURD * math.log(vocabulary)
    if not math.isfinite(loss) and not learned:
        raise Diverged(
            f"The model has a loss of {loss} {at} although nothing was learned; "
            "its weights are not fit for use, train or load another model.",
            position,
        )
    if learned and not loss <= limit:
        return f"the loss {at} is {loss:.4g} nats per token", True
    return None if math.isfinite(norm) else (f"the gradient {at} is {norm}", False)


def rolled_back_error(what: str, position: int, known: bool) -> Diverged:
    """The error that says so, once a session is back at its last good state, at `position`, if that was `known`."""
    back = "back at its last good state" if known else "at its last state, and may be spoiled: no earlier one is known"
    return Diverged(
        f"Learning diverged: {what}; the session is {back}, after {position} tokens. "
        "Read without learning, or with a model of a smaller inner_loop.lr.",
        position,
        what,
    )


def batches_without_learning(config: ModelConfig) -> int:
    """How many mini-batches are read at once where nothing is learned: fewer for a large vocabulary."""
    return max(1, min(_BATCHES_WITHOUT_LEARNING, LOGITS // (config.vocab_size * config.read_batch)))


def sampling_options(max_tokens: int, sampling: Mapping[str, Any]) -> SamplingOptions:
    """The options that `sampling` names. Raises UserError for those and a number of tokens out of range."""
    if max_tokens < 0:
        raise UserError(f"Cannot write {max_tokens} tokens; give a number from 0 on.")
    return SamplingOptions(**sampling)


# -- models to read with -----------------------------------------------------------------------------------------------


def shipped_model() -> Path:
    """The folder of the model that comes with the package. Raises UserError if this installation lacks it."""
    folder = Path(str(importlib.resources.files("ttt_e2e"))) / "shipped"
    if not (folder / "config.json").is_file():
        raise UserError(
            "This installation comes without the shipped model; name a model folder with --model, or reinstall."
        )
    return folder


def load_reader(folder: Path | None = None, device: str | torch.device = "cpu") -> tuple[Transformer, Tokenizer]:
    """The model in `folder` (None: the shipped one) ready to read with, and its tokenizer.

    Raises UserError if the folder is no model, has no tokenizer, or one of another vocabulary.
    """
    folder = shipped_model() if folder is None else Path(folder)
    model = load_model(folder, device).eval().requires_grad_(False)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; put the tokenizer that made its training tokens there.")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens, but its model has a vocabulary of "
            f"{model.config.vocab_size}; put the tokenizer that made its training tokens there."
        )
    tokenizer.ends = end_tokens(folder, tokenizer)
    return model, tokenizer
