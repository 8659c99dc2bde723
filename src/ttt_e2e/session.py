"""Test time: one text that is being read, by a model that learns from it (or, as a baseline, does not).

A `Session` is fed tokens in pieces of any size and advances by whole mini-batches only: what came in between waits. So
its state depends on the tokens alone and not on how they were split, and it never grows beyond the fast weights, the
window and one mini-batch. It can be copied (`fork`), saved, loaded, and asked to write on.
"""

import copy
import hashlib
import importlib.resources
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttt_e2e.compiled import compiled_steps
from ttt_e2e.config import ModelConfig, to_dict
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path
from ttt_e2e.inner_loop import PLAIN, State
from ttt_e2e.model import Transformer
from ttt_e2e.model_files import load_model, model_digest, save_safetensors
from ttt_e2e.ops.fast_mlp import FastWeights
from ttt_e2e.streaming import ReadState, forward, has_fixed_caches, read_mini_batch, start_reading

FORMAT = "ttt-e2e session"
VERSION = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

_FROZEN_BATCHES = 8
_LOGITS = 1 << 26  # at most so many logits at once when nothing is learned: 256 MiB
_ABSURD = 10.0  # a mean loss of so many times ln(vocabulary), the loss of a uniform guess, is divergence


class Diverged(UserError):  # noqa: N818 - it is a state of affairs, as KeyboardInterrupt is
    """Inner learning went wrong, and the session is back at its last good state, at token `position`."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


class Session:
    """One text, as a model reads it.

    model: as `load_reader` gives it; it is never changed. tokenizer: needed for texts, not for token ids; with one,
    the text begins with its BOS token. learn: whether the model learns while it reads (a standard model never does).
    dtype: of the matrix products; the fast weights are float32. compile: run the mini-batches compiled, which is worth
    it for long texts; `compiled` says whether that is done, namely where the model learns and has a window. The state
    is of the same form either way.

    Positions count tokens with BOS. Every token but the first gets a loss, in nats, before anything is learned of it.
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
        self.learn = learn and bool(model.suffix) and config.inner_lr > 0
        self.dtype = dtype
        self.compiled = compile and self.learn and has_fixed_caches(config)
        if compile and self.learn and not self.compiled:
            others = ", ".join(sorted({*config.mixers} - {"window"}))
            warnings.warn(f"Reading without compilation, which needs a window everywhere, not {others}.", stacklevel=2)
        self._steps = compiled_steps(model.embedding.device) if self.compiled else PLAIN
        self._state = start_reading(model, 1, dtype)
        self._before: tuple[ReadState, np.ndarray] | None = None  # one mini-batch ago: its loss was good
        self._pending = np.array([] if tokenizer is None else [tokenizer.bos], np.int64)

    @property
    def piece(self) -> int:
        """How many tokens the session takes at once: a mini-batch, or several where nothing is learned."""
        b = self.model.config.mini_batch or 256
        return b if self.learn else b * frozen_batches(self.model.config)

    @property
    def position(self) -> int:
        """Tokens that the state has read, in whole mini-batches."""
        return self._state.position

    @property
    def pending(self) -> int:
        """Tokens after those that have no loss yet; they get it when their mini-batch is full."""
        return max(0, len(self._pending) - 1)

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

    def score_rest(self) -> np.ndarray:
        """The losses of the pending tokens, float32 [pending]; nothing is learned and the session stays as it is."""
        if self.pending == 0:
            return np.empty(0, np.float32)
        ids_1T = self._tensor(self._pending)
        inputs_1T, targets_1T = ids_1T[:, :-1], ids_1T[:, 1:]
        _, nll_1T, _ = read_mini_batch(self.model, self._state, inputs_1T, targets_1T, inner_lr=0.0, dtype=self.dtype)
        losses = nll_1T[0].float().cpu().numpy()
        self._check(losses, 0.0)
        return losses

    def fork(self) -> "Session":
        """A session that goes on from here by itself. It costs nothing: states are values."""
        return copy.copy(self)

    def generate_tokens(
        self,
        prompt: str | np.ndarray | Iterable[int] = "",
        *,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> Iterator[int]:
        """Write on after what was read and `prompt`; yields token ids, up to BOS (a document's end) or `max_tokens`.

        The session itself stays as it is: a fork reads the prompt, and learns from its whole mini-batches, but not from
        what it writes. temperature 0 takes the likeliest token; top_p draws among the likeliest tokens that have that
        much probability together. Raises UserError for numbers out of range and if there is nothing to go on from.
        """
        if max_tokens < 0 or temperature < 0 or not 0 < top_p <= 1:
            raise UserError(
                f"Cannot write {max_tokens} tokens at temperature {temperature} and top_p {top_p}; "
                "neither number of tokens nor temperature may be negative, and top_p lies above 0 and at most at 1."
            )
        fork = self.fork()
        if not isinstance(prompt, str) or prompt:
            fork.read(prompt)
        if len(fork._pending) == 0:
            raise UserError("There is nothing to go on from; give a prompt.")
        generator = torch.Generator().manual_seed(seed)
        state, ids_1T = fork._state, fork._tensor(fork._pending)
        for _ in range(max_tokens):
            logits_1TV, state = forward(self.model, state, ids_1T, self.dtype)
            chosen = sample(logits_1TV[0, -1].float().cpu(), temperature, top_p, generator)
            if self.tokenizer is not None and chosen == self.tokenizer.bos:
                return
            yield chosen
            ids_1T = fork._tensor(np.array([chosen]))

    def generate(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> Iterator[str]:
        """`generate_tokens` as text, in whole characters: a character whose bytes are not all there yet waits."""
        tokenizer = self._tokenizer()
        ids = self.generate_tokens(prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        context: list[int] = []  # some tokenizers drop a space where a text begins, so decoding needs what came before
        held: list[int] = []
        shown = 0
        for chosen in ids:
            held.append(chosen)
            text = tokenizer.decode(context + held)[len(tokenizer.decode(context)) :]
            whole = text.removesuffix("\ufffd")  # only the last character can still change
            if len(whole) > shown:
                yield whole[shown:]
                shown = len(whole)
            if whole == text:
                context, held, shown = held, [], 0

    def save(self, path: Path) -> None:
        """Write the session to one file, whole or not at all: what was learned, what is cached, what is pending.

        Raises UserError if `path` is something other than a session, if the disk is full or the place not writable.
        """
        path = Path(path)
        check_session_target(path)
        state = self._state
        tensors = {"pending": torch.from_numpy(self._pending.copy())}
        kinds = {"fast": state.loop.fast, "static": state.static or (), "loop": state.loop.caches}
        for kind, values in kinds.items():
            for i, value in enumerate(values):
                tensors |= dict(zip(_names(kind, i, type(value)), value, strict=True))
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        facts = {
            "version": VERSION,
            "position": state.position,
            "learn": self.learn,
            "dtype": str(self.dtype).removeprefix("torch."),
            "model": _model_fingerprint(self.model),
            "tokenizer": None if self.tokenizer is None else self.tokenizer.digest,
        }
        facts["sha256"] = _sha256(tensors, facts)
        with atomic_path(path) as part:
            save_safetensors(tensors, part, {"format": FORMAT, "session": json.dumps(facts)})

    @classmethod
    def load(
        cls, path: Path, model: Transformer, tokenizer: Tokenizer | None = None, *, compile: bool = False
    ) -> "Session":
        """The session in the file `path`, to go on with exactly where it was saved, compiled or not.

        Raises UserError if it is no session, truncated or altered, or if it belongs to another model or tokenizer.
        """
        facts, tensors = _read(Path(path))
        if facts["model"] != _model_fingerprint(model):
            raise UserError(
                f"The session {path} belongs to another model than this one; give the model that it was read with."
            )
        if facts["tokenizer"] != (None if tokenizer is None else tokenizer.digest):
            raise UserError(
                f"The session {path} was read with another tokenizer; give the model folder it was read with."
            )
        session = cls(model, tokenizer, learn=facts["learn"], dtype=DTYPES[facts["dtype"]], compile=compile)
        device = model.embedding.device

        def values(kind: str, types: list[Any]) -> tuple[Any, ...]:
            names = [_names(kind, i, cls) for i, cls in enumerate(types)]
            return tuple(cls(*(tensors[n].to(device) for n in row)) for cls, row in zip(types, names, strict=True))

        suffix = model.suffix
        try:
            fast = values("fast", [FastWeights] * len(suffix))
            caches = values("loop", [block.mixer.State for block in suffix[1:]])
            below = [block.mixer.State for block in (*model.prefix, *suffix[:1])]
            static = values("static", below) if facts["position"] else None
        except KeyError as error:
            raise UserError(f"The session {path} lacks {error}; use an unaltered copy.") from error
        session._state = ReadState(facts["position"], static, State(fast, caches))
        session._pending = tensors["pending"].numpy()
        return session

    # -- inside ----------------------------------------------------------------------------------------------------

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("This session has no tokenizer; give it token ids, or make it with a tokenizer.")
        return self.tokenizer

    def _ids(self, tokens: str | np.ndarray | Iterable[int]) -> np.ndarray:
        if isinstance(tokens, str):
            return self._tokenizer().encode(tokens)
        ids = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
        if ids.size == 0:
            return np.empty(0, np.int64)
        vocabulary = self.model.config.vocab_size
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocabulary:
            raise UserError(
                f"Tokens must be a row of whole numbers from 0 to {vocabulary - 1}; "
                "was the text tokenised with another tokenizer?"
            )
        return ids.astype(np.int64)

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
            inner_lr=None if self.learn else 0.0,
            dtype=self.dtype,
            steps=self._steps,
        )
        losses = nll_1T[0].float().cpu().numpy()
        self._check(losses, float(norm_1))
        before = (self._state, self._pending[:1].copy()) if self.learn else None
        self._before, self._state, self._pending = before, after, self._pending[piece:]
        return losses

    def _check(self, losses: np.ndarray, norm: float) -> None:
        """Raise Diverged unless the losses are sound; the session then has forgotten what led to them.

        A mini-batch's loss judges the update before it, so the last good state is the one before that update. A
        gradient that is not finite would only spoil the next state.
        """
        first, last = self.position, self.position + len(losses)
        loss, limit = float(losses.mean()), _ABSURD * math.log(self.model.config.vocab_size)
        if not math.isfinite(loss) and (self.position == 0 or not self.learn):
            raise Diverged(
                f"The model has a loss of {loss} at tokens {first} to {last} although nothing was learned; "
                "its weights are not fit for use, train or load another model.",
                self.position,
            )
        learned = self.learn and self.position > 0
        if math.isfinite(loss) and (loss <= limit or not learned):
            if math.isfinite(norm):
                return
            what = f"the gradient at tokens {first} to {last} is {norm}"
        else:
            what = f"the loss at tokens {first} to {last} is {loss:.4g} nats per token"
            if self._before is not None:
                self._state, self._pending = self._before
        self._before, self._pending = None, self._pending[:1]
        raise Diverged(
            f"Learning diverged: {what}; the session is back at its last good state, after {self.position} tokens. "
            "Read without learning, or with a model of a smaller inner_lr.",
            self.position,
        )


def _names(kind: str, i: int, cls: Any) -> list[str]:
    """What the tensors of a state are called in a file; the letters of their shapes are left out."""
    return [f"{kind}.{i}.{field.rpartition('_')[0]}" for field in cls._fields]


def frozen_batches(config: ModelConfig) -> int:
    """How many mini-batches are read at once where nothing is learned: fewer for a large vocabulary."""
    return max(1, min(_FROZEN_BATCHES, _LOGITS // (config.vocab_size * (config.mini_batch or 256))))


def sample(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token from logits on the CPU; see `Session.generate_tokens`."""
    if temperature == 0:
        return int(logits_V.argmax())
    p_V, order_V = (logits_V.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    if top_p < 1:
        p_V = p_V.masked_fill(p_V.cumsum(-1) - p_V >= top_p, 0.0)
    return int(order_V[torch.multinomial(p_V, 1, generator=generator)])


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
    return model, tokenizer


# -- files -------------------------------------------------------------------------------------------------------------


def check_session_target(path: Path) -> None:
    """Raise UserError if writing a session to `path` would replace something that is not a session."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file for the session.")
    if path.exists():
        try:
            session_facts(path)
        except UserError as error:
            raise UserError(f"{path} exists and is not a session; it is left as it is, choose another name.") from error


def session_facts(path: Path) -> dict[str, Any]:
    """What the file `path` says of its session: version, position, learn, dtype, digests; its tensors are not read.

    Raises UserError if it is no session of this version.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; give a session file, as `ttt-e2e read --save` writes it.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        facts = json.loads(metadata["session"]) if metadata.get("format") == FORMAT else None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no session, or a truncated one; give a whole session file.") from error
    if not isinstance(facts, dict):
        raise UserError(f"{path} is no session; give a file that `ttt-e2e read --save` has written.")
    if facts.get("version") != VERSION:
        raise UserError(
            f"{path} is a session of version {facts.get('version')}, this program reads {VERSION}; update ttt-e2e."
        )
    return facts


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    facts = session_facts(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise UserError(f"{path} is truncated; use a whole copy.") from error
    expected = facts.pop("sha256", None)
    if expected != _sha256(tensors, facts):
        raise UserError(f"{path} was altered after it was written: its digest does not fit; use another copy.")
    return facts, tensors


def _sha256(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _model_fingerprint(model: Transformer) -> str:
    """Equal for models that compute alike: weights and configuration."""
    config = json.dumps(to_dict(model.config), sort_keys=True)
    return hashlib.sha256(f"{model_digest(model)} {config}".encode()).hexdigest()
