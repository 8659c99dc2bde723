"""The tables of settings in docs/reference/settings.md are the docstrings beside the fields."""

import ast
import dataclasses
import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from ttt_e2e.config import components, ranges, schema
from ttt_e2e.config.schema import ModelConfig, TrainConfig

DOCS = Path(__file__).parents[2] / "docs/reference/settings.md"


def docstrings(cls: type) -> dict[str, str]:
    """The docstring beside every field of a class."""
    [body] = [node.body for node in ast.parse(inspect.getsource(cls)).body if isinstance(node, ast.ClassDef)]
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def as_written(value: Any) -> str:
    """A value as it is written in NAME=VALUE."""
    if value is dataclasses.MISSING:
        return ""
    if isinstance(value, tuple):
        return f"`{','.join(as_written(item).strip('`') for item in value)}`"
    return f"`{str(value).lower() if isinstance(value, bool) or value is None else value}`"


def rows(cls: Any, prefix: str = "") -> list[str]:
    """A row for every setting: its full name, its default, its range and its docstring."""
    texts, found = docstrings(cls), []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            found += rows(type(field.default), f"{prefix}{field.name}.")
        else:
            assert field.name in texts, f"{cls.__name__}.{field.name} has no docstring"
            range_ = ranges.ranges_of(cls).get(field.name)
            ends = "" if range_ is None else f"{ranges.as_text(range_.low)} to {ranges.as_text(range_.high)}"
            cells = (f"`{prefix}{field.name}`", as_written(field.default), ends, texts[field.name])
            found.append(f"| {' | '.join(cells)} |")
    return found


@pytest.mark.parametrize(("heading", "cls"), [("## The model", ModelConfig), ("## The training", TrainConfig)])
def test_docs_list_every_setting(heading: str, cls: type) -> None:
    section = DOCS.read_text().split(f"{heading}\n")[1].split("\n#")[0]
    expected = "\n".join(rows(cls))
    assert "\n".join(re.findall(r"^\| `.*$", section, re.M)) == expected, f"the table should be:\n{expected}"


def test_every_class_of_settings_is_listed() -> None:
    fields = [*dataclasses.fields(ModelConfig), *dataclasses.fields(TrainConfig)]
    nested = {type(f.default) for f in fields if dataclasses.is_dataclass(f.default)}
    values = [*vars(components).values(), *vars(schema).values()]
    classes = {value for value in values if isinstance(value, type) and dataclasses.is_dataclass(value)}
    assert classes - nested == {ModelConfig, TrainConfig, schema.RunConfig}
