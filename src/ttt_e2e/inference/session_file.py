"""Sessions as files: one safetensors file each, written whole or not at all, that knows which model it belongs to.

A file holds the fast weights (if the session learns), the mixers' states and the pending tokens, and, in its header,
facts in JSON: those of `SessionInfo` and `Session.pack`, format and version, and the SHA-256 of the tensors and of the
facts. An unfinished reading keeps more in the same file, under names of its own (see `reading.resume`).
"""

import functools
import hashlib
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttt_e2e.config.parse import from_dict, to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path, check_digest, check_format, lock_beside, with_digest
from ttt_e2e.inference.streaming import ReadState
from ttt_e2e.inner_loop.step import InnerLoopState, tree_map
from ttt_e2e.model.checkpoint import model_digest, save_safetensors
from ttt_e2e.model.kv_cache import KVCache
from ttt_e2e.model.mixers.gated_deltanet import DeltaState
from ttt_e2e.model.mixers.mamba2 import Mamba2State
from ttt_e2e.model.mixers.titans import TitansState
from ttt_e2e.model.mixers.ttt_kvb import TTTKVBState
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.ops.fast_mlp import FastWeights, LowRankWeights

FORMAT, VERSION = "ttt-e2e session", 4
MAX_HEADER_BYTES = 1 << 20  # several times the header of the largest session
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

Precision = Literal["float32", "bfloat16", "float16"]

# Names in a file, in the order of the fields. A field may be renamed, what is on disk may not.
TENSOR_NAMES: dict[type, str] = {
    KVCache: "k v",
    DeltaState: "conv rule",
    Mamba2State: "conv ssm",
    TTTKVBState: "k v w_in w_out pending_k pending_v pending_theta",
    TitansState: "k v w_in w_out momentum_in momentum_out pending_k pending_v pending_theta pending_eta pending_keep",
    FastWeights: "w_in w_out",
    LowRankWeights: "up_in down_in up_out down_out",
}
# Settings that older files know nothing of, and the values at which a model is the same as one without them.
_LATER_SETTINGS = {
    "attention_sink": False,
    "inner_loop.learned_lr": False,
    "rope_pattern": [True],
    "rope_local_pattern": [False],
    "rope_local_base_freq": 10_000.0,
    "hidden_act": "silu",
    "embedding_multiplier": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "qk_norm_joint": False,
    "rope_scaling.pair_factors": [1.0],
}
_INFO = "position pending tokens text_bytes text_digest model learn dtype memory_bytes learned_norm"


@dataclass(frozen=True)
class SessionInfo:
    """What there is to know about a session."""

    position: int  # tokens read, in whole mini-batches
    pending: int  # tokens after these that have no loss yet
    tokens: int  # all tokens so far, BOS and pending ones among them
    text_bytes: int | None  # their text in UTF-8; None without a tokenizer that works on bytes
    text_digest: str  # of these tokens, the same however they were split
    model: str  # digest of the model's weights and configuration
    learn: bool  # whether the session learns while it reads
    dtype: str  # of the matrix products
    memory_bytes: int  # of the fast weights and the mixers' states
    learned_norm: float  # Euclidean norm of the difference between the fast weights and the model's

    def to_facts(self) -> dict[str, Any]:
        """As plain values, by their names in a file."""
        return dict(zip(_INFO.split(), astuple(self), strict=True))

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "SessionInfo":
        """The reverse of `to_facts`. Raises UserError if a fact is missing or of another type."""
        named = zip(fields(cls), _INFO.split(), strict=True)
        return from_dict(cls, {field.name: facts[name] for field, name in named if name in facts}, "the session")


def state_tensors(
    model: Transformer, state: ReadState, learned: bool, precision: Precision = "float32"
) -> dict[str, Tensor]:
    """The tensors of a session's state by their names in a file, on the CPU.

    learned: whether fast weights differ from the model's; if not, they are left out. precision: "float32" keeps the
    fast weights bit for bit. (Their difference to the model's weights would take as much space and lose bits, since
    w - w0 is rounded, and w0 + (w - w0) again.) The other two keep that difference in half the space, so that rounding
    affects what was learned and not the weights. Raises UserError for another precision, or a difference beyond its
    range.
    """
    if precision not in get_args(Precision):
        raise UserError(f"There is no precision {precision!r} for a session; choose float32, bfloat16 or float16.")
    below, above, fast = _state_kinds(model)
    tensors = _named("static", below, state.static or ()) | _named("loop", above, state.loop.caches)
    if learned and precision == "float32":
        tensors |= _named("fast", fast, state.loop.fast)
    elif learned:
        dtype = getattr(torch, precision)
        pairs = zip(state.loop.fast, model.initial_fast_weights(1), strict=True)
        differences = [[(w - w0).to(dtype) for w, w0 in zip(now, start, strict=True)] for now, start in pairs]
        if not all(difference.isfinite().all() for of_block in differences for difference in of_block):
            raise UserError(f"What was learned is too large for {precision}; save the session in float32.")
        tensors |= _named("learned", fast, differences)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def state_from_tensors(
    model: Transformer, tensors: Mapping[str, Tensor], position: int, learned: bool, precision: Precision
) -> ReadState:
    """The reverse of `state_tensors`, on the model's device. Raises KeyError if a tensor is missing."""
    below, above, kinds = _state_kinds(model)

    def values(group: str, kinds: list[Any]) -> tuple[Any, ...]:
        rows = [[f"{group}.{i}.{name}" for name in TENSOR_NAMES[kind].split()] for i, kind in enumerate(kinds)]
        device = model.embedding.device
        return tuple(kind(*(tensors[name].to(device) for name in row)) for kind, row in zip(kinds, rows, strict=True))

    fast = tree_map(model.initial_fast_weights(1), Tensor.detach)
    if learned and precision == "float32":
        fast = values("fast", kinds)
    elif learned:
        pairs = zip(fast, values("learned", kinds), strict=True)
        fast = tuple(type(w)(*(w0 + d.to(w0.dtype) for w0, d in zip(w, dw, strict=True))) for w, dw in pairs)
    return ReadState(
        position, values("static", below) if position else None, InnerLoopState(fast, values("loop", above))
    )


def _state_kinds(model: Transformer) -> tuple[list[Any], list[Any], list[Any]]:
    """The types of the mixers' states below the loop and in it, and of the fast weights."""
    mixers = [block.mixer.State for block in (*model.prefix, *model.suffix)]
    below = len(model.prefix) + 1
    return mixers[:below], mixers[below:], [model.fast_kind] * len(model.suffix)


def _named(group: str, kinds: list[Any], values: Sequence[Any]) -> dict[str, Tensor]:
    return {
        f"{group}.{i}.{name}": tensor
        for i, (kind, value) in enumerate(zip(kinds, values, strict=False))  # no values at the start of a text
        for name, tensor in zip(TENSOR_NAMES[kind].split(), value, strict=True)
    }


def learned_norm(model: Transformer, state: ReadState) -> float:
    """The Euclidean norm of the difference between the fast weights and the model's: 0 if nothing was learned."""
    pairs = zip(state.loop.fast, model.initial_fast_weights(1), strict=True)
    norms = [float((w - w0).detach().norm()) for now, start in pairs for w, w0 in zip(now, start, strict=True)]
    return float(np.linalg.norm(norms))


def model_fingerprint(model: Transformer) -> str:
    """A digest of weights and configuration, equal for models that compute the same."""
    config = to_dict(model.config)
    for name, default in _LATER_SETTINGS.items():
        *sections, last = name.split(".")
        section = functools.reduce(operator.getitem, sections, config)
        if section[last] == default:
            del section[last]
    return hashlib.sha256(f"{model_digest(model)} {json.dumps(config, sort_keys=True)}".encode()).hexdigest()


def write_session_file(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write facts and tensors to `path`, whole or not at all.

    Raises UserError if `path` is something other than a session, if the disk is full or the folder is not writable.
    """
    check_session_target(path)
    with atomic_path(path) as part:
        write_new_session_file(part, facts, tensors)


def write_new_session_file(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write facts and tensors to the file `path`, which holds nothing yet. If this fails, a part of it may remain."""
    facts = with_digest({"format": FORMAT, "version": VERSION, **facts, "tensors_sha256": _sha256(tensors)})
    # One entry alone: the library writes several in any order, and equal sessions should be equal files.
    save_safetensors(tensors, path, {"session": json.dumps(facts)})


Layout = Mapping[str, tuple[list[int], str]]
"""The tensors in a file by name: the shape of each, and its type as safetensors writes it, such as "F32"."""


def read_session_file(
    path: Path, check: Callable[[dict[str, Any], Layout], None] = lambda facts, layout: None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of the session in `path`; `check` may refuse facts and layout before a tensor is made.

    Raises UserError if it is not a session of this version, or is truncated or altered.
    """
    before = None
    while (facts := session_facts(path)) != before:  # or the session was saved again in between
        before = facts
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                check(facts, {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"{path} is truncated, or is being written at this moment; use a whole copy.") from error
    if facts.get("tensors_sha256") != _sha256(tensors):
        raise UserError(f"{path} was altered after it was written: its digest does not match; use another copy.")
    return facts, tensors


def session_facts(path: Path) -> dict[str, Any]:
    """The facts in the header of the session file `path`, without reading its tensors.

    Raises UserError if it is not a session of this version, or if they were altered.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; give a session file, as `ttt-e2e read --save` writes it.")
    try:
        with path.open("rb") as start:
            if int.from_bytes(start.read(8), "little") > MAX_HEADER_BYTES:
                raise ValueError("a header of this length would be parsed at the cost of the whole process")
        # With "pt" the file would be opened twice, and a session that is being saved might be another one by then.
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
        facts = json.loads(metadata["session"])
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is not a session, or is truncated; give a complete session file.") from error
    if not isinstance(facts, dict) or "version" not in facts:
        raise UserError(f"{path} is not a session; give a file that `ttt-e2e read --save` has written.")
    remedy = "read its text again, or use the version of ttt-e2e that wrote it"
    check_format({"format": FORMAT, **facts}, path, FORMAT, VERSION, remedy)  # versions 1 and 2 had no format
    check_digest(facts, path)
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
                f"{path} exists and is not a session of this version, so it is kept; choose another name."
            ) from error


def lock_session(path: Path) -> AbstractContextManager[IO[str]]:
    """Keep other processes from writing the session file `path` in the block; see `files.lock_beside`.

    Whoever continues a session and saves it to the same file takes the lock first. Raises UserError if it is held.
    """
    return lock_beside(path)


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
