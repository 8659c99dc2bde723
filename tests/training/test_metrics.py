"""The metrics of a run: odd lines are left out, and never end a run."""

import json
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_e2e.training.metrics import MetricsWriter, read_metrics

ODD = [
    *(
        b"",
        b"[]",
        b"3",
        b"null",
        b'"step"',
        b"{}",
        b'{"loss": 1}',
        b'{"step": null}',
        b'{"step": "3"}',
        b'{"step": 1.5}',
    ),
    *(b'{"step": NaN}', b'{"step": 1, "loss": NaN}', b'{"step": 1, "loss": "x"}', b'{"step": 1, "loss": 1e999}'),
    *(
        b"\xff\xfe",
        b'{"step": 1',
        b"\0\0\0",
        b"[" * 100_000,
        b'{"step": true}',
        b'{"loss": ' + b"9" * 400 + b', "step": 1}',
    ),
]


@pytest.mark.parametrize("odd", ODD)
def test_odd_lines_are_left_out_with_a_warning(tmp_path: Path, odd: bytes) -> None:
    first, second = {"step": 1, "loss": 2.5}, {"step": 2, "eval": {"loss": 2.25}}
    lines = [json.dumps(first).encode(), odd, json.dumps(second).encode()]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(UserWarning, match=r"Line 2 of .*metrics.jsonl is damaged"):
        assert read_metrics(tmp_path) == [first, second]
    with pytest.warns(UserWarning), MetricsWriter(tmp_path, 1, {}, False, False) as metrics:
        metrics.write({"step": 2})
    assert read_metrics(tmp_path) == [first, {"step": 2}]


@given(st.binary(max_size=60))
def test_any_bytes_can_be_read(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / "metrics.jsonl").write_bytes(content)
    with pytest.warns(UserWarning) if content.count(b"\n") else nullcontext():
        assert read_metrics(run) == []


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7), length=st.integers(0, 2))
def test_no_damage_gives_another_number(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int, length: int
) -> None:
    """Wherever a bit is flipped, or bytes are lost: a line is as it was written, or left out with a warning."""
    run = tmp_path_factory.mktemp("run")
    lines = [{"step": step, "loss": 2.5 + step, "eval": {"gain": 0.125}} for step in range(3)]
    with MetricsWriter(run, 0, {}, False, False) as metrics:
        for line in lines:
            metrics.write(line)
    content = bytearray((run / "metrics.jsonl").read_bytes())
    assert read_metrics(run) == lines
    place %= len(content)
    content[place : place + max(1, length)] = b"" if length else bytes([content[place] ^ 1 << bit])
    (run / "metrics.jsonl").write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_metrics(run)
    assert [{name: line.get(name) for name in lines[0]} in lines for line in found] == [True] * len(found)
    assert len(found) == 3 or caught or place + length >= len(content) - 60  # the last line may be incomplete


@pytest.mark.parametrize("cut", [0, 1, 30, 2])
def test_lines_that_a_resumed_run_had_and_lacks_are_told(tmp_path: Path, cut: int) -> None:
    with MetricsWriter(tmp_path, 0, {}, False, False) as metrics:
        for step in range(1, 5):
            metrics.write({"step": step, "loss": 1.0})
        assert metrics.lines == 4
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(content[:2])[: len(content[0]) * 2 - cut] if cut < 30 else b"")
    left = {0: 2, 1: 1, 2: 1, 30: 0}[cut]
    with pytest.warns(UserWarning, match=f"lacks {3 - left} of the 3 lines that it had after step 3"):
        metrics = MetricsWriter(tmp_path, 3, {}, False, False, lines=3)
    with metrics:
        assert metrics.lines == left


def test_what_a_killed_process_has_not_finished_is_left_out(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert read_metrics(tmp_path) == [{"step": 1}]
