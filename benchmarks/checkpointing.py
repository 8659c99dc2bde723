"""How long a checkpoint holds up training: written while training goes on, and waited for.

    python benchmarks/checkpointing.py
    torchrun --nproc-per-node 2 benchmarks/checkpointing.py

In every round three stretches of training steps take turns, in an order that changes: without a checkpoint, with one
that the first step waits for, and with one that is written meanwhile. Printed are medians over the rounds of the time
until the next step may begin, and of the whole stretch above that without a checkpoint of the same round.
"""

import argparse
import json
import random
import statistics
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ttt_e2e.config.schema import ModelConfig, RunConfig, TrainConfig
from ttt_e2e.hardware import machine
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training.checkpoint import CheckpointSaver, TrainerState
from ttt_e2e.training.distributed import DistributedContext, init_distributed
from ttt_e2e.training.optimizer import make_optimizer, optimizer_step
from ttt_e2e.training.parallelize import ParallelModel

KINDS = ("none", "waited for", "meanwhile")


def measure(dist: DistributedContext, width: int, steps: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by kind: until the next step may begin ("held up"), and of all steps ("stretch")."""
    shape = dict(vocab_size=8192, hidden_size=width, intermediate_size=3 * width, num_attention_heads=width // 64)
    config = RunConfig(
        ModelConfig(**shape, num_hidden_layers=8, suffix_layers=2, sliding_window=128, mini_batch_size=64),
        TrainConfig(context=256, batch=dist.world_size, keep_checkpoints=1),
    )
    model = Transformer(config.model, torch.Generator().manual_seed(0))
    parallel = ParallelModel(model, dist).shard(config.train)
    optimizer = make_optimizer(model, config.train)
    tokens = torch.randint(config.model.vocab_size, (1, config.train.context + 1))
    found: dict[str, dict[str, list[float]]] = {kind: {"held up": [], "stretch": []} for kind in KINDS}

    with TemporaryDirectory() as own:
        run = Path(dist.gather(own)[0])
        with CheckpointSaver(run, parallel, optimizer, config) as saver:

            def step() -> None:
                parallel(partial(sequence_loss, activation_checkpointing="mini-batch"), tokens).loss.backward()
                is_saving = torch.tensor(float(saver.is_busy))
                dist.all_reduce(is_saving)
                optimizer_step(model, optimizer, 1e-4, 1.0)
                if not is_saving:
                    saver.advance()

            step()
            number, order = 0, [*KINDS]
            for i in range(rounds + 1):
                random.Random(i).shuffle(order)
                for kind in order:
                    number += 1
                    dist.gather(None)
                    started = time.perf_counter()
                    if kind != "none":
                        saver.save(TrainerState(step=number))
                    if kind == "waited for":
                        saver.wait()
                    held_up = time.perf_counter() - started
                    for _ in range(steps):
                        step()
                    stretch = time.perf_counter() - started
                    saver.wait()
                    if i:  # the first round warms up
                        found[kind]["held up"].append(held_up)
                        found[kind]["stretch"].append(stretch)
            checkpoint = next((run / "checkpoints").glob("step-*"))
            size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
            dist.log(f"{sum(p.numel() for p in model.parameters()):,} parameters, {size / 2**20:.0f} MiB a checkpoint")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6, help="of a stretch; enough for a checkpoint to be written")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with init_distributed("cpu", 600) as dist:
        found = measure(dist, args.width, args.steps, args.rounds)
        if not dist.is_rank0:
            return
    above = {
        kind: [a - b for a, b in zip(found[kind]["stretch"], found["none"]["stretch"], strict=True)] for kind in KINDS
    }
    print(f"a step takes {statistics.median(found['none']['stretch']) / args.steps:.2f} s, {args.rounds} rounds")
    print("| checkpoint | the next step waits, s | the stretch takes longer by, s |\n|---|---|---|")
    for kind in KINDS[1:]:
        print(f"| {kind} | {statistics.median(found[kind]['held up']):.3f} | {statistics.median(above[kind]):.2f} |")
    ratios = [a / b for a, b in zip(found["meanwhile"]["held up"], found["waited for"]["held up"], strict=True)]
    print(f"meanwhile / waited for: {statistics.median(ratios):.3f} of the wait, median of the rounds' ratios")
    if args.out:
        args.out.write_text(json.dumps({"config": vars(args) | {"out": None}, "machine": machine(), **found}, indent=2))


if __name__ == "__main__":
    main()
