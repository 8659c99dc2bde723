import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import small_config

from ttt_e2e.config.schema import RunConfig, TrainConfig
from ttt_e2e.errors import UserError
from ttt_e2e.model.checkpoint import load_model, model_digest
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training import checkpoint
from ttt_e2e.training.checkpoint import (
    Progress,
    check_checkpoint,
    checkpoints,
    latest,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from ttt_e2e.training.optimizer import make_optimizer, optimizer_step

CONFIG = RunConfig(small_config(), TrainConfig(keep_checkpoints=2))
Trained = tuple[Transformer, torch.optim.AdamW]


def update(model: Transformer, optimizer: torch.optim.AdamW, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer_step(model, optimizer, lr=1e-2, clip=1.0)


def trained(seed: int = 0, updates: int = 3) -> Trained:
    model = Transformer(CONFIG.model, torch.Generator().manual_seed(seed))
    optimizer = make_optimizer(model, CONFIG.train)
    for i in range(updates):
        update(model, optimizer, i)
    return model, optimizer


def save(run: Path, pair: Trained, step: int) -> Path:
    return save_checkpoint(run, *pair, Progress(step, step * 10, 1.5, {"index": step}), CONFIG, None)


def test_an_update_after_loading_is_the_update_that_would_have_been(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = save(tmp_path, (model, optimizer), 3)
    other, other_optimizer = trained(seed=1, updates=0)
    assert load_checkpoint(folder, other, other_optimizer) == Progress(3, 30, 1.5, {"index": 3})
    assert model_digest(other) == model_digest(model) == model_digest(load_model(folder))
    update(model, optimizer, 99)
    update(other, other_optimizer, 99)
    assert model_digest(other) == model_digest(model)


def test_a_weight_that_no_loss_has_depended_on_yet(tmp_path: Path) -> None:
    model, optimizer = trained(updates=0)
    for weight in [*model.parameters()][1:]:
        weight.grad = torch.ones_like(weight)
    optimizer_step(model, optimizer, lr=1e-2, clip=1.0)
    folder = save(tmp_path, (model, optimizer), 1)
    other, other_optimizer = trained(seed=1, updates=0)
    load_checkpoint(folder, other, other_optimizer)
    assert model_digest(other) == model_digest(model)


def test_only_the_latest_are_kept(tmp_path: Path) -> None:
    pair = trained()
    for step in (1, 2, 30, 4000):
        save(tmp_path, pair, step)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00004000", "step-00000030"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json"])
def test_a_truncated_an_altered_and_a_missing_file(tmp_path: Path, name: str) -> None:
    pair = trained()
    folder = save(tmp_path, pair, 3)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"not whole: {name} has {len(content) - 1} of {len(content)} bytes"):
        load_checkpoint(folder, *pair)
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"was altered: the digest of {name} does not fit"):
        load_checkpoint(folder, *pair)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"not whole: {name} is missing"):
        load_checkpoint(folder, *pair)


def test_a_damaged_a_foreign_and_a_newer_trainer_file(tmp_path: Path) -> None:
    folder = save(tmp_path, trained(), 3)
    path = folder / "trainer.json"
    content = path.read_text()
    path.write_text(content[:30])
    with pytest.raises(UserError, match="not JSON"):
        check_checkpoint(folder)
    path.write_text('{"epoch": 3}')
    with pytest.raises(UserError, match="not a checkpoint of ttt-e2e"):
        check_checkpoint(folder)
    path.write_text(json.dumps({**json.loads(content), "version": 7}))
    with pytest.raises(UserError, match="format 7"):
        check_checkpoint(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"trainer\.json is missing"):
        check_checkpoint(folder)


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    folder = save(tmp_path, trained(), 3)
    model = Transformer(small_config(hidden_size=32))
    with pytest.raises(UserError, match=r"has shape .* is expected"):
        load_checkpoint(folder, model, make_optimizer(model, CONFIG.train))


def test_latest_is_the_newest_whole_one(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    pair, heard = trained(), []
    first, second = save(tmp_path, pair, 1), save(tmp_path, pair, 2)
    assert latest(tmp_path, heard.append) == second
    (second / "optimizer.safetensors").write_bytes(b"")
    assert latest(tmp_path, heard.append) == first
    assert len(heard) == 1
    assert "not whole" in heard[0]
    shutil.rmtree(first)
    with pytest.raises(UserError, match=r"No checkpoint in .* is whole"):
        latest(tmp_path, heard.append)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    folder = save(tmp_path, trained(), 3)
    (folder.parent / ".step-00000004.123.part").mkdir()
    (folder.parent / ".step-00000004.123.part/model.safetensors").write_bytes(b"half")
    (tmp_path / ".metrics.jsonl.123.part").write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert [f.name for f in tmp_path.rglob("*.part")] == []
    assert latest(tmp_path) == folder
