"""Training that leaves a part of a model as it is: the prefix frozen, low-rank additions."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import made_up_tokens, small_config, small_model
from torch import Tensor

from ttt_e2e.config.parse import override
from ttt_e2e.config.schema import LoraConfig, RunConfig, TrainConfig
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.checkpoint import load_transformer, model_digest, save_model, weights_digest
from ttt_e2e.model.cost import parameters, trained_parameters, training_bytes
from ttt_e2e.model.trainable import is_below_loop, lora_tensors, plain_weights, set_trainable, trained_weights
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training import trainer
from ttt_e2e.training.checkpoint import list_checkpoints
from ttt_e2e.training.metrics import read_metrics
from ttt_e2e.training.optimizer import make_optimizer
from ttt_e2e.training.trainer import TrainResult, train

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = RunConfig(
    small_config(vocab_size=272, initializer_range=0.05),
    TrainConfig(context=20, batch=4, accumulate=2, steps=6, lr=1e-2, eval_every=3, eval_tokens=200, checkpoint_every=3),
)
LORA = ("trainable=lora", "lora.r=2")
MODES = {"suffix": ("trainable=suffix",), "lora": LORA, "lora in the suffix": (*LORA, "lora.layers=suffix")}
TOKENS = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_tokens(tmp_path_factory.mktemp("data"), 100)


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to begin with; its weights are bfloat16 numbers, as published ones often are."""
    folder = tmp_path_factory.mktemp("start") / "model"
    save_model(
        Transformer(CONFIG.model, torch.Generator().manual_seed(1)), folder, data / "tokenizer.json", torch.bfloat16
    )
    return folder


def run(data: Path, out: Path, *changes: str, **options: Any) -> TrainResult:
    return train(override(CONFIG, list(changes)), data, out, progress=False, device="cpu", **options)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out) if "loss" in line]


def changed(before: Transformer, after: Transformer) -> set[str]:
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return {name for (name, old), new in pairs if not torch.equal(old, new)}


# -- what is trained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_only_what_is_trained_changes(data: Path, start: Path, tmp_path: Path, mode: str) -> None:
    """And the model that comes out is a plain one, of which the run's own evaluation is true."""
    result = run(data, tmp_path / "run", *MODES[mode], start_from=start)
    before, after = load_transformer(start), load_transformer(tmp_path / "run/model")
    names = {name for name, _ in before.named_parameters()} - {"embedding"}
    above = {name for name in names if not is_below_loop(name, CONFIG.model)}
    assert {"blocks.2.mixer.w_qkv", "blocks.2.mixer_norm.weight", "blocks.1.mlp.w_in"} <= names - above
    assert changed(before, after) == (names if mode == "lora" else above)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.02
    assert result.evaluation is not None
    again = run(data, tmp_path / "again", "steps=1", "lr=0", "lr_init=0", start_from=tmp_path / "run/model")
    assert again.evaluation is not None
    assert again.evaluation["loss"] == pytest.approx(result.evaluation["loss"], abs=1e-5)


def test_lora_trains_beside_its_additions_what_is_small() -> None:
    """Norms, what only a name tells, and the initial fast weights; with a rank these are the factors."""
    for changes, fast in (({}, {"w_in", "w_out"}), ({"fast_rank": 2}, {"up_in", "up_out", "down_in", "down_out"})):
        model = small_model(
            attention_bias=True,
            tie_word_embeddings=False,
            attention_sink=True,
            inner_loop__learned_lr=True,
            **changes,
        )
        matrices = {"blocks.1.mixer.w_qkv", "blocks.3.mixer.w_qkv", "blocks.1.mlp.w_out", "blocks.3.mlp.w_out"}
        targets = ("w_qkv", "blocks.1.mlp.w_out", "blocks.3.mlp.w_out")
        set_trainable(model, TrainConfig(trainable="lora", lora=LoraConfig(r=2, target_modules=targets)))
        factors = {n.removesuffix(".lora_A") for n in lora_tensors(model) if n.endswith("lora_A")}
        assert factors == matrices | {"blocks.0.mixer.w_qkv", "blocks.2.mixer.w_qkv"}
        own = {name for name in trained_weights(model) if ".lora_" not in name}
        assert {n.rpartition(".")[2] for n in own if ".fast." in n} == fast
        others = {name for name in own if ".fast." not in name}
        assert others == {
            name
            for name, _ in plain_weights(model).items()
            if ".fast." not in name and ("norm" in name or "sink" in name or "log_lr_scale" in name)
        }
        assert len([name for name in others if "log_lr_scale" in name]) == 2
        assert len([name for name in others if "sink" in name]) == 8


def test_optimizer_and_cost_count_what_is_trained() -> None:
    for mode in MODES.values():
        train_config = override(CONFIG, list(mode)).train
        model = Transformer(CONFIG.model)
        set_trainable(model, train_config)
        optimizer = make_optimizer(model, train_config)
        sum(w.sum() for w in trained_weights(model).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        own, added = trained_parameters(CONFIG.model, train_config)
        assert sum(w.numel() for w in trained_weights(model).values()) == own + added
        moments = sum(state["exp_avg"].numel() for state in optimizer.state.values())
        assert moments == own + added
        frozen = sum(w.numel() for w in model.parameters() if not w.requires_grad)
        assert frozen == parameters(CONFIG.model) - own
        assert training_bytes(CONFIG.model, train_config) == 4 * (frozen + 4 * moments)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["none", "mini-batch", "sqrt"])
@pytest.mark.parametrize("changes", [{}, {"parallel_mlp": True, "tie_word_embeddings": False}, {"fast_rank": 2}])
def test_frozen_prefix_leaves_the_other_gradients_as_they_are(checkpointing: Any, changes: dict[str, Any]) -> None:
    options: dict[str, Any] = {"dtype": torch.float64, "activation_checkpointing": checkpointing}
    full, part = (small_model(torch.float64, **changes) for _ in range(2))
    sequence_loss(full, TOKENS, **options).loss.backward()
    set_trainable(part, TrainConfig(trainable="suffix"))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x_BTD = part.forward_prefix(TOKENS[:, :-1], part.positions(0, 23, torch.float64), None, torch.float64)[0]
    assert not kept and not x_BTD.requires_grad
    for given in ({"prefix_frozen": True}, {"prefix_BTD": x_BTD}):
        part.zero_grad()
        sequence_loss(part, TOKENS, **options, **given).loss.backward()
        for (name, a), b in zip(part.named_parameters(), full.parameters(), strict=True):
            if a.requires_grad:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)
            else:
                assert a.grad is None and (is_below_loop(name, part.config) or name == "head")


def test_the_last_blocks_of_any_model_are_trained_with_their_own_gradients() -> None:
    for changes in ({}, {"suffix_layers": 0, "pattern": ("ttt-kvb", "full"), "sliding_window": 10}):
        part, whole = (small_model(torch.float64, **changes) for _ in range(2))
        set_trainable(part, TrainConfig(trainable="last", trained_layers=1))
        for model in (part, whole):
            sequence_loss(model, TOKENS, dtype=torch.float64).loss.backward()
        for (name, a), b in zip(part.named_parameters(), whole.parameters(), strict=True):
            if name.startswith(("blocks.3.", "final_norm")):
                assert a.grad is not None and b.grad is not None
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)
            else:
                assert a.grad is None
    with pytest.raises(UserError, match="trained_layers = 5, but the model has 4 blocks"):
        set_trainable(small_model(), TrainConfig(trainable="last", trained_layers=5))


@pytest.mark.parametrize("checkpointing", ["none", "mini-batch", "sqrt"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel_mlp": True, "attention_bias": True},
        {"fast_rank": 2},
        {"pattern": ("mamba2", "gated-deltanet", "ttt-kvb", "window"), "suffix_layers": 1},
        {"suffix_layers": 0, "pattern": ("full", "titans"), "sliding_window": 10},
    ],
)
def test_gradients_of_additions_are_those_of_the_sum(checkpointing: Any, changes: dict[str, Any]) -> None:
    """For W + s B A: dB = s dW A^T and dA = s B^T dW, with dW by the plain model that has the sum."""
    options: dict[str, Any] = {"dtype": torch.float64, "activation_checkpointing": checkpointing}
    model, plain = (small_model(torch.float64, **changes) for _ in range(2))
    set_trainable(model, TrainConfig(trainable="lora", lora=LoraConfig(r=2, lora_alpha=3.0)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in lora_tensors(model).items():
            if name.endswith("lora_B"):
                tensor.normal_(0, 0.2, generator=generator)
        for name, weight in plain.named_parameters():
            weight.copy_(plain_weights(model)[name])
    found, expected = (sequence_loss(m, TOKENS, **options) for m in (model, plain))
    torch.testing.assert_close(found.nll_BT, expected.nll_BT, rtol=1e-9, atol=1e-11)
    found.loss.backward()
    expected.loss.backward()
    gradients = {name: weight.grad for name, weight in plain.named_parameters()}
    factors = lora_tensors(model)
    names = [name.removesuffix(".original") for name in factors if name.endswith(".original")]
    assert len(names) >= 6
    for name in names:
        a, b, dw = factors[f"{name}.lora_A"], factors[f"{name}.lora_B"], gradients[name]
        if dw is not None:  # that of a memory in a text of one mini-batch
            torch.testing.assert_close(b.grad, 1.5 * dw @ a.T, rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(a.grad, 1.5 * b.T @ dw, rtol=1e-7, atol=1e-10)
    for name, weight in trained_weights(model).items():
        if ".lora_" not in name:
            torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-7, atol=1e-10)


def test_frozen_matrices_are_held_in_bfloat16_if_they_lose_nothing(start: Path) -> None:
    model, digest = load_transformer(start), model_digest(load_transformer(start))
    with torch.no_grad():
        model.blocks[0].mlp.w_in[0, 0] = 1 + 2**-20
    before = weights_digest(dict(model.named_parameters()))
    set_trainable(model, override(CONFIG, [*LORA, "dtype=bfloat16", "target_modules=w_qkv"]).train)
    dtypes = {name: w.dtype for name, w in model.named_parameters()}
    assert dtypes["embedding"] == dtypes["blocks.0.mlp.w_out"] == dtypes["blocks.3.mlp.w_in"] == torch.bfloat16
    assert dtypes["blocks.0.mixer.parametrizations.w_qkv.original"] == torch.bfloat16
    assert dtypes["blocks.0.mlp.w_in"] == torch.float32  # its first number is none in bfloat16
    assert all(w.dtype == torch.float32 for w in trained_weights(model).values())
    assert weights_digest(plain_weights(model)) == before != digest


# -- runs --------------------------------------------------------------------------------------------------------------


def interrupt(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Send SIGINT in this call of the loss."""
    sequence_loss, calls = trainer.sequence_loss, []

    def interrupting(*args: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return sequence_loss(*args, **options)

    monkeypatch.setattr(trainer, "sequence_loss", interrupting)


@pytest.mark.parametrize(
    "changes",
    [("trainable=suffix", "cache_prefix=true"), LORA, ("trainable=lora", "lora.layers=suffix", "dtype=bfloat16")],
)
def test_interrupted_run_is_the_same_when_resumed(
    data: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]
) -> None:
    run(data, tmp_path / "whole", *changes, start_from=start)
    with monkeypatch.context() as patch:
        interrupt(patch, 9)  # in the middle of the fifth step
        assert run(data, tmp_path / "run", *changes, start_from=start).step == 5
    assert run(data, tmp_path / "run", *changes, resume=True).step == 6
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    folders = [list_checkpoints(tmp_path / name)[0] for name in ("run", "whole")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    assert (folders[0] / "lora.safetensors").exists() == ("lora" in changes[0])
    # A checkpoint is a model folder as well.
    assert model_digest(load_transformer(folders[0])) == model_digest(load_transformer(tmp_path / "run/model"))


def test_standard_model_is_trained_by_additions(data: Path, tmp_path: Path) -> None:
    changes = ["suffix_layers=0", "pattern=full", "mini_batch_size=none", "steps=4"]
    config = override(CONFIG, changes).model
    save_model(Transformer(config), tmp_path / "model", data / "tokenizer.json")
    run(data, tmp_path / "run", *changes, *LORA, start_from=tmp_path / "model")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    for mode, setting in (("suffix", "trainable=suffix"), ("lora in the suffix", "lora.layers=suffix")):
        with pytest.raises(UserError, match=f"no suffix, which {setting} would train"):
            run(data, tmp_path / "other", *changes, *MODES[mode], start_from=tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (("trainable=lora", "lora.target_modules=q_proj"), r"q_proj names no static matrix .* mixer\.w_qkv, mlp\.w_in"),
        (("trainable=lora", "target_modules=blocks.0.w_in"), "names no static matrix"),
        (("trainable=lora", "target_modules=fast.w_in"), "names no static matrix"),
        (("trainable=lora", "lora.r=17"), r"lora\.r = 17 is larger than blocks\.0\.mixer\.w_qkv, which is 48 x 16"),
        (("trainable=suffix", "num_hidden_layers=5"), "has num_hidden_layers = 4, not 5"),
        (("trainable=none",), "trainable must be 'all' or 'suffix' or 'lora', not 'none'|must be"),
        (("cache_prefix=true",), "cache_prefix needs a frozen prefix"),
        (("trainable=lora", "cache_prefix=true"), "cache_prefix needs a frozen prefix"),
    ],
)
def test_what_does_not_fit_is_refused(
    data: Path, start: Path, tmp_path: Path, changes: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        run(data, tmp_path / "run", *changes, start_from=start)
    assert not (tmp_path / "run/model").exists()


def test_a_model_to_start_from_is_needed_and_its_tokenizer(data: Path, start: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trainable=suffix trains a model further; name the model with --from"):
        run(data, tmp_path / "run", "trainable=suffix")
    with pytest.raises(UserError, match="set cache_prefix=true as well"):
        run(data, tmp_path / "run", "trainable=suffix", start_from=start, cache=tmp_path / "cache")
    Tokenizer.train(["an entirely different text, with letters of its own"], 272).save(tmp_path / "tokenizer.json")
    save_model(load_transformer(start), tmp_path / "other", tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"another tokenizer than the data; prepare the data with --tokenizer .*other"):
        run(data, tmp_path / "run", "trainable=suffix", start_from=tmp_path / "other")
    assert json.loads((start / "config.json").read_text())["files"]
