"""One text that a model reads and learns from (or, as a baseline, reads without learning).

A `Session` is fed tokens in chunks of any size and advances by whole mini-batches only; tokens in between are pending.
So its state depends on the tokens alone and, but for rounding, not on how they were split: the prefix reads several
mini-batches at once where they are there. It never grows beyond the fast weights, twice the window and one mini-batch.
A session can be forked, saved, loaded, and asked to generate.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference import session_file
from ttt_e2e.inference.divergence import Diverged, find_divergence, rolled_back_error
from ttt_e2e.inference.row_batch import chunk_size, ids_tensor, read_rows
from ttt_e2e.inference.sampling import SamplingOptions, check_max_tokens, sample
from ttt_e2e.inference.session_file import Precision, SessionInfo
from ttt_e2e.inference.streaming import PrefixOutput, ReadState, forward, read_ahead, start_reading
from ttt_e2e.inference.text_digest import TextDigest, token_bytes
from ttt_e2e.inference.text_stream import TextStream
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.inner_loop.functions import EAGER
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.ops import tuning


class SessionState(NamedTuple):
    """All that reading has changed in a session: a value."""

    read_state: ReadState  # of the model, after all whole mini-batches
    text: TextDigest  # digest, size and kind of the text in them
    pending: np.ndarray  # ids of the tokens after them, int64 [n]; all but the first still have to be scored


class Session:
    """One text, as a model reads it.

    Positions count tokens, BOS among them. Every token but the first is scored, in nats, before the model learns from
    it. `compiled` says whether reading is compiled, and `token_sizes` how many bytes of text each token is, [V] (None
    without a tokenizer that works on bytes).

    Args:
        model: as `load_model` returns it. It is never changed.
        tokenizer: needed to read text, but not token ids. With one, the text begins with its BOS token.
        learn: whether the model learns while it reads. A standard model never does.
        dtype: of the matrix products. Fast weights are float32.
        compile: whether to compile the mini-batches, which is worth it for long texts. It is done where the model
            learns and every mixer is windowed attention, and does not change the form of the state.
    """

    _state: SessionState

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        learn: bool = True,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        self.learn = learn and model.config.can_learn
        others = ", ".join(sorted({*model.config.mixers} - {"window"}))
        self.compiled = compile and self.learn and not others
        if compile and self.learn and others:
            warnings.warn(f"Reading without compilation, which needs a window everywhere, not {others}.", stacklevel=2)
        self._functions = compiled_functions(model.embedding.device) if self.compiled else EAGER
        self.token_sizes = None if tokenizer is None else token_bytes(tokenizer)
        self.reset()

    def reset(self) -> None:
        """Forget everything that was read. Forks are not affected."""
        begin = np.array([] if self.tokenizer is None else [self.tokenizer.bos], np.int64)
        self._restore(SessionState(start_reading(self.model, 1, self.dtype), TextDigest(), begin))

    @property
    def mini_batch_size(self) -> int:
        """Tokens of a mini-batch; see `ModelConfig.tokens_per_read`."""
        return self.model.config.tokens_per_read

    @property
    def chunk_size(self) -> int:
        """How many tokens the session reads at once: a mini-batch, or several where nothing is learned."""
        return chunk_size(self.model, self.learn)

    @property
    def position(self) -> int:
        """Tokens read so far, in whole mini-batches."""
        return self._state.read_state.position

    @property
    def pending(self) -> int:
        """Tokens after these that are scored once their mini-batch is full."""
        return max(0, len(self._state.pending) - 1)

    def info(self) -> SessionInfo:
        """What there is to know about the session at this moment."""
        state, text, pending = self._state
        text = text.add(pending, self.mini_batch_size, self.token_sizes)
        return SessionInfo(
            position=self.position,
            pending=self.pending,
            tokens=self.position + len(pending),
            text_bytes=None if self.token_sizes is None else text.bytes,
            text_digest=text.digest.hex(),
            model=self._model_fingerprint,
            learn=self.learn,
            dtype=str(self.dtype).removeprefix("torch."),
            memory_bytes=sum(tensor.nbytes for tensor in state.tensors()),
            learned_norm=session_file.learned_norm(self.model, state),
        )

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, tokens: str | np.ndarray | Iterable[int]) -> np.ndarray:
        """Read more of the text; returns the losses of the tokens in full mini-batches, in nats, float32 [n].

        A string is tokenised by itself; for a text that comes in parts use `read_stream`. Raises UserError for ids
        outside of the vocabulary, and Diverged, after which the session is back at its last good state.
        """
        return np.concatenate([np.empty(0, np.float32), *self.read_chunks(tokens)])

    def read_stream(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Read a text that comes in parts, as one text however it is split; yields losses as `read_chunks` does."""
        for tokens in self._require_tokenizer().encode_chunks(texts):
            yield from self.read_chunks(tokens)

    def read_chunks(self, tokens: str | np.ndarray | Iterable[int]) -> Iterator[np.ndarray]:
        """`read` step by step: the iterator reads `chunk_size` tokens at a time, and yields their losses, float32 [n].

        Tokens that do not fill the last mini-batch are pending. The session is consistent between two steps.
        """
        if isinstance(tokens, str):
            ids = self._require_tokenizer().encode(tokens)
        else:
            ids = check_token_ids(tokens, self.model.config.vocab_size)
        self._state = self._state._replace(pending=np.concatenate((self._state.pending, ids)))
        ahead: list[PrefixOutput] = []
        expected = None  # the state that `ahead` belongs to; between two steps the caller may change the session
        while len(self._state.pending) > self.chunk_size:
            # The state changes last and at once, or not at all.
            size, (read_state, text, pending) = self.chunk_size, self._state
            if self._state is not expected or not ahead:
                ahead = self._read_ahead()
            prefix = ahead.pop(0) if ahead else None
            options = {"learn": self.learn, "dtype": self.dtype, "functions": self._functions, "prefix": prefix}
            after, losses_1T, norm_1 = read_rows(self.model, read_state, [pending[: size + 1]], **options)
            self._check(losses_1T[0], norm_1[0])
            last_good = SessionState(read_state, text, pending[:1].copy()) if self.learn else None
            text = text.add(pending[:size], self.mini_batch_size, self.token_sizes)
            self._restore(SessionState(after, text, pending[size:]), last_good)
            expected = self._state
            yield losses_1T[0]
        self._state = self._state._replace(pending=self._state.pending.copy())  # a view would keep all the ids

    def _read_ahead(self) -> list[PrefixOutput]:
        """The outputs of the prefix for the next mini-batches, computed in one call; none if it brings no advantage."""
        if not self.learn or self.compiled:
            return []
        ids = self._state.pending[:-1][: tuning.PREFIX_TOKENS]
        return read_ahead(self.model, self._state.read_state, ids_tensor(self.model, [ids]), self.dtype)

    def score_pending(self) -> np.ndarray:
        """The losses of the pending tokens, float32 [pending]. Nothing is learned, and the session does not change."""
        if self.pending == 0:
            return np.empty(0, np.float32)
        state, _, pending = self._state
        _, losses_1T, _ = read_rows(self.model, state, [pending], learn=False, dtype=self.dtype)
        self._check(losses_1T[0], 0.0)
        return losses_1T[0]

    def check(self) -> None:
        """Raise Diverged if the last update made learning diverge. The session does not change.

        Otherwise the next mini-batch finds out, and a session that was saved and loaded cannot go back any more.
        """
        if self.learn and self.position:
            probe = self.fork()
            if probe.pending:
                probe.score_pending()
            else:  # no token waits for its loss, but generating one shows whether the logits are finite
                next(probe.generate_tokens(max_tokens=1, temperature=0), None)

    def _check(self, losses: np.ndarray, norm: float) -> None:
        """Return to the last good state and raise Diverged if a mini-batch shows that learning diverged."""
        found = find_divergence(losses, norm, self.position, self.model.config.vocab_size, learns=self.learn)
        if found is None:
            return
        what, bad_update = found
        good = self._last_good if bad_update else self._state
        state = good or self._state
        self._restore(state._replace(pending=state.pending[:1]))
        raise rolled_back_error(what, self.position, known=good is not None)

    # -- state ---------------------------------------------------------------------------------------------------------

    def fork(self) -> "Session":
        """An independent copy of the session. It costs nothing: states are values."""
        return copy.copy(self)

    def state(self) -> SessionState:
        """All that reading has changed in the session."""
        return self._state

    def with_state(self, state: SessionState) -> "Session":
        """A session with this one's settings and the state of another session of the same model."""
        other = self.fork()
        other._restore(state)
        return other

    def save(self, path: str | Path, precision: Precision = "float32") -> None:
        """Write the session to one file, whole or not at all; another session there is replaced.

        precision: "float32" keeps the fast weights bit for bit; "bfloat16" and "float16" keep their difference to the
        model's, rounded, in half the space. Raises UserError if `path` is anything but a session, or cannot be written.
        """
        session_file.write_session_file(Path(path), *self.pack(precision))

    @classmethod
    def load(
        cls, path: str | Path, model: Transformer, tokenizer: Tokenizer | None = None, *, compile: bool = False
    ) -> "Session":
        """The session in the file `path`, exactly as it was saved.

        Raises UserError if the file is not a session of this version, is truncated or altered, or belongs to another
        model or tokenizer.
        """
        facts, tensors = session_file.read_session_file(Path(path))
        dtype = session_file.DTYPES[facts["dtype"]]
        session = cls(model, tokenizer, learn=facts["learn"], dtype=dtype, compile=compile)
        session.unpack(facts, tensors, str(path))
        return session

    def pack(self, precision: Precision = "float32") -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The session as facts, which are plain values, and tensors on the CPU; see `session_file`."""
        facts = {
            **self.info().to_facts(),
            "precision": precision,
            "tokenizer": self.tokenizer and self.tokenizer.digest,
            "state_digest": self._state.text.digest.hex(),
            "state_bytes": self._state.text.bytes,
            "chat": self._state.text.chat,
            "tools": self._state.text.tools,
        }
        tensors = session_file.state_tensors(self.model, self._state.read_state, self.learn, precision)
        return facts, {**tensors, "pending": torch.from_numpy(self._state.pending.copy())}

    def unpack(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str = "The session") -> None:
        """Take on the state that was packed; `learn` does not change. Raises UserError as `load` does."""
        if facts["model"] != self._model_fingerprint:
            raise UserError(f"The session {name} belongs to another model; give the model that it was read with.")
        if facts["tokenizer"] != (self.tokenizer and self.tokenizer.digest):
            raise UserError(
                f"The session {name} was read with another tokenizer; give the model folder that it was read with."
            )
        try:
            about = facts["position"], facts["learn"], facts["precision"]
            state = session_file.state_from_tensors(self.model, tensors, *about)
            pending = tensors["pending"].numpy()
        except KeyError as error:
            raise UserError(f"The session {name} lacks {error}; use an unaltered copy.") from error
        digest, tools = bytes.fromhex(facts["state_digest"]), str(facts.get("tools", ""))
        text = TextDigest(digest, facts["state_bytes"], facts["chat"] is True, tools)
        self._restore(SessionState(state, text, pending))

    @cached_property
    def _model_fingerprint(self) -> str:
        return session_file.model_fingerprint(self.model)

    def _restore(self, state: SessionState, last_good: SessionState | None = None) -> None:
        """Take on a state of the same model. last_good: one mini-batch before, when the loss was good."""
        self._state = state
        self._last_good = last_good

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("This session has no tokenizer; give it token ids, or make it with a tokenizer.")
        return self.tokenizer

    # -- generation ----------------------------------------------------------------------------------------------------

    def generate_tokens(
        self,
        prompt: str | np.ndarray | Iterable[int] = "",
        *,
        max_tokens: int = 200,
        learn_from_writing: bool = False,
        **sampling: Any,
    ) -> Iterator[int]:
        """Continue the text after `prompt`; yields token ids, until one ends the text or there are `max_tokens`.

        The session does not change: a fork reads the prompt, and learns from its full mini-batches, but not from what
        is generated.

        Args:
            prompt: what to read first, a string or token ids.
            max_tokens: how many tokens to generate at most.
            learn_from_writing: whether the prompt and the generated tokens become part of the session, as if they had
                been read, each when it is yielded. Nothing else may be read until generation has ended.
            sampling: the fields of `SamplingOptions`.

        Raises:
            UserError: a number is out of range, or there is neither text nor prompt to continue.
            Diverged: learning diverged.
        """
        check_max_tokens(max_tokens)
        options = SamplingOptions(**sampling)
        writer = self if learn_from_writing else self.fork()
        if not isinstance(prompt, str) or prompt:
            writer.read(prompt)
        if not len(writer._state.pending):
            raise UserError("There is no text to continue; give a prompt.")
        generator = torch.Generator().manual_seed(options.seed)
        state, ids_1T = writer._state.read_state, ids_tensor(self.model, [writer._state.pending])
        for _ in range(max_tokens):
            logits_1TV, state = forward(self.model, state, ids_1T, self.dtype)
            logits_V = logits_1TV[0, -1].float().cpu()
            if not logits_V.isfinite().all():
                writer._check(np.array([math.nan]), 0.0)
            chosen = sample(logits_V, options, generator)
            if self.tokenizer is not None and chosen in self.tokenizer.end_ids:
                return
            token = np.array([chosen])
            if learn_from_writing:
                for _ in writer.read_chunks(token):  # a mini-batch was full; the token alone is pending
                    state = writer._state.read_state
            yield chosen
            ids_1T = ids_tensor(self.model, [token])

    def generate(
        self,
        prompt: str | np.ndarray | Iterable[int] = "",
        *,
        max_tokens: int = 200,
        stop: str | Sequence[str] = (),
        learn_from_writing: bool = False,
        **sampling: Any,
    ) -> Iterator[str]:
        """`generate_tokens` as text, in whole characters: a character waits until all its bytes are there.

        Raises what `generate_tokens` does.

        Args:
            prompt: what to read first, a string or token ids.
            max_tokens: how many tokens to generate at most.
            stop: strings before which the text ends.
            learn_from_writing: whether the prompt and exactly the text that was yielded become part of the session.
            sampling: the fields of `SamplingOptions`.
        """
        check_max_tokens(max_tokens)  # all is checked before anything becomes part of the session
        SamplingOptions(**sampling)
        tokenizer = self._require_tokenizer()
        vocab_size = self.model.config.vocab_size
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else check_token_ids(prompt, vocab_size)
        stream = TextStream(tokenizer, stop, context=np.concatenate((self._state.pending, ids)))
        reader = self if learn_from_writing else self.fork()
        reader.read(ids)
        # The writer runs ahead: a stop string may turn out to have begun some tokens ago.
        writer, behind = reader.fork(), False
        tokens = writer.generate_tokens(max_tokens=max_tokens, learn_from_writing=learn_from_writing, **sampling)
        try:
            for token in tokens:
                text = stream.add(token)
                behind = stream.has_pending
                if not behind:
                    reader._restore(writer._state, writer._last_good)
                if text:
                    yield text
                if stream.stopped_by:
                    break
            if text := stream.flush():
                yield text
        except Diverged:
            reader._restore(writer._state, writer._last_good)
            behind = False
            raise
        finally:
            if learn_from_writing and behind:
                reader.read(np.array(stream.emitted_tokens(), np.int64))


def check_token_ids(tokens: np.ndarray | Iterable[int], vocab_size: int) -> np.ndarray:
    """Token ids as int64 [n]. Raises UserError if they are not a sequence of whole numbers below `vocab_size`."""
    ids = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
    if ids.size == 0:
        return np.empty(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError(
            f"Tokens must be a sequence of whole numbers from 0 to {vocab_size - 1}; "
            "was the text tokenised with another tokenizer?"
        )
    return ids.astype(np.int64)
