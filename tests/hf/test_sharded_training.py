"""The trainer of transformers on two processes, by DDP and by FSDP2, gives what it gives on one."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_group, small_model

pytest.importorskip("transformers", reason="the transformers library is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import ttt_e2e.hf  # noqa: F401 - registers the model
from ttt_e2e.errors import UserError
from ttt_e2e.hf.export import wrap_model

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, BATCH = 3, 4
SAVED = 2  # after this step


MODELS: dict[str, dict[str, Any]] = {
    "all that a suffix may have": {"tie_word_embeddings": False, "fast_rank": 2, "inner_loop__learned_lr": True},
    "learns in all blocks": {"suffix_layers": 4},
    "a standard one": {"suffix_layers": 0},
}


def save(folder: Path, **changes: Any) -> Path:
    """A checkpoint whose gradients are of ordinary size, or rounding alone would change the losses."""
    wrap_model(small_model(**{"inner_loop__lr": 0.1, **changes}), 1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as one process trains it."""
    out = tmp_path_factory.mktemp("one")
    assert run_group(1, train, checkpoint, out) == [0]
    return out


def texts() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(2, 50, (STEPS * BATCH, 31), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    return [{"input_ids": row, "labels": row} for row in ids]


def training_arguments(out: Path, **options: Any) -> TrainingArguments:
    """For a process that shares the batch with all the others."""
    return TrainingArguments(
        str(out),
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(checkpoint: Path, out: Path, distributed: dict[str, Any] | None = None) -> None:
    """Train the model, sharded by transformers while it is loaded where `distributed` says so, and save it in `out`."""
    arguments = training_arguments(out, save_strategy="no")
    config = None if distributed is None else DistributedConfig(**distributed)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=config)
    trainer = Trainer(model, arguments, train_dataset=texts())
    trainer.train()
    trainer.save_model()
    if arguments.process_index == 0:
        torch.save(losses(trainer), out / "losses.pt")


def train_with_accelerate(checkpoint: Path, out: Path) -> None:
    """Train the model under accelerate's FSDP2, sharded beforehand, and again from a checkpoint of `SAVED` steps.

    accelerate has FSDP for GPUs alone, so it is told that the processes have some.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    found = []
    for resumed in (None, str(out / f"checkpoint-{SAVED}")):
        arguments = training_arguments(out, save_steps=SAVED)
        PartialState().distributed_type = DistributedType.MULTI_GPU
        model = fully_shard(AutoModelForCausalLM.from_pretrained(checkpoint))
        trainer = Trainer(model, arguments, train_dataset=texts())
        assert trainer.is_fsdp_enabled
        trainer.train(resume_from_checkpoint=resumed)
        found.append(losses(trainer))
    trainer.save_model()
    assert found[1] == found[0]
    if arguments.process_index == 0:
        torch.save(found[0], out / "losses.pt")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: weight.detach() for name, weight in model.named_parameters()}


def assert_same(found: Path, expected: Path) -> None:
    """The losses of both trainings are the same, and so is what they saved."""
    losses = torch.load(expected / "losses.pt")
    assert len({*losses}) == STEPS and torch.load(found / "losses.pt") == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_sharded_by_transformers(kind: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "model", **MODELS[kind])
    for count, distributed in ((1, None), (2, {"fsdp_size": 2})):
        assert run_group(count, train, checkpoint, tmp_path / f"{count}", distributed) == [0] * count
    assert_same(tmp_path / "2", tmp_path / "1")


def test_ddp(checkpoint: Path, one: Path, tmp_path: Path) -> None:
    assert run_group(2, train, checkpoint, tmp_path) == [0, 0]
    assert_same(tmp_path, one)


def test_fsdp2_of_accelerate(checkpoint: Path, one: Path, tmp_path: Path) -> None:
    assert run_group(2, train_with_accelerate, checkpoint, tmp_path) == [0, 0]
    assert_same(tmp_path, one)


def test_accelerate_launch(checkpoint: Path, one: Path, tmp_path: Path) -> None:
    """The command of the tutorial, with FSDP2."""
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys\nsys.path[:0] = {[path for path in sys.path if path]}\n"
        "from pathlib import Path\nfrom test_sharded_training import train\n"
        f"train(Path({str(checkpoint)!r}), Path({str(tmp_path)!r}), {{'fsdp_size': 2}})\n"
    )
    tutorial = (Path(__file__).parents[2] / "docs/tutorials/convert.md").read_text()
    (options,) = re.findall("^accelerate launch (.*) train.py$", tutorial, re.M)
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    done = subprocess.run([*command, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, one)


def test_the_model_knows_how_it_is_sharded() -> None:
    model = wrap_model(small_model(suffix_layers=3), 1)
    assert model._resolve_parallel_plans(DistributedConfig(fsdp_size=2))[2].keys() == {"model.blocks.0"}
    for option in ({"fsdp_plan": {"model.lookup": "free_full_weight"}}, {"fsdp_mixed_precision": True}):
        with pytest.raises(UserError, match="leave fsdp_plan and fsdp_mixed_precision out"):
            model._resolve_parallel_plans(DistributedConfig(fsdp_size=2, **option))
