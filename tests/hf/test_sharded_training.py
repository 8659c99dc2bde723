"""Several processes train a model of transformers: by FSDP2, and by the library's Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_group, small_model

pytest.importorskip("transformers", reason="the transformers library is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import ttt_e2e.hf  # noqa: F401 - registers the model
from ttt_e2e.hf.export import wrap_model

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, BATCH = 3, 4


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    wrap_model(small_model(), 1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def texts() -> torch.Tensor:
    ids = torch.randint(2, 50, (STEPS * BATCH, 31), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    return ids


def shard_and_train(checkpoint: Path, out: Path) -> None:
    """Train with the whole model as one group of FSDP2, as `auto_wrap_policy: NO_WRAP` makes it."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(checkpoint).train()
    fully_shard(model)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for ids in texts().split(BATCH):
        part = ids[dist.get_rank() :: dist.get_world_size()]
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(float(whole) / dist.get_world_size())
    if dist.get_rank() == 0:
        torch.save(losses, out)
    dist.destroy_process_group()


def train_with_trainer(checkpoint: Path, out: Path, batch: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=batch,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data: Any = [{"input_ids": ids, "labels": ids} for ids in texts()]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    if arguments.process_index == 0:
        torch.save([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], out / "losses.pt")


def test_fsdp2_trains_the_model_as_one_process(checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        assert run_group(count, shard_and_train, checkpoint, tmp_path / f"{count}.pt") == [0] * count
        found.append(torch.load(tmp_path / f"{count}.pt"))
    assert found[1] == pytest.approx(found[0], rel=2e-5) and len({*found[0]}) == STEPS


def test_trainer_of_two_processes_trains_as_one(checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        assert run_group(count, train_with_trainer, checkpoint, out, BATCH // count) == [0] * count
        found.append(torch.load(out / "losses.pt"))
    assert found[1] == pytest.approx(found[0], rel=2e-5) and len({*found[0]}) == STEPS
