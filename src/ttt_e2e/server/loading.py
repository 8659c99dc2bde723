"""Sessions from files that may be damaged, or made up by somebody who means harm.

A file's digest shows that it was not altered by accident; anybody can compute one. What a session of this model holds
is known, so everything else is refused: a tensor of another shape would end the call in which others are read too.
"""

import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt_e2e.config.parse import from_dict
from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session, token_ids
from ttt_e2e.inference.session_file import SessionInfo, read_session_file, session_facts, state_tensors
from ttt_e2e.model.mixers.attention import Attention
from ttt_e2e.model.mixers.titans import Titans

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FARTHEST = 1 << 53  # a position beyond is no whole number any more where angles are computed


class Loader:
    """Loads sessions that are made as `fresh` is: of its model, tokenizer, dtype and kind of learning.

    fresh: a session with a tokenizer that has read nothing; it stays as it is. Making a loader has the model read one
    mini-batch. Raises UserError if the model is not fit for use.
    """

    def __init__(self, fresh: Session) -> None:
        self.fresh = fresh
        self.info = fresh.info()
        self._begun = fresh.fork()
        self._begun.read(np.zeros(fresh.piece, np.int64))
        self._shapes: dict[tuple[bool, Any], dict[str, tuple[list[int], torch.dtype]]] = {}

    def info_of(self, path: Path, name: str) -> SessionInfo:
        """What the file says of its session; its tensors are not read. Raises UserError as `load` does."""
        try:
            facts = session_facts(path)
        except UserError as error:
            raise _renamed(error, path, name) from error
        try:
            info = from_dict(SessionInfo, {field.name: facts[field.name] for field in fields(SessionInfo)})
        except (UserError, KeyError) as error:
            raise _unsound(name) from error
        numbers = (info.position, info.pending, info.tokens, info.text_bytes or 0, info.memory_bytes)
        if not all(0 <= number < _FARTHEST for number in numbers) or not _DIGEST.fullmatch(info.text_digest):
            raise _unsound(name)
        return info

    def load(self, path: Path, name: str) -> Session:
        """The session in the file `path`. name: what it is called in errors, in place of the path.

        Raises UserError if it is no session, damaged, made up, or not made as `fresh` is.
        """
        try:
            facts, tensors = read_session_file(path)
            if facts["model"] == self.info.model:  # else `unpack` says so
                self._check(facts, tensors, name)
            session = self.fresh.fork()
            session.unpack(facts, tensors, str(path))
            found = {fact: value for fact, value in asdict(session.info()).items() if fact != "learned_norm"}
            if any(facts[fact] != value for fact, value in found.items()):
                raise _unsound(name)
            return session
        except UserError as error:
            raise _renamed(error, path, name) from error
        except Exception as error:  # a made-up file may hold anything anywhere
            raise _unsound(name) from error

    def _check(self, facts: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
        for fact in ("learn", "dtype"):
            if facts[fact] != getattr(self.info, fact):
                raise UserError(
                    f"{name} was read with {fact} = {facts[fact]}, and here it is {getattr(self.info, fact)}; "
                    "use the same as then, or read its text anew."
                )
        position, pending = facts["position"], tensors["pending"]
        for number in (position, facts["state_bytes"]):
            if type(number) is not int or not 0 <= number < _FARTHEST:
                raise _unsound(name)
        if position % self.fresh.mini_batch:
            raise _unsound(name)
        if pending.dtype != torch.int64 or pending.dim() != 1 or not 1 <= len(pending) <= self.fresh.piece:
            raise _unsound(name)
        token_ids(pending.numpy(), self.fresh.model.config.vocab_size)
        if len(facts["state_digest"]) != (64 if position else 0):
            raise _unsound(name)
        for key, (shape, dtype) in self._expected(position, facts["precision"]).items():
            tensor = tensors[key]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.isfinite().all():
                raise _unsound(name)

    def _expected(self, position: int, precision: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the tensors in the file of a session that stands at `position`."""
        model, kind = self.fresh.model, (position > 0, precision)
        if kind not in self._shapes:
            state = (self._begun if position else self.fresh).standing().state
            tensors = state_tensors(model, state, self.fresh.learn, precision)
            self._shapes[kind] = {key: (list(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
        mixers = [block.mixer for block in (*model.prefix, *model.suffix)]
        first = {"static": 0, "loop": len(model.prefix) + 1}
        expected = {}
        for key, (shape, dtype) in self._shapes[kind].items():
            place, i, part = key.split(".")
            if part in ("k", "v"):  # all that grows with the text
                slots = _slots(mixers[first[place] + int(i)], model.config.sliding_window, position)
                shape = [*shape[:2], slots, *shape[3:]]
            expected[key] = tuple(shape), dtype
        return expected


def _slots(mixer: Any, window: int, position: int) -> int:
    """How many keys a mixer has kept of a text at `position`."""
    if isinstance(mixer, Titans):
        return 2 * (position % window)
    return position if isinstance(mixer, Attention) and mixer.window is None else min(position, window)


def _renamed(error: UserError, path: Path, name: str) -> UserError:
    """The same sentence without the path, which is nobody's business."""
    return UserError(str(error).replace(f"The session {path}", name).replace(str(path), name))


def _unsound(name: str) -> UserError:
    return UserError(f"{name} does not hold what a session of this model holds; use an unaltered copy.")
