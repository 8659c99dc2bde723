"""`ttt-e2e reproduce` on the command line."""

from pathlib import Path
from typing import Any

import pytest
from reproduce_helpers import make_comparison

from ttt_e2e.cli import main as cli
from ttt_e2e.errors import INTERRUPTED
from ttt_e2e.reproduce import workers
from ttt_e2e.reproduce.scales import SCALES


def test_options_reach_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: dict[str, Any] = {}

    def reproduce(*arguments: Any, **options: Any) -> workers.Outcome:
        passed.update(options, arguments=arguments)
        return workers.Outcome(interrupted=True)

    monkeypatch.setattr("ttt_e2e.reproduce.run.reproduce", reproduce)
    line = (
        "reproduce figure1 --scale small --systems window,titans --seeds 0,1 --contexts 512,2K --workers 3 "
        "--compile --dry-run"
    )
    assert cli.main([*line.split(), "--out", str(tmp_path)]) == INTERRUPTED
    assert passed["arguments"] == ("figure1", SCALES["small"], tmp_path)
    assert (passed["systems"], passed["seeds"], passed["contexts"]) == (["window", "titans"], [0, 1], [512, 2048])
    assert (passed["num_workers"], passed["dry_run"], passed["data"], passed["progress"]) == (3, True, None, True)
    assert passed["compile"] is True


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("reproduce figure1 --out x --scale huge", "there are: tiny, small, paper"),
        ("reproduce figure1 --out x --sytems full", "did you mean --systems?"),
        ("reproduce figure1 --out x --seeds one", "'one' is not a whole number of at least 0"),
        ("reproduce figure2", "'figure1', 'ablations'"),
        ("reproduce needles --out x", "--models or --comparison"),
    ],
)
def test_invalid_command_lines_are_refused(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) in (1, 2)
    assert message in capsys.readouterr().err


def test_needles_take_the_models_of_a_comparison(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_comparison(tmp_path, data, dry_run=True)
    models = {n: tmp_path / f"runs/{n}/seed0/extend-32/run/model" for n in ("full", "window", "ttt-e2e")}
    for folder in models.values():
        folder.mkdir(parents=True)
    passed: dict[str, Any] = {}
    monkeypatch.setattr("ttt_e2e.reproduce.needles.run_needles", lambda *_, **options: passed.update(options))
    line = ["reproduce", "needles", "--comparison", str(tmp_path), "--models", f"mine={tmp_path}", "--out", "x"]
    assert cli.main([*line, "--tasks", "1,3", "--contexts", "2K"]) == 0
    assert passed["models"] == {"mine": tmp_path} | models  # dynamic evaluation has no model of its own
    assert (passed["tasks"], passed["contexts"]) == ([1, 3], [2048])
