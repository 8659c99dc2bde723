"""The trainer: `train` runs from the first step to the last, however often it is killed and resumed.

Everything that determines the next step is in a checkpoint: the weights, AdamW's moments and the position in the data.
Learning rates follow from the step, and nothing else is random. On a CPU a resumed run therefore repeats an
uninterrupted one bit for bit, as long as the numbers of threads and processes stay the same, and compilation on or off.
"""

import json
import math
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ttt_e2e import __version__
from ttt_e2e.config.parse import flatten, to_dict
from ttt_e2e.config.schema import RunConfig
from ttt_e2e.data.loader import SequenceLoader, val_sequences
from ttt_e2e.data.shards import open_tokens
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import Divergence, UserError
from ttt_e2e.files import remove_stale_parts, write_text
from ttt_e2e.hardware import memory_bytes
from ttt_e2e.inner_loop.functions import EAGER
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.checkpoint import CONFIG, TOKENIZER, copy_pretrained_metadata, save_model
from ttt_e2e.model.cost import in_bytes, parameters, training_bytes
from ttt_e2e.model.trainable import set_trainable, trained_weights
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.progress import ProgressBar
from ttt_e2e.signals import GracefulStop
from ttt_e2e.training.checkpoint import (
    CheckpointSaver,
    TrainerState,
    latest_checkpoint,
    list_checkpoints,
    load_model_state,
    load_optimizer_state,
)
from ttt_e2e.training.distributed import DistributedContext, init_distributed
from ttt_e2e.training.evaluate import evaluate_sequences
from ttt_e2e.training.metrics import MetricsWriter
from ttt_e2e.training.optimizer import inner_learning_rate, learning_rate, make_optimizer, optimizer_step
from ttt_e2e.training.parallelize import ParallelModel, mesh_shape
from ttt_e2e.training.prefix_cache import PrefixCache, digest_below_loop, fill_prefix_cache
from ttt_e2e.training.run_folder import MODEL, check_run, load_start_weights, lock_run


class TrainResult(NamedTuple):
    """How a call of `train` ended."""

    model: Path | None
    """Folder of the finished model; None if the run was interrupted."""
    step: int
    """Finished steps."""
    loss: float | None
    """Training loss of the last step; None if this call made no step."""
    evaluation: dict[str, Any] | None
    """The last result of `evaluate_sequences`; None if this call evaluated nothing."""
    tokens: int
    """Tokens that the whole run, earlier calls included, has trained on."""
    seconds: float
    """Time that the whole run has taken."""
    interrupted: bool


def train(
    config: RunConfig,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    start_from: Path | None = None,
    cache: Path | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    tensorboard: bool = False,
    wandb: bool = False,
    progress: bool = True,
    threads: int | None = None,
    compile: bool = False,
) -> TrainResult:
    """Train a model. Under `torchrun` each process takes a part of every batch, and holds a part of the weights.

    SIGINT and SIGTERM finish the step and write a checkpoint before the function returns.

    Args:
        config: the model, and how to train it.
        data: a folder that `prepare` has written, or the official zarr arrays.
        out: the folder of the run.
        resume: continue from the newest intact checkpoint in `out`.
        start_from: a model folder whose weights to start from.
        cache: with `cache_prefix`, the folder for the outputs of the frozen prefix; None: "prefix" in `out`.
        tokenizer: the tokenizer of zarr arrays, as for `Tokenizer.load`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        tensorboard, wandb: log there, too.
        progress: show a progress bar.
        threads: of PyTorch on a CPU.
        compile: compile the steps. Results are equal up to rounding, and a run may be resumed with another choice.

    Raises:
        UserError: for whatever does not fit together, and for a full disk.
        Divergence: for a loss that is not finite; the last checkpoint is kept.
        SystemExit: in all processes but one, if several end with one of these.
    """
    data, out = Path(data), Path(out)
    train_config = config.train
    # torchrun restarts all processes with the same command line after one was killed.
    resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if threads is not None:
        torch.set_num_threads(threads)
    stop_signals = GracefulStop(signal.SIGINT, signal.SIGTERM, merge_seconds=2.0)
    with init_distributed(device, train_config.timeout_seconds) as dist, stop_signals, ExitStack() as stack:
        parts = dist.world_size * train_config.accumulate
        checkpoint = None
        with dist.one_error():
            tokenizer_override = None if tokenizer is None else Tokenizer.load(tokenizer)
            tokens = open_tokens(data, "train", tokenizer_override)
            _check_fit(config, dist)
            tokens.check_vocabulary(config.model.vocab_size)
            validation = []
            if train_config.eval_every:
                val_tokens = open_tokens(data, "val", tokenizer_override)
                validation = val_sequences(val_tokens, train_config.context, train_config.eval_tokens)
            data_tokenizer = tokenizer_override or tokens.tokenizer()
            stack.enter_context(lock_run(out, dist))
            record = check_run(config, tokens, out, resume, start_from, dist)
            if cache is not None and not train_config.cache_prefix:
                raise UserError(
                    "--cache names a folder for the outputs of a frozen prefix; set cache_prefix=true as well."
                )
            if resume and dist.is_rank0:
                checkpoint = latest_checkpoint(out, dist.log)
        checkpoint = dist.gather(checkpoint)[0]
        dist.check_equal(
            {
                "ttt-e2e": __version__,
                "torch": torch.__version__,
                **flatten(config),
                "the data": tokens.digest,
                "the model to start from": record["start_digest"],
                "compile": compile,
            }
        )
        dist.log(f"Run {out}, on {dist.device}: {json.dumps(to_dict(config), indent=2)}")

        torch.manual_seed(train_config.seed)
        model = Transformer(config.model)
        if dist.world_size == 1:
            model.to(dist.device)
        local_batch_size, seed = train_config.batch // dist.world_size, train_config.seed
        with dist.one_error():
            loader = SequenceLoader(
                tokens,
                train_config.context,
                local_batch_size,
                seed,
                dist.rank,
                dist.world_size,
                train_config.cache_prefix,
            )
            if checkpoint is not None:
                state = load_model_state(checkpoint, model, train_config)
                loader.load_state(state.loader)
                dist.log(f"Resuming after step {state.step}, from {checkpoint}.")
            else:
                if record["start_from"] is not None:
                    load_start_weights(model, Path(record["start_from"]), data_tokenizer.digest)
                    dist.log(f"Starting from the weights in {record['start_from']}.")
                elif resume:
                    dist.log(f"There is no checkpoint in {out} yet: starting from the first step.")
                set_trainable(model, train_config)
                state = TrainerState(loader=loader.state())
        if train_config.trainable != "all":
            trained = sum(weight.numel() for weight in trained_weights(model).values())
            dist.log(f"Trained: {trained:,} numbers, beside {parameters(config.model):,} of the model.")
        uses_cache = train_config.cache_prefix and state.step < train_config.steps
        prefix_weights = digest_below_loop(model) if uses_cache else ""
        parallel = ParallelModel(model, dist).shard(train_config)
        optimizer = make_optimizer(model, train_config)
        if checkpoint is not None:
            load_optimizer_state(checkpoint, parallel, optimizer, state)

        metrics = None
        with dist.one_error():
            if dist.is_rank0:
                remove_stale_parts(out)
                remove_stale_parts(out / "checkpoints")
                write_text(out / CONFIG, json.dumps(record, indent=2) + "\n")
                data_tokenizer.save(out / TOKENIZER)
                if record["start_from"] is not None and checkpoint is None:
                    copy_pretrained_metadata(Path(record["start_from"]), out)
                about = (to_dict(config), tensorboard, wandb, state.metrics_lines)
                metrics = stack.enter_context(MetricsWriter(out, state.step, *about))
        prefix: PrefixCache | None = None
        if uses_cache:
            folder = cache or out / "prefix"
            prefix = fill_prefix_cache(folder, parallel, prefix_weights, loader, train_config, stop_signals, progress)
            if prefix is None:
                dist.log("Stopped before the first step; continue with the same command and --resume.")
                return TrainResult(None, state.step, None, None, state.tokens, state.seconds, True)
            stack.callback(prefix.close)
        hidden = not (progress and dist.is_rank0)
        bar = stack.enter_context(
            ProgressBar(total=train_config.steps, initial=state.step, unit="step", disable=hidden)
        )
        micro_batch_loss = partial(
            parallel,
            sequence_loss,
            bos=tokens.bos,
            learn=train_config.train_mode == "meta",
            activation_checkpointing=train_config.activation_checkpointing,
            recompute_prefix=train_config.recompute_prefix,
            truncated_bptt_steps=train_config.truncated_bptt_steps,
            dtype=getattr(torch, train_config.dtype),
            functions=parallel.compiled_functions() if compile else EAGER,
            prefix_frozen=train_config.prefix_frozen,
        )
        saver = stack.enter_context(CheckpointSaver(out, parallel, optimizer, config))
        if compile and state.step < train_config.steps:
            bar.set_postfix_str("compiling")

        loss, evaluation = None, None
        seconds_before, started = state.seconds, time.perf_counter()
        for step in range(state.step, train_config.steps):
            step_started = time.perf_counter()
            with dist.one_error():  # every step's first exchange, which notices a process that hangs
                windows, batch_BT1 = loader.next_batch()
            lr = learning_rate(step, train_config)
            inner_lr = inner_learning_rate(step, train_config, config.model)
            total = torch.zeros((), device=dist.device)
            size = len(windows) // train_config.accumulate
            for i, micro_batch_BT1 in enumerate(batch_BT1.to(dist.device).split(size)):
                parallel.set_requires_all_reduce(i == train_config.accumulate - 1)
                prefix_BTD = None
                if prefix is not None:
                    with dist.one_error():
                        prefix_BTD = prefix.read(windows[i * size : (i + 1) * size])
                part = micro_batch_loss(micro_batch_BT1, inner_lr=inner_lr, prefix_BTD=prefix_BTD).loss / parts
                part.backward()
                total += part.detach()
            flags = total.new_tensor([stop_signals.requested, saver.is_busy])
            sums = torch.cat([total[None], flags])
            dist.all_reduce(sums)
            norm = optimizer_step(model, optimizer, lr, train_config.max_grad_norm)
            loss, is_stopping, is_saving = float(sums[0]), bool(sums[1]), bool(sums[2])
            if not is_saving:
                saver.advance()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                saver.wait()
                folders = list_checkpoints(out)
                kept = f"The last checkpoint is kept: {folders[0]}." if folders else "There is no checkpoint yet."
                with dist.one_error():
                    raise Divergence(
                        f"Step {step + 1} has a loss of {loss} and a gradient norm of {norm}. {kept} Start another run "
                        f"with a lower train.lr (it is {train_config.lr}), a longer train.warmup_steps "
                        f"(it is {train_config.warmup_steps}) or a lower model.inner_loop.lr "
                        f"(it is {config.model.inner_loop.lr})."
                    )

            now = time.perf_counter()
            step_tokens = train_config.batch * train_config.context
            speed = step_tokens / (now - step_started)
            state = TrainerState(step + 1, state.tokens + step_tokens, seconds_before + now - started, loader.state())
            is_last = state.step == train_config.steps
            lines: list[dict[str, Any]] = []
            if is_last or _is_due(state.step, train_config.log_every):
                lines.append(
                    {
                        "step": state.step,
                        "loss": loss,
                        "lr": lr,
                        **({"inner_lr": inner_lr} if model.suffix else {}),
                        "grad_norm": norm,
                        "tokens": state.tokens,
                        "tokens_per_second": round(speed, 1),
                        "seconds": round(state.seconds, 3),
                    }
                )
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            if validation and (is_last or _is_due(state.step, train_config.eval_every)):
                # Never compiled: without gradients and with lengths of its own, each batch would be compiled anew.
                evaluation = evaluate_sequences(parallel, validation, tokens.bos, train_config)
                gain = f", learning while reading gains {evaluation['gain']:+.4f}" if "gain" in evaluation else ""
                dist.log(f"Step {state.step}: validation loss {evaluation['loss']:.4f}{gain}")
                lines.append({"step": state.step, "eval": evaluation})
            saves = is_last or is_stopping or _is_due(state.step, train_config.checkpoint_every)
            with dist.one_error():
                if metrics:
                    for line in lines:
                        metrics.write(line)
                    state = replace(state, metrics_lines=metrics.lines)
            if saves:
                saver.save(state, metrics.sync if metrics else lambda: None)
            if is_stopping:
                break

        saver.wait()
        interrupted = state.step < train_config.steps
        if interrupted:
            dist.log(f"Stopped after step {state.step}; continue with the same command and --resume.")
        else:
            finished = parallel.gather()
            with dist.one_error():
                if finished is not None:
                    notes = {"step": state.step, "tokens": state.tokens}
                    save_model(finished, out / MODEL, out / TOKENIZER, notes=notes)
            dist.log(f"Finished after step {state.step}; the model is in {out / MODEL}.")
        model_folder = None if interrupted else out / MODEL
        return TrainResult(model_folder, state.step, loss, evaluation, state.tokens, state.seconds, interrupted)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_fit(config: RunConfig, dist: DistributedContext) -> None:
    """Raise UserError if the batch or the model does not split over these processes, or memory is too small."""
    train = config.train
    parts, (_, shards) = dist.world_size * train.accumulate, mesh_shape(train, dist.world_size)
    if train.batch % parts:
        raise UserError(
            f"A batch of {train.batch} sequences does not split over {dist.world_size} processes with "
            f"{train.accumulate} micro-batches each; choose train.batch as a multiple of {parts}."
        )
    needed, available = training_bytes(config.model, train) // shards, memory_bytes(dist.device)
    if needed > available:
        raise UserError(
            f"Training this model takes at least {in_bytes(needed)} of memory, and the {dist.device} has "
            f"{in_bytes(available)}; choose a smaller model."
        )
