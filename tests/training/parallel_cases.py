"""What several processes must do as one: cases of models and settings, and the command; and how that is measured."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed.checkpoint.staging  # so that copies of this process need not import it
from helpers import small_config

from ttt_e2e.cli.main import main
from ttt_e2e.config.schema import LoraConfig, TrainConfig
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.trainable import set_trainable
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training import distributed, trainer
from ttt_e2e.training.checkpoint import CheckpointSaver, TrainerState
from ttt_e2e.training.distributed import DistributedContext, init_distributed
from ttt_e2e.training.metrics import read_metrics
from ttt_e2e.training.optimizer import make_optimizer, optimizer_step
from ttt_e2e.training.parallelize import ParallelModel

MIXERS = ("mamba2", "gated-deltanet", "ttt-kvb", "titans", "window+gated-deltanet", "full", "window", "window")
Case = tuple[dict[str, Any], dict[str, Any]]

CASES: dict[str, Case] = {
    "tied head": ({}, {}),
    "plain graph, own head": ({"tie_word_embeddings": False}, {"activation_checkpointing": "none"}),
    "low rank, learned rates": ({"fast_rank": 2, "inner_loop__learned_lr": True}, {"inner_lr_lr": 0.02}),
    "sqrt, prefix recomputed, micro-batches, sink": (
        {"attention_sink": True},
        {"activation_checkpointing": "sqrt", "recompute_prefix": True, "accumulate": 2},
    ),
    "truncated": ({}, {"truncated_bptt_steps": 2}),
    "frozen prefix": ({}, {"trainable": "suffix"}),
    "additions": ({}, {"trainable": "lora", "lora": LoraConfig(r=2)}),
    "every mixer": ({"pattern": MIXERS, "num_hidden_layers": 8, "sliding_window": 10}, {}),
}
MORE_CASES: dict[str, Case] = {
    "pretrain": ({}, {"train_mode": "pretrain"}),
    "last block": ({}, {"trainable": "last"}),
    "additions above": ({}, {"trainable": "lora", "lora": LoraConfig(r=2, layers="suffix")}),
    "full": ({"suffix_layers": 0, "pattern": ("full",)}, {}),
    **{
        name: ({"suffix_layers": 0, "pattern": (name,), "sliding_window": 10}, {})
        for name in sorted({*MIXERS} - {"full"})
    },
}
BATCH = 8

SETTINGS = [
    *("vocab_size=272", "hidden_size=16", "num_hidden_layers=4", "num_attention_heads=2", "intermediate_size=24"),
    *("sliding_window=12", "mini_batch_size=5", "initializer_range=0.05", "context=20", "batch=8", "lr=1e-3"),
    *("steps=6", "checkpoint_every=2", "eval_every=3", "eval_tokens=300", "timeout_seconds=60"),
]


def train_case(
    dist: DistributedContext, case: Case, steps: int, replicate: int, lr: float = 1e-2
) -> dict[str, Any] | None:
    """Some steps of a case, by all processes together; what came of them, on rank 0.

    Comparisons are made in float64: in float32, AdamW makes a full step of a gradient that is nothing but rounding.
    Over many steps they need a small `lr`: at 1e-2, training of the gated delta rule on these random tokens is chaotic,
    and one process alone differs from itself by 1e-2 after 16 steps when it splits its batch in another way.
    """
    model_settings, train_settings = case
    config = TrainConfig(batch=BATCH, steps=steps, data_parallel_replicate_degree=replicate, **train_settings)
    torch.manual_seed(0)
    model = Transformer(small_config(**model_settings)).double()
    set_trainable(model, config)
    parallel = ParallelModel(model, dist).shard(config)
    optimizer = make_optimizer(model, config)
    tokens = torch.randint(50, (steps, BATCH, 18), generator=torch.Generator().manual_seed(1))
    losses: list[float] = []
    parts = dist.world_size * config.accumulate
    for tokens_BT1 in tokens:
        total = torch.zeros((), dtype=torch.float64)
        for i, micro_batch in enumerate(tokens_BT1.chunk(parts)[dist.rank :: dist.world_size]):
            parallel.set_requires_all_reduce(i == config.accumulate - 1)
            loss = parallel(
                sequence_loss,
                micro_batch,
                learn=config.train_mode == "meta",
                activation_checkpointing=config.activation_checkpointing,
                recompute_prefix=config.recompute_prefix,
                truncated_bptt_steps=config.truncated_bptt_steps,
                dtype=torch.float64,
                prefix_frozen=config.prefix_frozen,
            ).loss
            (loss / parts).backward()
            total += loss.detach() / parts
        dist.all_reduce(total)
        losses.append(float(total))
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        optimizer_step(model, optimizer, lr, 1.0)
    moments = [moment for state in optimizer.state.values() for moment in state.values() if moment.dim()]
    held = [*model.parameters(), *gradients, *moments]
    sizes = dist.gather(sum(map(local_bytes, held)))
    whole = parallel.gather()
    if whole is None:
        return None
    weights = {name: weight.detach().clone() for name, weight in whole.named_parameters()}
    return {"losses": losses, "weights": weights, "sizes": sizes, "size": sum(tensor.nbytes for tensor in held)}


def local_bytes(tensor: Any) -> int:
    """What this process holds of a tensor."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


def train_cases(cases: dict[str, Case], steps: int, replicate: int, folder: Path, lr: float = 1e-2) -> None:
    """Train all cases, and leave what came of them in `folder`."""
    torch.set_num_threads(1)
    with init_distributed("cpu", 60) as dist:
        for number, case in enumerate(cases.values()):
            result = train_case(dist, case, steps, replicate, lr)
            if result is not None:
                torch.save(result, folder / f"{number}.pt")


def differences(cases: dict[str, Case], one: Path, several: Path) -> dict[str, float]:
    """For each case, by how much at most a loss or a weight differs between two calls of `train_cases`."""
    found = {}
    for number, name in enumerate(cases):
        ours, theirs = (torch.load(folder / f"{number}.pt") for folder in (several, one))
        pairs = zip(ours["losses"], theirs["losses"], strict=True)
        by_loss = max(abs(a - b) for a, b in pairs)
        assert ours["weights"].keys() == theirs["weights"].keys()
        by_weight = max(float((ours["weights"][w] - theirs["weights"][w]).abs().max()) for w in theirs["weights"])
        found[name] = max(by_loss, by_weight)
    return found


def train(data: Path, out: Path, *changes: str, before: Callable[[int], object] = lambda rank: None) -> NoReturn:
    """`ttt-e2e train` in one of several processes, which ends with its exit code. before: called with the rank."""
    torch.set_num_threads(1)
    distributed._ANSWER_SECONDS = 1.0
    before(int(os.environ["RANK"]))
    command = ["train", "tiny", *SETTINGS, "--data", str(data), "--out", str(out), "--device", "cpu", "--quiet"]
    code = main([*command, *changes])
    sys.stdout.flush()
    os._exit(code)


def in_step(number: int, what: Callable[[], object]) -> None:
    """Do `what` in this process before it computes the loss of a step."""
    sequence_loss, calls = trainer.sequence_loss, []

    def wrapped(*args: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == number:
            what()
        return sequence_loss(*args, **options)

    trainer.sequence_loss = wrapped


def hold_writing(rank: int) -> None:
    """In this process, let nothing of a checkpoint be written before a step has changed the weights."""
    changed, optimizer_step, write_own_files = (
        threading.Event(),
        trainer.optimizer_step,
        CheckpointSaver._write_own_files,
    )

    def step(*arguments: Any) -> float:
        norm = optimizer_step(*arguments)
        changed.set()
        return norm

    def held(saver: CheckpointSaver, part: Path, state: TrainerState, *rest: Any) -> Callable[[], Any]:
        write = write_own_files(saver, part, state, *rest)
        if state.step < saver._config.train.steps:
            changed.clear()
        return lambda: changed.wait() and write()

    trainer.optimizer_step, CheckpointSaver._write_own_files = step, held  # type: ignore[method-assign]


def disturb(chosen: int, step: int, what: Callable[[], object], rank: int) -> None:
    """`in_step` for one rank; `step` counts from where the run is resumed."""
    if rank == chosen:
        in_step(step, what)


def measured(out: Path) -> list[dict[str, Any]]:
    timing = {"seconds", "tokens_per_second"}
    return [{key: value for key, value in line.items() if key not in timing} for line in read_metrics(out)]
