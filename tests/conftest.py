"""Settings and fixtures of all tests."""

import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GOLDEN
from hypothesis import settings

settings.register_profile("ours", deadline=None)  # a busy machine is no failure
settings.load_profile("ours")

# A shell without job control ignores it for background processes, and Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Hundreds of thousands of objects that stay were imported: to go through them as often as usual is 5 % of the time.
gc.set_threshold(50_000, 20, 20)

# Small tensors: threads would only wait for each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests begin first, so that no worker waits at the end for another one's."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers get neighbouring tests, which share fixtures, and one that has ended early takes some from another."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    if not GOLDEN.is_dir():
        pytest.skip("the official implementation's reference tensors (../shared/golden) are not here")
    return GOLDEN


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """So small a model only waits for a second thread, whatever a run has set before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
