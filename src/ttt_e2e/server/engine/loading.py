"""Loads sessions from files that may be damaged or crafted by an attacker, who can compute a valid digest.

A tensor of a wrong shape would end a model call that other sessions share, so everything in a file is compared with
what a session of this model must hold at that position: names, shapes and types before any tensor is made, so that the
work is bounded by the size of a valid session.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session, check_token_ids
from ttt_e2e.inference.session_file import Layout, SessionInfo, read_session_file, session_facts, state_tensors
from ttt_e2e.model.mixers.attention import Attention
from ttt_e2e.model.mixers.titans import Titans

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
_MAX_NUMBER = 1 << 53  # positions beyond it are not exact in float64, in which rotary angles are computed


class SessionLoader:
    """Loads sessions with the model, tokenizer, dtype and `learn` of `template`, an empty session with a tokenizer.

    Creating one reads a mini-batch with the model. Raises UserError if the model is not fit for use.
    """

    def __init__(self, template: Session) -> None:
        self.template = template
        self.info = template.info()
        self._after_mini_batch = template.fork()
        self._after_mini_batch.read(np.zeros(template.chunk_size, np.int64))
        self._layouts: dict[tuple[bool, Any], Layout] = {}

    def read_info(self, path: Path, name: str) -> SessionInfo:
        """What the header of a session file says, without reading its tensors. Args and errors as for `load`."""
        try:
            facts = session_facts(path)
        except UserError as error:
            raise _without_path(error, path, name) from error
        try:
            info = SessionInfo.from_facts(facts)
        except UserError as error:
            raise _invalid(name) from error
        numbers = (info.position, info.pending, info.tokens, info.text_bytes or 0, info.memory_bytes)
        if not all(0 <= number < _MAX_NUMBER for number in numbers) or not _DIGEST.fullmatch(info.text_digest):
            raise _invalid(name)
        return info

    def load(self, path: Path, name: str) -> Session:
        """Load and check the session in the file `path`, which errors call `name`.

        Raises UserError if it is not a session file, is damaged or crafted, or differs from the template in settings.
        """
        try:
            facts, tensors = read_session_file(path, lambda facts, layout: self._check(facts, layout, name))
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise _invalid(name)
            check_token_ids(tensors["pending"].numpy(), self.template.model.config.vocab_size)
            session = self.template.fork()
            session.unpack(facts, tensors, str(path))
            found = {fact: value for fact, value in session.info().to_facts().items() if fact != "learned_norm"}
            if any(facts[fact] != value for fact, value in found.items()):
                raise _invalid(name)
            return session
        except UserError as error:
            raise _without_path(error, path, name) from error
        except Exception as error:  # a crafted file may hold anything anywhere
            raise _invalid(name) from error

    def _check(self, facts: dict[str, Any], layout: Layout, name: str) -> None:
        """Raise UserError unless this is the layout of a session of this model at the position in `facts`."""
        if facts["model"] != self.info.model:
            raise UserError(f"{name} belongs to another model; give the model that it was read with.")
        if "unfinished" in facts:
            raise UserError(f"{name} holds an unfinished reading; finish it with the `ttt-e2e read` that began it.")
        for fact in ("learn", "dtype"):
            if facts[fact] != getattr(self.info, fact):
                raise UserError(
                    f"{name} was read with {fact} = {facts[fact]}, and this service uses {getattr(self.info, fact)}; "
                    "use the same setting, or read the text again."
                )
        position, template = facts["position"], self.template
        for number in (position, facts["state_bytes"]):
            if type(number) is not int or not 0 <= number < _MAX_NUMBER:
                raise _invalid(name)
        if position % template.mini_batch_size or len(facts["state_digest"]) != (64 if position else 0):
            raise _invalid(name)
        model, kind = template.model, (position > 0, facts["precision"])
        if kind not in self._layouts:
            state = (self._after_mini_batch if position else template).state().read_state
            valid = state_tensors(model, state, template.learn, facts["precision"])
            self._layouts[kind] = {key: (list(tensor.shape), _TYPES[tensor.dtype]) for key, tensor in valid.items()}
        mixers = [block.mixer for block in (*model.prefix, *model.suffix)]
        first_block = {"static": 0, "loop": len(model.prefix) + 1}
        expected = dict(self._layouts[kind])
        for key, (shape, dtype) in expected.items():
            place, i, part = key.split(".")
            if part in ("k", "v"):  # only caches grow with the text
                slots = _cache_slots(mixers[first_block[place] + int(i)], model.config.sliding_window, position)
                expected[key] = [*shape[:2], slots, *shape[3:]], dtype
        shape, dtype = expected["pending"] = layout["pending"]
        if dtype != "I64" or len(shape) != 1 or not 1 <= shape[0] <= template.chunk_size or layout != expected:
            raise _invalid(name)


def _cache_slots(mixer: Any, window: int, position: int) -> int:
    """How many keys a mixer keeps of a text at `position`."""
    if isinstance(mixer, Titans):
        return 2 * (position % window)
    return position if isinstance(mixer, Attention) and mixer.window is None else min(position, window)


def _without_path(error: UserError, path: Path, name: str) -> UserError:
    """The same message with `name` in place of the path, which clients must not see."""
    return UserError(str(error).replace(f"The session {path}", name).replace(str(path), name))


def _invalid(name: str) -> UserError:
    return UserError(f"{name} does not hold a valid session of this model; use an unaltered copy.")
