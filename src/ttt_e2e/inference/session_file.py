"""Sessions as files: one safetensors file each, written whole or not at all, that knows which model it belongs to.

What a file holds: the fast weights (only if they were learned with; see `state_tensors` for how), the mixers' states as
they are, the pending tokens, and, in its header, facts in JSON: those that `Session.info` gives, the version, and the
SHA-256 of everything. A reading that is not finished keeps more in the same file, under names of its own (see
`unfinished`).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttt_e2e.config.parse import to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path
from ttt_e2e.inference.streaming import ReadState
from ttt_e2e.inner_loop.step import State, tree_map
from ttt_e2e.model.checkpoint import model_digest, save_safetensors
from ttt_e2e.model.transformer import Transformer

VERSION = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

Precision = Literal["float32", "bfloat16", "float16"]
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SessionInfo:
    """What a session is.

    position, pending: as in `Session`. tokens: all that were read, BOS among them. text_bytes: of their text in UTF-8;
    None without a tokenizer that works on bytes. text_digest: of those tokens, the same however they were split.
    model: the digest of the model's weights and configuration. learn, dtype: as given. memory_bytes: of the fast
    weights and the mixers' states. learned_norm: of the difference between the fast weights and the model's.
    """

    position: int
    pending: int
    tokens: int
    text_bytes: int | None
    text_digest: str
    model: str
    learn: bool
    dtype: str
    memory_bytes: int
    learned_norm: float


# -- tensors -----------------------------------------------------------------------------------------------------------


def state_tensors(
    model: Transformer, state: ReadState, learned: bool, precision: Precision = "float32"
) -> dict[str, Tensor]:
    """The tensors of `state` by the names they have in a file, on the CPU.

    learned: whether the fast weights are other than the model's; if not, they are left out. precision: "float32" keeps
    the fast weights themselves, bit for bit. A difference would be as large and not exact: w - w0 is rounded, and so is
    w0 + (w - w0). The other two keep the difference to the model's weights in half the space: so what is rounded is
    what was learned, and not the weights. Raises UserError for another precision, or a difference beyond its range.
    """
    if precision != "float32" and precision not in _HALVES:
        raise UserError(f"There is no precision {precision!r} for a session; choose float32, {' or '.join(_HALVES)}.")
    tensors: dict[str, Tensor] = {}
    for kind, values in (("static", state.static or ()), ("loop", state.loop.caches)):
        for i, value in enumerate(values):
            tensors |= dict(zip(_names(kind, i, type(value)), value, strict=True))
    for i, (now, start) in enumerate(zip(state.loop.fast, model.initial_fast_weights(1), strict=True)):
        if not learned:
            break
        if precision == "float32":
            tensors |= dict(zip(_names("fast", i, model.fast_kind), now, strict=True))
            continue
        for name, w, w0 in zip(_names("learned", i, model.fast_kind), now, start, strict=True):
            tensors[name] = (w - w0).to(_HALVES[precision])
            if not tensors[name].isfinite().all():
                raise UserError(f"What was learned is too large for {precision}; save the session in float32.")
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def state_from_tensors(
    model: Transformer, tensors: Mapping[str, Tensor], position: int, learned: bool, precision: Precision
) -> ReadState:
    """The state that `state_tensors` was given, on the model's device. Raises KeyError if one is missing."""
    device, suffix = model.embedding.device, model.suffix

    def values(kind: str, types: list[Any]) -> tuple[Any, ...]:
        rows = [_names(kind, i, cls) for i, cls in enumerate(types)]
        return tuple(cls(*(tensors[name].to(device) for name in row)) for cls, row in zip(types, rows, strict=True))

    kind: Any = model.fast_kind
    kinds = [kind] * len(suffix)
    fast = tree_map(model.initial_fast_weights(1), Tensor.detach)
    if learned and precision == "float32":
        fast = values("fast", kinds)
    elif learned:
        learned_of = zip(fast, values("learned", kinds), strict=True)
        fast = tuple(kind(*(w0 + d.to(w0.dtype) for w0, d in zip(*pair, strict=True))) for pair in learned_of)
    below = [block.mixer.State for block in (*model.prefix, *suffix[:1])]
    static = values("static", below) if position else None
    return ReadState(position, static, State(fast, values("loop", [block.mixer.State for block in suffix[1:]])))


def memory_bytes(state: ReadState) -> int:
    """How much memory `state` takes: fast weights and mixers' states."""
    return sum(tensor.nbytes for tensor in state.tensors())


def learned_norm(model: Transformer, state: ReadState) -> float:
    """The Euclidean norm of the difference between the fast weights and the model's: 0 where nothing was learned."""
    pairs = zip(state.loop.fast, model.initial_fast_weights(1), strict=True)
    norms = [float((w - w0).detach().norm()) for now, start in pairs for w, w0 in zip(now, start, strict=True)]
    return float(np.linalg.norm(norms))


def model_fingerprint(model: Transformer) -> str:
    """Equal for models that compute alike: weights and configuration."""
    config = json.dumps(to_dict(model.config), sort_keys=True)
    return hashlib.sha256(f"{model_digest(model)} {config}".encode()).hexdigest()


def _names(kind: str, i: int, cls: Any) -> list[str]:
    """What the tensors of a state are called in a file; the letters of their shapes are left out."""
    return [f"{kind}.{i}.{field.rpartition('_')[0]}" for field in cls._fields]


# -- files -------------------------------------------------------------------------------------------------------------


def write_session_file(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write facts and tensors to `path`, whole or not at all.

    Raises UserError if `path` is something other than a session, if the disk is full or the place not writable.
    """
    path = Path(path)
    check_session_target(path)
    facts = {"version": VERSION, **facts}
    facts["sha256"] = _sha256(tensors, facts)
    with atomic_path(path) as part:
        # One entry alone: the library writes several in any order, and equal sessions should be equal files.
        save_safetensors(tensors, part, {"session": json.dumps(facts)})


def read_session_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of the session in `path`. Raises UserError if it is none, truncated, altered or older."""
    facts = session_facts(path)
    while True:
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"{path} is truncated, or is being written at this moment; use a whole copy.") from error
        before, facts = facts, session_facts(path)
        if facts == before:  # else the session was saved anew in between
            break
    if facts.get("sha256") != _sha256(tensors, {name: fact for name, fact in facts.items() if name != "sha256"}):
        raise UserError(f"{path} was altered after it was written: its digest does not fit; use another copy.")
    return facts, tensors


def session_facts(path: Path) -> dict[str, Any]:
    """What the file `path` says of its session; its tensors are not read.

    Raises UserError if it is no session of this version.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; give a session file, as `ttt-e2e read --save` writes it.")
    try:
        # With "pt" the file would be opened twice, and a session that is being saved might be another one by then.
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
        facts = json.loads(metadata["session"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no session, or a truncated one; give a whole session file.") from error
    if not isinstance(facts, dict) or "version" not in facts:
        raise UserError(f"{path} is no session; give a file that `ttt-e2e read --save` has written.")
    version = facts["version"]
    if version != VERSION:
        older = isinstance(version, int) and version < VERSION
        remedy = "read its text anew, or use the version that wrote it" if older else "update ttt-e2e"
        raise UserError(f"{path} is a session of version {version}, this program reads {VERSION}; {remedy}.")
    return facts


def check_session_target(path: Path) -> None:
    """Raise UserError if writing a session to `path` would replace anything but a session of this version."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file for the session.")
    if path.exists():
        try:
            session_facts(path)
        except UserError as error:
            raise UserError(
                f"{path} exists and is no session of this version; it is left as it is, choose another name."
            ) from error


def _sha256(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
