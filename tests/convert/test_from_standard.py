"""Standard Transformers of this project that begin to learn while they read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_model

from ttt_e2e.cli import main as cli
from ttt_e2e.convert.from_standard import convert_from_standard, learning_config, warm_start
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.errors import UserError
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.checkpoint import load_transformer, save_model
from ttt_e2e.model.transformer import Transformer


def standard(**changes: Any) -> Transformer:
    values: dict[str, Any] = dict(suffix_layers=0, mini_batch_size=None, post_norm=False, pattern=("full",))
    return small_model(torch.float64, **{**values, **changes})


def losses(model: Transformer, tokens_BT: torch.Tensor, learn: bool = True) -> torch.Tensor:
    with torch.no_grad():
        return sequence_loss(model, tokens_BT, learn=learn, dtype=torch.float64).nll_BT


@pytest.mark.parametrize(
    ("fast", "changes"),
    [
        ("new", {}),
        ("new", {"qk_norm": False, "tie_word_embeddings": False}),
        ("split", {}),
        ("split", {"post_norm": True}),
        ("split", {"pattern": ("window",), "num_key_value_heads": 1}),
    ],
)
@pytest.mark.parametrize("rank", [None, 3])
def test_predictions_are_the_original_until_the_first_update(fast: Any, changes: dict, rank: int | None) -> None:
    model = standard(**changes)
    options = LearningOptions(
        sliding_window=12, mini_batch_size=4, suffix=0.5, fast=fast, fast_share=0.5, fast_rank=rank
    )
    config = learning_config(model.config, options)
    assert config.fast_rank == rank
    learner = warm_start(model, config)
    assert config.suffix_layers == 2 and config.sliding_window == 12 and set(config.mixers) == {"window"}
    tokens = torch.randint(50, (3, 13), generator=torch.Generator().manual_seed(1))
    before = losses(model, tokens)
    torch.testing.assert_close(losses(learner, tokens, learn=False), before, rtol=1e-12, atol=1e-12)
    learning = losses(learner, tokens)
    torch.testing.assert_close(learning[:, :4], before[:, :4], rtol=1e-12, atol=1e-12)
    assert (learning[:, 4:] - before[:, 4:]).abs().max() > 1e-4
    # Beyond the window it differs from an original with full attention.
    longer = torch.randint(50, (3, 31), generator=torch.Generator().manual_seed(2))
    far = (losses(learner, longer, learn=False) - losses(model, longer))[:, 12:].abs().max()
    assert (far < 1e-12) == (model.config.pattern == ("window",))


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        (lambda: small_model(), {}, "has fast MLPs already"),
        (lambda: standard(pattern=("mamba2", "window")), {}, "not one with mamba2"),
        (lambda: standard(post_norm=True), {"fast": "new"}, "split the MLPs instead"),
        (lambda: standard(), {"fast": "split", "fast_share": 1.0}, "leaves nothing"),
        (
            lambda: standard(pattern=("window",)),
            {"sliding_window": 20},
            "longer than 12, the window it was trained with",
        ),
    ],
)
def test_models_and_options_that_do_not_fit_are_refused(model: Any, options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        learning_config(model().config, LearningOptions(**options))


def test_convert_from_standard_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(standard().float(), tmp_path / "standard", None)
    command = ["convert", "from-standard", str(tmp_path / "standard"), str(tmp_path / "out"), "--window", "12"]
    assert cli.main([*command, "--mini-batch", "4", "--fast", "split", "--fast-rank", "2"]) == 0
    assert "1 of 4 blocks learn" in capsys.readouterr().out
    model = load_transformer(tmp_path / "out")
    assert (
        model.config.fast_intermediate_size == 6
        and model.config.suffix_intermediate_size == 18
        and model.config.fast_rank == 2
    )
    assert cli.main(command) == 1 and "exists" in capsys.readouterr().err
    with pytest.raises(UserError, match="nothing"):
        convert_from_standard(tmp_path / "nothing", tmp_path / "other", LearningOptions())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = standard().float()
    with torch.no_grad():
        model.blocks[1].mlp.w_out[0, 0] = float("inf")
    save_model(model, tmp_path / "standard", None)
    with pytest.raises(UserError, match=r"blocks.1.mlp.w_out that are not finite numbers"):
        convert_from_standard(tmp_path / "standard", tmp_path / "out", LearningOptions())
