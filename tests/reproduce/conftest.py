"""Fixtures of the tests of comparisons."""

from pathlib import Path

import pytest
from helpers import made_up_tokens
from reproduce_helpers import make_comparison


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of sixty documents, some of them shorter than a sequence."""
    return made_up_tokens(tmp_path_factory.mktemp("data"), 60)


@pytest.fixture(scope="session")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole comparison that was not interrupted; tests do not change its results."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    outcome = make_comparison(out, data, seeds=[0, 1])
    assert not outcome.problems and not outcome.interrupted
    return out
