"""The trainer: `train` from the first step to the last, killed and resumed as often as it may be.

A run is a folder: config.json (what it is), metrics.jsonl (what it measured), checkpoints/ (where it can go
on), and at the end model/ (what came out). All that decides the next step lies in a checkpoint: weights,
AdamW's moments and the place in the data; the learning rates follow from the step, and nothing else is
random. On a CPU a resumed run therefore repeats an uninterrupted one bit for bit, as long as the number of
threads and processes stays the same, and compilation on or off.
"""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from tqdm import tqdm

from ttt_e2e.config.parse import flatten, to_dict
from ttt_e2e.config.schema import RunConfig, TrainConfig
from ttt_e2e.data.loader import SequenceLoader, held_out
from ttt_e2e.data.shards import TokenSet, open_tokens
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import Divergence, UserError
from ttt_e2e.files import write_text
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.inner_loop.step import EAGER, sequence_loss
from ttt_e2e.model.checkpoint import (
    CONFIG,
    TOKENIZER,
    copy_pretrained_metadata,
    load_config,
    read_json,
    read_weights,
    save_model,
    stored_digest,
)
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training.checkpoint import (
    Progress,
    checkpoints,
    latest,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from ttt_e2e.training.evaluate import evaluate
from ttt_e2e.training.metrics import Metrics
from ttt_e2e.training.optimizer import (
    inner_learning_rate,
    learning_rate,
    make_optimizer,
    optimizer_step,
)
from ttt_e2e.training.parallelize import Processes, processes

FORMAT = "ttt-e2e run"
MODEL = "model"

# What may change when a run is resumed: it decides what is written down, not what is learned.
_CADENCE = ("log_every", "eval_every", "eval_tokens", "checkpoint_every", "keep_checkpoints")
# What may change when a trained model is trained further: neither a weight's shape nor what a token sees.
_FREE = (
    *("mini_batch_size", "inner_loop.lr", "inner_loop.max_grad_norm", "rms_norm_eps", "initializer_range"),
    *("memory.lr", "mamba2.kernels", "gated_deltanet.kernels", "rope_theta"),
    *("rope_scaling.rope_type", "rope_scaling.factor", "rope_scaling.original_max_position_embeddings"),
    *("rope_scaling.low_freq_factor", "rope_scaling.high_freq_factor", "rope_scaling.attention_factor"),
)


@dataclass(frozen=True)
class Summary:
    """How a call of `train` ended.

    model: the finished model's folder, None if the run was `interrupted`. loss, evaluation: the last ones,
    None if this call came to none. tokens, seconds: of the whole run, earlier attempts included.
    """

    run: Path
    model: Path | None
    step: int
    loss: float | None
    evaluation: dict[str, Any] | None
    tokens: int
    seconds: float
    interrupted: bool


def train(
    config: RunConfig,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    start_from: Path | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    tensorboard: bool = False,
    wandb: bool = False,
    progress: bool = True,
    threads: int | None = None,
    compile: bool = False,
) -> Summary:
    """Train `config` on the prepared folder `data`, in the run folder `out`.

    resume: go on from the newest whole checkpoint in `out`. start_from: a model folder whose weights to begin with.
    tokenizer: for token arrays that come without one (zarr), the one that made them. progress: show a bar.
    threads: of PyTorch on a CPU. compile: run the steps compiled, the same numbers up to rounding; a run may be
    resumed with another choice. Under `torchrun` the batch is shared among the processes. SIGINT and SIGTERM finish
    the step, write a checkpoint and return a Summary that is `interrupted`. Raises UserError for whatever does not fit
    together and for a full disk, Divergence for a loss that is not finite; the last checkpoint is then still there.
    """
    data, out = Path(data), Path(out)
    plan, model_config = config.train, config.model
    if threads is not None:
        torch.set_num_threads(threads)
    with processes(device) as dist, _StopSignals() as signals, ExitStack() as stack:
        say = _speaker(dist)
        given = None if tokenizer is None else Tokenizer.load(tokenizer)
        tokens = open_tokens(data, "train", given)
        _check_batch(plan, dist)
        tokens.check_vocabulary(model_config.vocab_size)
        held = held_out(open_tokens(data, "val", given), plan.context, plan.eval_tokens) if plan.eval_every else []
        words, bos = given or tokens.tokenizer(), tokens.bos
        record = _check_run(config, tokens, out, resume, start_from, dist)
        say(f"Run {out}, on {dist.device}: {json.dumps(to_dict(config), indent=2)}")

        torch.manual_seed(plan.seed)
        model = Transformer(model_config).to(dist.device)
        optimizer = make_optimizer(model, plan)
        share = plan.batch // dist.world
        loader = SequenceLoader(tokens, plan.context, share, plan.seed, rank=dist.rank, world=dist.world)

        done = Progress(loader=loader.state())
        checkpoint = latest(out, say) if resume else None
        if checkpoint is not None:
            done = load_checkpoint(checkpoint, model, optimizer)
            loader.load_state(done.loader)
            say(f"Going on after step {done.step}, from {checkpoint}.")
        elif record["start_from"] is not None:
            _read_start(model, Path(record["start_from"]), words.digest)
            say(f"Starting from the weights in {record['start_from']}.")
        elif resume:
            say(f"There is no checkpoint in {out} yet: starting from the first step.")

        metrics = None
        if dist.is_rank0:
            remove_leftovers(out)
            write_text(out / CONFIG, json.dumps(record, indent=2) + "\n")
            words.save(out / TOKENIZER)
            if record["start_from"] is not None and checkpoint is None:
                copy_pretrained_metadata(Path(record["start_from"]), out)
            metrics = stack.enter_context(Metrics(out, done.step, to_dict(config), tensorboard, wandb))
        hidden = not (progress and dist.is_rank0)
        bar = stack.enter_context(tqdm(total=plan.steps, initial=done.step, unit="step", disable=hidden))

        functions = compiled_functions(dist.device) if compile else EAGER
        if compile and done.step < plan.steps:
            bar.set_postfix_str("compiling")

        loss, evaluation = None, None
        first_step, seconds_before, started = done.step, done.seconds, time.perf_counter()
        for step in range(first_step, plan.steps):
            step_started = time.perf_counter()
            lr = learning_rate(step, plan)
            inner_lr = inner_learning_rate(step, plan, model_config)

            total = torch.zeros((), device=dist.device)
            for tokens_BT1 in next(loader).to(dist.device).chunk(plan.accumulate):
                result = sequence_loss(
                    model,
                    tokens_BT1,
                    bos=bos,
                    learn=plan.train_mode == "meta",
                    inner_lr=inner_lr,
                    activation_checkpointing=plan.activation_checkpointing,
                    dtype=getattr(torch, plan.dtype),
                    functions=functions,
                )
                piece = result.loss / (plan.accumulate * dist.world)
                piece.backward()
                total += piece.detach()
            stop = torch.tensor(float(signals.asked), device=dist.device)
            dist.sum_([total, stop, *(weight.grad for weight in model.parameters() if weight.grad is not None)])
            norm = optimizer_step(model, optimizer, lr, plan.max_grad_norm)

            loss = float(total)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Divergence(
                    f"Step {step + 1} has a loss of {loss} and a gradient norm of {norm}. {_kept(out)} "
                    f"Begin another run with a lower train.lr (it is {plan.lr}), a longer train.warmup_steps "
                    f"(it is {plan.warmup_steps}) or a lower model.inner_loop.lr (it is {model_config.inner_loop.lr})."
                )
            now = time.perf_counter()
            speed = plan.batch * plan.context / (now - step_started)
            done.step, done.tokens = step + 1, done.tokens + plan.batch * plan.context
            done.seconds, done.loader = seconds_before + now - started, loader.state()
            last, asked = done.step == plan.steps, bool(stop)

            if metrics and (last or _due(done.step, plan.log_every)):
                metrics.write(
                    {
                        "step": done.step,
                        "loss": loss,
                        "lr": lr,
                        **({"inner_lr": inner_lr} if model.suffix else {}),
                        "grad_norm": norm,
                        "tokens": done.tokens,
                        "tokens_per_second": round(speed, 1),
                        "seconds": round(done.seconds, 3),
                    }
                )
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            if held and (last or _due(done.step, plan.eval_every)):
                # Never compiled: without gradients and with lengths of its own, each batch would be compiled anew.
                evaluation = evaluate(model, held, bos, plan, dist)
                say(f"Step {done.step}: {_in_words(evaluation)}")
                if metrics:
                    metrics.write({"step": done.step, "eval": evaluation})
            if metrics and (last or asked or _due(done.step, plan.checkpoint_every)):
                metrics.sync()
                save_checkpoint(out, model, optimizer, done, config, out / TOKENIZER)
            if asked and not last:
                say(f"Stopped after step {done.step}; the same command with --resume goes on from there.")
                return Summary(out, None, done.step, loss, evaluation, done.tokens, done.seconds, True)

        if metrics:
            save_model(model, out / MODEL, out / TOKENIZER, notes={"step": done.step, "tokens": done.tokens})
        dist.wait()
        say(f"Finished after step {done.step}; the model is in {out / MODEL}.")
        return Summary(out, out / MODEL, done.step, loss, evaluation, done.tokens, done.seconds, False)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _speaker(dist: Processes) -> Callable[[str], None]:
    """Prints above the progress bar, in the leading process only."""

    def say(message: str) -> None:
        if dist.is_rank0:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    return say


def _in_words(evaluation: dict[str, Any]) -> str:
    if "gain" not in evaluation:
        return f"held-out loss {evaluation['loss']:.4f}"
    gain = f"learning while reading gains {evaluation['gain']:+.4f}"
    return f"held-out loss {evaluation['loss']:.4f}, {gain}"


def _kept(out: Path) -> str:
    folders = checkpoints(out)
    return f"The last checkpoint is kept: {folders[0]}." if folders else "There is no checkpoint yet."


# -- what must fit together before the first step ------------------------------------------------------------


def _check_batch(plan: TrainConfig, dist: Processes) -> None:
    pieces = dist.world * plan.accumulate
    if plan.batch % pieces:
        raise UserError(
            f"A batch of {plan.batch} sequences does not split over {dist.world} processes with "
            f"{plan.accumulate} pieces each; choose train.batch as a multiple of {pieces}."
        )


def _check_run(
    config: RunConfig, tokens: TokenSet, out: Path, resume: bool, start_from: Path | None, dist: Processes
) -> dict[str, Any]:
    """Check that `out` is free, or the run to resume; returns what its config.json is to say."""
    saved = {
        "format": FORMAT,
        "version": 2,
        **to_dict(config),
        "data": tokens.where,
        "data_digest": tokens.digest,
        "start_from": None if start_from is None else str(Path(start_from).resolve()),
        "start_digest": None if start_from is None else stored_digest(start_from),
    }
    found = out / CONFIG
    if resume and found.exists():
        before = read_json(found)
        if before.get("format") != FORMAT:
            raise UserError(f"{out} is not a training run: {found} is something else; choose another folder.")
        _require_same(before, saved, out)
        for name in ("start_from", "start_digest"):
            saved[name] = saved[name] or before.get(name)
    elif dist.is_rank0 and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a folder with --out.")
    elif dist.is_rank0 and out.exists() and any(not f.name.startswith(".") for f in out.iterdir()):
        what = "already holds a run; continue it with --resume" if found.exists() else "is not empty"
        raise UserError(f"{out} {what}, or choose another folder with --out.")
    return saved


def _require_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    for section in ("model", "train"):
        saved = before.get(section, {})
        for name in {**saved, **now[section]}:  # either may leave out a field that came later
            old, value = saved.get(name), now[section].get(name)
            if old != value and name not in _CADENCE:
                raise UserError(
                    f"The run in {out} has {section}.{name} = {old}, not {value}; resume it with the same "
                    "configuration, or begin another run in another folder."
                )
    if before.get("data_digest") != now["data_digest"]:
        raise UserError(
            f"{now['data']} is not the data that the run in {out} reads ({before.get('data')}); give the same data."
        )
    moved = now["start_digest"] is not None and now["start_digest"] == before.get("start_digest")
    if now["start_from"] not in (None, before.get("start_from")) and not moved:
        raise UserError(f"The run in {out} started from {before.get('start_from')}, not from {now['start_from']}.")


def _read_start(model: Transformer, folder: Path, tokenizer_digest: str) -> None:
    """Fill `model` from the model in `folder`, if that has its shape and the data's tokenizer."""
    theirs, ours = flatten(load_config(folder)), flatten(model.config)
    for name, value in ours.items():
        if theirs[name] != value and name not in _FREE:
            raise UserError(
                f"The model in {folder} has {name} = {theirs[name]}, not {value}; "
                f"set model.{name}={theirs[name]} to go on with it."
            )
    if (folder / TOKENIZER).is_file() and Tokenizer.load(folder / TOKENIZER).digest != tokenizer_digest:
        raise UserError(
            f"The model in {folder} has another tokenizer than the data; prepare the data with {folder / TOKENIZER}."
        )
    read_weights(model, folder)


class _StopSignals:
    """While it is open, the first SIGINT or SIGTERM only sets `asked`; the next does what it always does."""

    def __init__(self) -> None:
        self.asked = False
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # One Ctrl-C under torchrun arrives twice: from the terminal and from torchrun.
        if self.asked and time.monotonic() - self._at > 2:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        elif not self.asked:
            self.asked, self._at = True, time.monotonic()
