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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ttt_e2e import __version__
from ttt_e2e.config.parse import flatten, to_dict
from ttt_e2e.config.schema import RunConfig
from ttt_e2e.data.loader import SequenceLoader, val_sequences
from ttt_e2e.data.shards import TokenSet, open_tokens
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import Divergence, UserError
from ttt_e2e.files import remove_stale_parts, write_text
from ttt_e2e.hardware import memory_bytes
from ttt_e2e.inner_loop.functions import EAGER, LoopFunctions
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
        UserError: if model, data, `out` and the number of processes do not fit together, or if the disk is full.
        Divergence: if a loss or a gradient is not finite; the last checkpoint is kept.
        SystemExit: with several processes, one raises one of these errors, and all others this.
    """
    data, out = Path(data), Path(out)
    train_config = config.train
    # torchrun restarts all processes with the same command line after one was killed.
    resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if threads is not None:
        torch.set_num_threads(threads)
    stop_signals = GracefulStop(signal.SIGINT, signal.SIGTERM, merge_seconds=2.0)
    with init_distributed(device, train_config.timeout_seconds) as dist, stop_signals, ExitStack() as stack:
        run = _open_run(config, data, out, resume, start_from, cache, tokenizer, dist, stack)
        _check_processes(config, run, compile, dist)
        dist.log(f"Run {out}, on {dist.device}: {json.dumps(to_dict(config), indent=2)}")

        model, loader, state = _build_model(config, out, run, resume, dist)
        uses_cache = train_config.cache_prefix and state.step < train_config.steps
        prefix_weights = digest_below_loop(model) if uses_cache else ""  # of whole weights, not of a process's part
        parallel = ParallelModel(model, dist).shard(train_config)
        optimizer = make_optimizer(model, train_config)
        if run.checkpoint is not None:
            load_optimizer_state(run.checkpoint, parallel, optimizer, state)
        with dist.one_error():
            metrics = _open_metrics(config, out, run, state, tensorboard, wandb, stack) if dist.is_rank0 else None

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
        functions = parallel.compiled_functions() if compile else EAGER
        saver = stack.enter_context(CheckpointSaver(out, parallel, optimizer, config))
        train_step = _TrainStep(config, parallel, optimizer, loader, prefix, functions, stop_signals, saver)
        if compile and state.step < train_config.steps:
            bar.set_postfix_str("compiling")

        loss, evaluation = None, None
        seconds_before, started = state.seconds, time.perf_counter()
        step_tokens = train_config.batch * train_config.context
        for step in range(state.step, train_config.steps):
            step_started = time.perf_counter()
            result = train_step(step)
            loss = result.loss
            if not result.is_saving:
                saver.advance()
            if not (math.isfinite(loss) and math.isfinite(result.grad_norm)):
                saver.wait()
                with dist.one_error():
                    raise _divergence(config, out, step, result)

            now = time.perf_counter()
            speed = step_tokens / (now - step_started)
            state = TrainerState(step + 1, state.tokens + step_tokens, seconds_before + now - started, loader.state())
            is_last = state.step == train_config.steps
            lines = []
            if is_last or _is_due(state.step, train_config.log_every):
                lines.append(_metrics_line(result, state, speed, has_suffix=bool(model.suffix)))
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            if run.validation and (is_last or _is_due(state.step, train_config.eval_every)):
                # Never compiled: without gradients and with lengths of its own, each batch would be compiled anew.
                evaluation = evaluate_sequences(parallel, run.validation, run.tokens.bos, train_config)
                dist.log(f"Step {state.step}: {_describe_evaluation(evaluation)}")
                lines.append({"step": state.step, "eval": evaluation})
            with dist.one_error():
                if metrics:
                    for line in lines:
                        metrics.write(line)
                    state = replace(state, metrics_lines=metrics.lines)
            if is_last or result.is_stopping or _is_due(state.step, train_config.checkpoint_every):
                saver.save(state, metrics.sync if metrics else lambda: None)
            if result.is_stopping:
                break

        saver.wait()
        interrupted = state.step < train_config.steps
        if interrupted:
            dist.log(f"Stopped after step {state.step}; continue with the same command and --resume.")
        else:
            _save_finished(parallel, out, state)
        model_folder = None if interrupted else out / MODEL
        return TrainResult(model_folder, state.step, loss, evaluation, state.tokens, state.seconds, interrupted)


class _Run(NamedTuple):
    """What a run reads: its data, and what its folder says of it."""

    tokens: TokenSet
    validation: list[np.ndarray]  # empty if nothing is evaluated
    tokenizer: Tokenizer
    record: dict[str, Any]  # the content of config.json
    checkpoint: Path | None  # to resume from


def _open_run(
    config: RunConfig,
    data: Path,
    out: Path,
    resume: bool,
    start_from: Path | None,
    cache: Path | None,
    tokenizer: str | None,
    dist: DistributedContext,
    stack: ExitStack,
) -> _Run:
    """Open the data, lock the run's folder until `stack` is left, and check that everything fits together."""
    checkpoint = None
    with dist.one_error():
        tokenizer_override = None if tokenizer is None else Tokenizer.load(tokenizer)
        tokens = open_tokens(data, "train", tokenizer_override)
        _check_fit(config, dist)
        tokens.check_vocabulary(config.model.vocab_size)
        validation = []
        if config.train.eval_every:
            val_tokens = open_tokens(data, "val", tokenizer_override)
            validation = val_sequences(val_tokens, config.train.context, config.train.eval_tokens)
        data_tokenizer = tokenizer_override or tokens.tokenizer()
        stack.enter_context(lock_run(out, dist))
        record = check_run(config, tokens, out, resume, start_from, dist)
        if cache is not None and not config.train.cache_prefix:
            raise UserError("--cache names a folder for the outputs of a frozen prefix; set cache_prefix=true as well.")
        if resume and dist.is_rank0:
            checkpoint = latest_checkpoint(out, dist.log)
    checkpoint = dist.gather(checkpoint)[0]
    return _Run(tokens, validation, data_tokenizer, record, checkpoint)


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


def _check_processes(config: RunConfig, run: _Run, compile: bool, dist: DistributedContext) -> None:
    """Raise UserError unless all processes were started with the same versions, settings and files."""
    dist.check_equal(
        {
            "ttt-e2e": __version__,
            "torch": torch.__version__,
            **flatten(config),
            "the data": run.tokens.digest,
            "the model to start from": run.record["start_digest"],
            "compile": compile,
        }
    )


def _build_model(
    config: RunConfig, out: Path, run: _Run, resume: bool, dist: DistributedContext
) -> tuple[Transformer, SequenceLoader, TrainerState]:
    """The model, whole in every process, and the loader, as they were at the checkpoint or are before the first step.

    With one process the model is on the device already.
    """
    train = config.train
    torch.manual_seed(train.seed)
    model = Transformer(config.model)
    if dist.world_size == 1:
        model.to(dist.device)
    local_batch_size = train.batch // dist.world_size
    with dist.one_error():
        loader = SequenceLoader(
            run.tokens, train.context, local_batch_size, train.seed, dist.rank, dist.world_size, train.cache_prefix
        )
        if run.checkpoint is not None:
            state = load_model_state(run.checkpoint, model, train)
            loader.load_state(state.loader)
            dist.log(f"Resuming after step {state.step}, from {run.checkpoint}.")
        else:
            if run.record["start_from"] is not None:
                load_start_weights(model, Path(run.record["start_from"]), run.tokenizer.digest)
                dist.log(f"Starting from the weights in {run.record['start_from']}.")
            elif resume:
                dist.log(f"There is no checkpoint in {out} yet: starting from the first step.")
            set_trainable(model, train)
            state = TrainerState(loader=loader.state())
    if train.trainable != "all":
        trained = sum(weight.numel() for weight in trained_weights(model).values())
        dist.log(f"Trained: {trained:,} numbers, beside {parameters(config.model):,} of the model.")
    return model, loader, state


def _open_metrics(
    config: RunConfig, out: Path, run: _Run, state: TrainerState, tensorboard: bool, wandb: bool, stack: ExitStack
) -> MetricsWriter:
    """Bring the run's folder to the state of `state`, and open its metrics until `stack` is left."""
    remove_stale_parts(out)
    remove_stale_parts(out / "checkpoints")
    write_text(out / CONFIG, json.dumps(run.record, indent=2) + "\n")
    run.tokenizer.save(out / TOKENIZER)
    if run.record["start_from"] is not None and run.checkpoint is None:
        copy_pretrained_metadata(Path(run.record["start_from"]), out)
    about = (to_dict(config), tensorboard, wandb, state.metrics_lines)
    return stack.enter_context(MetricsWriter(out, state.step, *about))


class _StepResult(NamedTuple):
    """What a step came to, the same in all processes."""

    loss: float  # mean over the whole batch, in nats per token
    grad_norm: float  # before clipping
    lr: float
    inner_lr: float
    is_stopping: bool  # whether any process was asked to stop
    is_saving: bool  # whether any process still writes a checkpoint


class _TrainStep:
    """One optimizer step: the loss and gradients of a batch in micro-batches, summed over processes, then AdamW."""

    def __init__(
        self,
        config: RunConfig,
        parallel: ParallelModel,
        optimizer: torch.optim.Optimizer,
        loader: SequenceLoader,
        prefix: PrefixCache | None,
        functions: LoopFunctions,
        stop_signals: GracefulStop,
        saver: CheckpointSaver,
    ) -> None:
        self._config, self._parallel, self._optimizer = config, parallel, optimizer
        self._loader, self._prefix = loader, prefix
        self._stop_signals, self._saver = stop_signals, saver
        self._loss = partial(
            parallel,
            sequence_loss,
            bos=loader.tokens.bos,
            learn=config.train.train_mode == "meta",
            activation_checkpointing=config.train.activation_checkpointing,
            recompute_prefix=config.train.recompute_prefix,
            truncated_bptt_steps=config.train.truncated_bptt_steps,
            dtype=getattr(torch, config.train.dtype),
            functions=functions,
            prefix_frozen=config.train.prefix_frozen,
        )

    def __call__(self, step: int) -> _StepResult:
        """Take the 0-based `step`. If its loss or gradient norm is not finite, the weights stay as they were."""
        train, dist = self._config.train, self._parallel.dist
        with dist.one_error():  # every step's first exchange, which notices a process that hangs
            windows, batch_BT1 = self._loader.next_batch()
        lr, inner_lr = learning_rate(step, train), inner_learning_rate(step, train, self._config.model)
        loss = torch.zeros((), device=dist.device)
        size = len(windows) // train.accumulate
        for i, micro_batch_BT1 in enumerate(batch_BT1.to(dist.device).split(size)):
            self._parallel.set_requires_all_reduce(i == train.accumulate - 1)
            loss += self._forward_backward(windows[i * size : (i + 1) * size], micro_batch_BT1, inner_lr)
        flags = loss.new_tensor([self._stop_signals.requested, self._saver.is_busy])
        sums = torch.cat([loss[None], flags])
        dist.all_reduce(sums)
        grad_norm = optimizer_step(self._parallel.model, self._optimizer, lr, train.max_grad_norm)
        return _StepResult(float(sums[0]), grad_norm, lr, inner_lr, bool(sums[1]), bool(sums[2]))

    def _forward_backward(self, windows: Sequence[int], micro_batch_BT1: Tensor, inner_lr: float) -> Tensor:
        """Add to the gradients; returns what these windows contribute to the mean loss of the whole batch."""
        train, dist = self._config.train, self._parallel.dist
        prefix_BTD = None
        if self._prefix is not None:
            with dist.one_error():
                prefix_BTD = self._prefix.read(windows)
        output = self._loss(micro_batch_BT1, inner_lr=inner_lr, prefix_BTD=prefix_BTD)
        loss = output.loss / (dist.world_size * train.accumulate)
        loss.backward()
        return loss.detach()


def _divergence(config: RunConfig, out: Path, step: int, result: _StepResult) -> Divergence:
    """What to raise when the 0-based `step` has diverged."""
    folders = list_checkpoints(out)
    kept = f"The last checkpoint is kept: {folders[0]}." if folders else "There is no checkpoint yet."
    return Divergence(
        f"Step {step + 1} has a loss of {result.loss} and a gradient norm of {result.grad_norm}. {kept} Start another "
        f"run with a lower train.lr (it is {config.train.lr}), a longer train.warmup_steps "
        f"(it is {config.train.warmup_steps}) or a lower model.inner_loop.lr (it is {config.model.inner_loop.lr})."
    )


def _metrics_line(
    result: _StepResult, state: TrainerState, tokens_per_second: float, has_suffix: bool
) -> dict[str, Any]:
    """What metrics.jsonl says of a step. state: after it. has_suffix: whether the model has one."""
    return {
        "step": state.step,
        "loss": result.loss,
        "lr": result.lr,
        **({"inner_lr": result.inner_lr} if has_suffix else {}),
        "grad_norm": result.grad_norm,
        "tokens": state.tokens,
        "tokens_per_second": round(tokens_per_second, 1),
        "seconds": round(state.seconds, 3),
    }


def _describe_evaluation(evaluation: dict[str, Any]) -> str:
    gain = f", learning while reading gains {evaluation['gain']:+.4f}" if "gain" in evaluation else ""
    return f"validation loss {evaluation['loss']:.4f}{gain}"


def _save_finished(parallel: ParallelModel, out: Path, state: TrainerState) -> None:
    """Write the finished model to the run's folder."""
    dist, model = parallel.dist, parallel.gather()
    with dist.one_error():
        if model is not None:
            save_model(model, out / MODEL, out / TOKENIZER, notes={"step": state.step, "tokens": state.tokens})
    dist.log(f"Finished after step {state.step}; the model is in {out / MODEL}.")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
