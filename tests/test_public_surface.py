"""What `from ttt_e2e import ...` gives."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ttt_e2e


@pytest.mark.parametrize("name", ttt_e2e.__all__)
def test_every_public_name_resolves_to_what_the_stub_names(name: str) -> None:
    stub = ast.parse(Path(ttt_e2e.__file__).with_suffix(".pyi").read_text())
    homes = {
        alias.asname: line.module for line in stub.body if isinstance(line, ast.ImportFrom) for alias in line.names
    }
    assert sorted(homes) == ttt_e2e.__all__
    value = getattr(ttt_e2e, name)
    assert value.__name__ == name
    assert value.__module__ == homes[name]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        ttt_e2e.Sesion  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, ttt_e2e; dir(ttt_e2e); ttt_e2e.preset('tiny'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
