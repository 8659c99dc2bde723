"""A folder with a text and a small model in place of the shipped one, and a check that commands fail properly."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import TEXT, run
from helpers import small_model

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference import load
from ttt_e2e.model.checkpoint import save_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models: "model", and others for a purpose.

    "diverging" has a large inner rate; "coarse" reads faster; "shallow" compiles faster, and learns so slowly that it
    does not amplify the rounding in which compiled code differs.
    """
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train([TEXT], 290)
    tokenizer.save(folder / "t.json")
    changes: dict[str, dict] = {
        "model": {},
        "diverging": {"inner_loop__lr": 1e30},
        "coarse": {"mini_batch_size": 64, "sliding_window": 64},
        "shallow": {"num_hidden_layers": 2, "inner_loop__lr": 0.1},
    }
    for name, change in changes.items():
        save_model(small_model(vocab_size=tokenizer.vocab_size, **change), folder / name, folder / "t.json")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> Path:
    """The working folder, with a text; the small model is the shipped one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "shipped_model", lambda: model_dir / "model")
    (tmp_path / "geese.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command which must fail with one sentence, and returns the sentence."""

    def refused(*argv: object, code: int = 1) -> str:
        capsys.readouterr()
        assert run(*argv) == code
        captured = capsys.readouterr()
        error = captured.err.strip().splitlines()[-1]
        assert error.startswith("ttt-e2e: error: ") and "Traceback" not in captured.err
        return error

    return refused
