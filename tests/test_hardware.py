"""What the process asks of the machine."""

import resource
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")

# Page faults of allocating, filling and freeing 16 MiB twenty times, after the first time.
FAULTS = """
import resource
import torch
from ttt_e2e.hardware import keep_freed_memory
{call}
def use():
    blocks = [torch.ones(1 << 20) for _ in range(4)]
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(call=call)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_keep_freed_memory_takes_it_from_the_system_once() -> None:
    one_use = (16 << 20) // resource.getpagesize()
    assert faults("keep_freed_memory()") < 2 * one_use
