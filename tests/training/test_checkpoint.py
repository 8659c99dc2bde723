"""Checkpoints of training: an update after loading is the one that would have been; damage is noticed."""

import errno
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers import flipped, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.config.schema import LoraConfig, RunConfig, TrainConfig
from ttt_e2e.errors import UserError
from ttt_e2e.model.checkpoint import load_transformer, model_digest
from ttt_e2e.model.trainable import set_trainable
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training import checkpoint
from ttt_e2e.training.checkpoint import (
    CheckpointSaver,
    TrainerState,
    check_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_model_state,
    load_optimizer_state,
)
from ttt_e2e.training.distributed import DistributedContext
from ttt_e2e.training.optimizer import make_optimizer, optimizer_step
from ttt_e2e.training.parallelize import ParallelModel

CONFIG = RunConfig(small_config(), TrainConfig(keep_checkpoints=2))
Trained = tuple[Transformer, torch.optim.AdamW]


def update(model: Transformer, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator) if weight.requires_grad else None
    optimizer_step(model, optimizer, lr=1e-2, max_grad_norm=1.0)


def trained(seed: int = 0, updates: int = 3) -> Trained:
    model = Transformer(CONFIG.model, torch.Generator().manual_seed(seed))
    optimizer = make_optimizer(model, CONFIG.train)
    for i in range(updates):
        update(model, optimizer, i)
    return model, optimizer


def saver(run: Path, pair: Trained) -> CheckpointSaver:
    model, optimizer = pair
    return CheckpointSaver(run, alone(model), optimizer, CONFIG)


def at(step: int) -> TrainerState:
    return TrainerState(step, step * 10, 1.5, {"index": step})


def save(run: Path, pair: Trained, step: int) -> Path:
    with saver(run, pair) as one:
        one.save(at(step))
    return list_checkpoints(run)[0]


def alone(model: Transformer) -> ParallelModel:
    return ParallelModel(model, DistributedContext(0, 1, torch.device("cpu")))


def load_checkpoint(folder: Path, model: Transformer, config: TrainConfig) -> tuple[torch.optim.AdamW, TrainerState]:
    state = load_model_state(folder, model, config)
    optimizer = make_optimizer(model, config)
    load_optimizer_state(folder, alone(model), optimizer, state)
    return optimizer, state


def test_update_after_loading_is_the_one_that_would_have_been(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = save(tmp_path, (model, optimizer), 3)
    other, _ = trained(seed=1, updates=0)
    other_optimizer, state = load_checkpoint(folder, other, CONFIG.train)
    assert state == TrainerState(3, 30, 1.5, {"index": 3})
    assert model_digest(other) == model_digest(model) == model_digest(load_transformer(folder))
    update(model, optimizer, 99)
    update(other, other_optimizer, 99)
    assert model_digest(other) == model_digest(model)


def test_weight_without_moments_is_saved(tmp_path: Path) -> None:
    model, optimizer = trained(updates=0)
    for weight in [*model.parameters()][1:]:
        weight.grad = torch.ones_like(weight)
    optimizer_step(model, optimizer, lr=1e-2, max_grad_norm=1.0)
    folder = save(tmp_path, (model, optimizer), 1)
    other, _ = trained(seed=1, updates=0)
    load_checkpoint(folder, other, CONFIG.train)
    assert model_digest(other) == model_digest(model)


def test_save_keeps_only_the_latest_checkpoints(tmp_path: Path) -> None:
    pair = trained()
    for step in (1, 2, 30, 4000):
        save(tmp_path, pair, step)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00004000", "step-00000030"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json"])
def test_load_refuses_truncated_altered_and_missing_files(tmp_path: Path, name: str) -> None:
    pair = trained()
    folder = save(tmp_path, pair, 3)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(
        UserError, match=f"{name} is altered or cut short: it has {len(content) - 1} of {len(content)} bytes"
    ):
        load_checkpoint(folder, pair[0], CONFIG.train)
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{name} was altered after it was written: its digest does not match"):
        load_checkpoint(folder, pair[0], CONFIG.train)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_checkpoint(folder, pair[0], CONFIG.train)


def test_check_refuses_damaged_and_foreign_files_and_other_versions(tmp_path: Path) -> None:
    folder = save(tmp_path, trained(), 3)
    path = folder / "trainer.json"
    content = path.read_text()
    path.write_text(content[:30])
    with pytest.raises(UserError, match="not JSON"):
        check_checkpoint(folder)
    path.write_text('{"epoch": 3}')
    with pytest.raises(UserError, match="is not a ttt-e2e checkpoint"):
        check_checkpoint(folder)
    for version, remedy in ((2, "finish the run with the version that wrote it"), (7, "update ttt-e2e")):
        path.write_text(json.dumps({**json.loads(content), "version": version}))
        with pytest.raises(UserError, match=f"format version {version}, and this ttt-e2e reads version 3; {remedy}"):
            check_checkpoint(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"trainer\.json is missing"):
        check_checkpoint(folder)


def test_load_refuses_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    folder = save(tmp_path, trained(), 3)
    model = Transformer(small_config(hidden_size=32))
    with pytest.raises(UserError, match=r"has shape .* is expected"):
        load_checkpoint(folder, model, CONFIG.train)


def test_latest_checkpoint_is_the_newest_intact_one(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    pair, heard = trained(), []
    first, second = save(tmp_path, pair, 1), save(tmp_path, pair, 2)
    assert latest_checkpoint(tmp_path, heard.append) == second
    (second / "optimizer.safetensors").write_bytes(b"")
    assert latest_checkpoint(tmp_path, heard.append) == first
    assert len(heard) == 1
    assert "is altered or cut short" in heard[0]
    shutil.rmtree(first)
    with pytest.raises(UserError, match=r"No checkpoint in .* is intact"):
        latest_checkpoint(tmp_path, heard.append)


@given(bit=st.integers(0, 1 << 30), name=st.sampled_from(["trainer.json", "config.json", "optimizer.safetensors"]))
@settings(max_examples=100)
def test_after_a_flipped_bit_training_continues_from_an_earlier_checkpoint(
    two_checkpoints: Path, bit: int, name: str
) -> None:
    first, second = reversed(list_checkpoints(two_checkpoints))
    path, intact = second / name, check_checkpoint(second)
    content = path.read_bytes()
    path.write_bytes(flipped(content, bit % (8 * len(content))))
    try:
        latest = latest_checkpoint(two_checkpoints, lambda sentence: None)
        assert latest == first or (latest == second and check_checkpoint(second) == intact)
    finally:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, pair = tmp_path_factory.mktemp("run"), trained()
    for step in (1, 2):
        save(run, pair, step)
    return run


@given(seed=st.integers(0, 10**6), low_rank=st.booleans(), bfloat16=st.booleans())
@settings(max_examples=5)
def test_files_are_those_of_the_moment_when_save_returned(
    tmp_path_factory: pytest.TempPathFactory, seed: int, low_rank: bool, bfloat16: bool
) -> None:
    """Weights and moments change, and another checkpoint is due, before anything of the first one is written."""
    train = TrainConfig(
        trainable="lora" if low_rank else "all", dtype="bfloat16" if bfloat16 else "float32", lora=LoraConfig(r=2)
    )
    model = Transformer(CONFIG.model, torch.Generator().manual_seed(seed))
    model.load_state_dict({name: weight.bfloat16().float() for name, weight in model.state_dict().items()})
    set_trainable(model, train)
    pair = (model, make_optimizer(model, train))
    update(*pair, seed)
    runs = [tmp_path_factory.mktemp(name) for name in ("waited", "meanwhile")]
    save(runs[0], pair, 1)
    released = threading.Event()
    with saver(runs[1], pair) as one:
        one._thread.submit(released.wait)
        one.save(at(1))
        update(*pair, seed + 1)
        assert one.is_busy and not list_checkpoints(runs[1])
        released.set()
        one.save(at(2))
        assert list_checkpoints(runs[1])
        update(*pair, seed + 2)
    first, second = ({f.name: f.read_bytes() for f in (run / "checkpoints/step-00000001").iterdir()} for run in runs)
    assert first == second and len(first) == 4 + low_rank
    check_checkpoint(runs[1] / "checkpoints/step-00000002")


def test_block_that_ends_early_completes_what_it_has_begun(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), saver(tmp_path, trained()) as one:
        one.save(at(3))
        raise KeyboardInterrupt
    check_checkpoint(tmp_path / "checkpoints/step-00000003")


def test_full_disk_keeps_existing_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = trained()
    first = save(tmp_path, pair, 1)

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_safetensors", full)
    with pytest.raises(UserError, match=r"No space left on the disk while writing .*step-00000002"):
        save(tmp_path, pair, 2)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == [first.name]
    check_checkpoint(first)
