"""Benchmarks that have a small form run, and write what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_pretrained(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, str(BENCHMARKS / "pretrained.py"), "--tiny", "--context", "256", "--rounds", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "result.json")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["reading_tokens_per_second"]) == 5 and len(result["writing_tokens_per_second"]) == 2
    assert all(row["ratio"] > 0 for row in result["ratios"])
    assert done.stdout.count("\n| ") > 10 and "llama.cpp was not timed" in done.stdout
