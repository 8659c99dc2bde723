"""Settings from text and from JSON, each checked against its type."""

import dataclasses
import difflib
import functools
import json
import math
import operator
import types
import typing
from typing import Any, Literal

from ttt_e2e.config.ranges import shown
from ttt_e2e.config.schema import C, RunConfig, replace
from ttt_e2e.errors import UserError

_type_hints = functools.cache(typing.get_type_hints)  # which evaluates the text of every annotation


def override(config: RunConfig, assignments: list[str]) -> RunConfig:
    """`config` with assignments such as "model.sliding_window=256" applied.

    The beginning of a name may be left out: "lr" is "train.lr" and "inner_loop.lr" is "model.inner_loop.lr". Of several
    full names that end in the given one, that with the fewest parts is meant.
    """
    known = _settings(RunConfig)
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"{assignment!r} is not a setting; write NAME=VALUE, such as train.steps=100.")
        matches = [name] if name in known else [full for full in known if full.endswith(f".{name}")]
        shortest = [full for full in matches if full.count(".") == min(m.count(".") for m in matches)]
        if len(shortest) > 1:
            raise UserError(f"There are several settings {name!r}: {', '.join(shortest)}; write one of these names.")
        if not shortest:
            near = difflib.get_close_matches(name, [*known, *(full.rpartition(".")[2] for full in known)], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(known)}."
            raise UserError(f"There is no setting {name!r}.{hint}")
        changes[shortest[0]] = _parse(text, known[shortest[0]], shortest[0])
    return replace(config, changes)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values, equal to what comes back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(config: Any) -> dict[str, Any]:
    """The value of every setting of a configuration by its full name, such as "inner_loop.lr"."""
    return {name: operator.attrgetter(name)(config) for name in _settings(type(config))}


def from_dict(cls: type[C], values: dict[str, Any], where: str = "the configuration", prefix: str = "") -> C:
    """The reverse of `to_dict`: a configuration of type `cls`.

    Raises UserError for unknown, missing and mistyped settings: their `prefix` and name, and `where` they come from.
    """
    hints = _hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{where} has unknown settings: {', '.join(prefix + name for name in unknown)}.")
    absent = [f for f in dataclasses.fields(cls) if f.name not in values]  # type: ignore[arg-type]
    missing = [prefix + f.name for f in absent if f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise UserError(f"{where} lacks settings: {', '.join(missing)}.")
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            checked[name] = from_dict(hints[name], value, where, f"{prefix}{name}.")
        else:
            checked[name] = _check(value, hints[name], f"{prefix}{name} in {where}")
    try:
        return cls(**checked)
    except UserError as error:
        raise UserError(f"In {where}: {error}") from error


def _settings(cls: Any, prefix: str = "") -> dict[str, Any]:
    """The type of every setting of a configuration by its full name."""
    found: dict[str, Any] = {}
    for name, hint in _hints(cls).items():
        found |= _settings(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return found


def _hints(cls: Any) -> dict[str, Any]:
    """The type of every field; fields whose default is None accept it, too."""
    hints = _type_hints(cls)
    return {f.name: hints[f.name] | None if f.default is None else hints[f.name] for f in dataclasses.fields(cls)}


def _kinds(hint: Any) -> list[Any]:
    """The types that a setting may have, and the words that it may be."""
    if isinstance(hint, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else [hint]


def _check(value: Any, hint: Any, where: str) -> Any:
    for kind in _kinds(hint):
        if isinstance(kind, str):
            if value == kind:
                return value
        elif typing.get_origin(kind) is tuple:
            if isinstance(value, (list, tuple)):
                return tuple(_check(item, typing.get_args(kind)[0], where) for item in value)
        elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return _as_float(value)
        elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "none"}
    names |= {tuple: "a list"}
    kinds = [typing.get_origin(kind) or kind for kind in _kinds(hint)]
    expected = " or ".join(repr(kind) if isinstance(kind, str) else names.get(kind, "an object") for kind in kinds)
    raise UserError(f"{where} must be {expected}, not {shown(value)}.")


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number that no float can hold
        return math.inf if value > 0 else -math.inf


def _parse(text: str, hint: Any, where: str) -> Any:
    if typing.get_origin(hint) is tuple:
        return tuple(_parse(item.strip(), typing.get_args(hint)[0], where) for item in text.split(","))
    kinds = _kinds(hint)
    try:
        value = text if text in kinds else None if text.lower() in ("none", "null") else json.loads(text.lower())
    except (ValueError, RecursionError):  # also too many digits, or too deep
        value = text
    if isinstance(value, float) and value.is_integer() and float not in kinds:
        value = int(value)
    return _check(value, hint, where)
