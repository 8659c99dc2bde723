"""The Triton kernels in Triton's interpreter, where there is no GPU that runs them.

The interpreter has to be chosen before Triton is imported, and would disturb everything else that uses Triton: all
files of kernels are run once more, in one process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
FILES = sorted(map(str, Path(__file__).parent.glob("*/test_triton.py")))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
def test_kernels_pass_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *FILES]
    # No file of kernels needs a plug-in; to import all that are installed takes three seconds.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
    assert len(FILES) == 2
