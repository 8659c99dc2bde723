"""Time per token of every system: to read a text, to write after it, to train on it.

One sequence, random weights and tokens, nothing compiled. The systems take turns, round after round, and the median
counts. Matrices are held in the dtype of the products as a session holds them (`model.precision`); in training all are
float32.

Reading. A model that learns reads mini-batch by mini-batch, as a session does, and computes the losses that it learns
from. Any other model reads the whole text in one call and computes the logits of its last token, the least that it can
do. A text that takes too long or too much memory for that is interpolated from four segments: its start, and three at
later positions, which are read with states of their true size (for full attention, random keys and values). Time per
token is taken to grow linearly between them, as full attention's does. On a CPU, attention costs two to three times as
much in segments as in one call: do not compare interpolated figures of standard models with the others.

Writing. One token after the other. A memory (TTT-KVB, Titans) is trained after every mini-batch that it writes; that is
left out, and costs less per token than reading one.

Training. Loss and backward pass, with activation checkpointing by mini-batch.

Shapes: B = 1 sequence, T tokens, D hidden size, V vocabulary.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.inference.streaming import ReadState, forward, read_mini_batch, start_reading
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.cost import fast_weights, parameters, state_bytes
from ttt_e2e.model.kv_cache import KVCache
from ttt_e2e.model.precision import hold_in, product_matrices
from ttt_e2e.model.transformer import Transformer

SEED = 0
WRITTEN_TOKENS = 16  # that the time to write one is averaged over
SEGMENT_TOKENS = {"cpu": 2048, "cuda": 8192}  # of a segment, unless a window determines it
MAX_WHOLE_SEGMENTS = 4  # a text of no more segments is always read whole
MAX_ROUNDS = 25
PATIENCE = 10  # work that takes this many times `seconds` is timed once, and longer texts are interpolated
# Numbers that the backward pass finds stored, in units of the hidden size, per token and block. Measured with the tiny
# presets, where attention stores 29 to 45 and the other mixers 57 to 90.
STORED_FOR_BACKWARD = {"attention": 50, "other": 100}


class LatencyRow(TypedDict):
    """Microseconds per token of one system at one context; None for what does not fit into memory or was not timed."""

    system: str
    context: int
    prefill_us: float | None
    decode_us: float | None
    train_us: float | None
    whole: bool  # whether prefill was timed over the whole text; otherwise it is interpolated


class Setup(NamedTuple):
    """How everything is timed."""

    device: torch.device
    dtype: torch.dtype
    seconds: float  # for each figure
    memory: float  # bytes that may be filled


Timer = Callable[[], float]  # does the work once and returns seconds per token


def measure(
    models: Mapping[str, ModelConfig],
    context: int,
    *,
    seconds: float,
    device: torch.device,
    dtype: str = "float32",
    train: bool = True,
) -> list[LatencyRow]:
    """Time every system at one context.

    Args:
        models: The systems' models by name.
        context: Length of the text in tokens.
        seconds: How long each figure is timed. Reading the whole text may take ten times that.
        device: What is timed. On a CPU, what needs more memory than is free is left out; on a GPU it is tried alone.
        dtype: Of the matrix products.
        train: Whether training is timed, too.
    """
    times: dict[tuple[str, str], float] = {}
    for make_timers, needed_bytes in ((_reading, reading_bytes), (_training, training_bytes))[: 1 + train]:
        setup = Setup(device, getattr(torch, dtype), seconds, 0.8 * free_memory(device))
        needs = {name: needed_bytes(config, context, setup) for name, config in models.items()}
        for group in group_by_memory(needs, setup.memory, try_all=device.type != "cpu"):
            made = {name: partial(make_timers, models[name], context, setup) for name in group}
            timers: dict[tuple[str, str], Timer] = {
                (name, figure): timer
                for name, make in made.items()
                for figure, timer in (_none_if_out_of_memory(make) or {}).items()
            }
            times |= take_turns(timers, seconds)
            del timers
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    rows: list[LatencyRow] = []
    for name in models:
        us = {figure: 1e6 * value for (system, figure), value in times.items() if system == name}
        rows.append(
            {
                "system": name,
                "context": context,
                "prefill_us": us.get("prefill", us.get("interpolated")),
                "decode_us": us.get("decode"),
                "train_us": us.get("train"),
                "whole": "interpolated" not in us,
            }
        )
    return rows


def group_by_memory(needs: Mapping[str, float], memory: float, try_all: bool) -> list[list[str]]:
    """The names that take turns together: all, if they fit into `memory`, or else each alone that fits.

    try_all: whether a name is tried that does not fit alone.
    """
    if sum(needs.values()) <= memory:
        return [list(needs)]
    return [[name] for name, need in needs.items() if need <= memory or try_all]


def take_turns(timers: dict[tuple[str, str], Timer], seconds: float) -> dict[tuple[str, str], float]:
    """The median time of each timer, which run in turn in every round. Those that run out of memory are left out.

    The first round warms up. A timer that took longer than `PATIENCE` times `seconds` there is run once more; any other
    at least three times, and until `seconds` are spent.
    """
    times: dict[tuple[str, str], list[float]] = {}
    min_rounds: dict[tuple[str, str], int] = {}
    spent = dict.fromkeys(timers, 0.0)
    for key, timer in timers.items():
        started = time.perf_counter()
        if _none_if_out_of_memory(timer) is not None:
            times[key], min_rounds[key] = [], 3 if time.perf_counter() - started <= PATIENCE * seconds else 1
    for i in range(MAX_ROUNDS):
        for key, own in times.items():
            if i < min_rounds[key] or spent[key] < seconds:
                started = time.perf_counter()
                own.append(timers[key]())
                spent[key] += time.perf_counter() - started
    return {key: statistics.median(own) for key, own in times.items()}


def _none_if_out_of_memory(work: Callable[[], Any]) -> Any:
    """The result of `work`; None if it ran out of memory."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        messages = ("out of memory", "can't allocate memory")  # PyTorch's, on a GPU and on a CPU
        if isinstance(error, RuntimeError) and not any(message in str(error).lower() for message in messages):
            raise
        return None


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The time that `work` takes, until the device has done it."""
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


# -- memory ------------------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> float:
    """Bytes that are free on the device; half of a CPU's memory if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def reading_bytes(config: ModelConfig, context: int, setup: Setup, chunk_size: int | None = None) -> float:
    """About what reading takes, `chunk_size` tokens at a time (None: a segment).

    Weights, activations, and three times the state: the old one, the new one, and keys beside the queries that they are
    cut from.
    """
    item, tokens = setup.dtype.itemsize, chunk_size or min(segment_tokens(config, setup.device), context)
    seen = context if "full" in config.mixers else 2 * config.sliding_window
    mask = 0 if setup.device.type == "cuda" or tokens >= context else 2 * item * tokens * min(seen, context)
    return (
        item * (parameters(config) + tokens * (12 * config.hidden_size + 4 * config.intermediate_size))
        + 12 * fast_weights(config)
        + 3 * state_bytes(config, context, item)
        + mask
    )


def training_bytes(config: ModelConfig, context: int, setup: Setup) -> float:
    """About what a training step takes: weights, gradients, what is stored for the backward pass, and a suffix's states
    between mini-batches."""
    kind = "attention" if {*config.mixers} <= {"full", "window"} else "other"
    stored = STORED_FOR_BACKWARD[kind] * config.hidden_size * config.num_hidden_layers * context
    states = context // (config.mini_batch_size or context) if config.suffix_layers else 0
    item = setup.dtype.itemsize
    return 16 * parameters(config) + item * stored + states * state_bytes(config, context, item)


# -- the work that is timed --------------------------------------------------------------------------------------------


def segment_tokens(config: ModelConfig, device: torch.device) -> int:
    """Length of a segment: the window, if there is one, in whole mini-batches."""
    windowed = {"window", "ttt-kvb", "titans"} & {*config.mixers}
    b = config.mini_batch_size or 1
    return -(-(config.sliding_window if windowed else SEGMENT_TOKENS[device.type]) // b) * b


class RandomReading:
    """A model with random weights, and a random text of `context` tokens that it can read or write after."""

    def __init__(self, config: ModelConfig, context: int, setup: Setup) -> None:
        self.setup, self.context = setup, context
        self.model, self.tokens_1T = make_random(config, context, setup.device)
        self.model.requires_grad_(False)
        weights = dict(self.model.named_parameters())
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        hold_in(setup.dtype, (weights[name] for name in product_matrices(config, shapes)))
        self.learns = bool(self.model.suffix)
        self.segment = segment_tokens(config, setup.device)
        self.whole_fits = self.learns or reading_bytes(config, context, setup, context) <= setup.memory
        at_once = context if self.whole_fits else self.segment
        self.chunk_size = (config.mini_batch_size if self.learns else None) or at_once

    def start(self) -> ReadState:
        """The state before the text."""
        return start_reading(self.model, 1, self.setup.dtype)

    @torch.no_grad()
    def read(self, state: ReadState, stop: int, chunk_size: int | None = None) -> ReadState:
        """Read up to token `stop`, `chunk_size` tokens at a time (None: as the whole text is read)."""
        model, dtype = self.model, self.setup.dtype
        chunk_size = self.chunk_size if chunk_size is None or self.learns else chunk_size
        x_1TD: Tensor | None = None
        while state.position < stop:
            first, last = state.position, min(state.position + chunk_size, stop)
            ids_1T = self.tokens_1T[:, first:last]
            if self.learns:
                targets_1T = self.tokens_1T[:, first + 1 : last + 1]
                state, _, _ = read_mini_batch(model, state, ids_1T, targets_1T, dtype=dtype)
            else:
                positions = model.positions(first, last - first, dtype)
                x_1TD, static = model.forward_prefix(ids_1T, positions, state.static, dtype)
                state = state._replace(position=last, static=static)
        if x_1TD is not None:
            model.logits(x_1TD[:, -1:])
        return state

    def enlarge(self, state: ReadState, position: int) -> ReadState:
        """`state`, from after a segment or more, with the size that it has at `position`."""

        def grow(cache: KVCache) -> KVCache:
            batch, heads, _, head_dim = cache.k_BGSK.shape
            return KVCache(*(cache.k_BGSK.new_empty(batch, heads, position, head_dim).normal_() for _ in range(2)))

        assert state.static is not None
        states = zip(self.model.config.mixers, (*state.static, *state.loop.caches), strict=True)
        grown = tuple(grow(value) if mixer == "full" else value for mixer, value in states)
        count = len(state.static)
        return ReadState(position, grown[:count], state.loop._replace(caches=grown[count:]))

    def time_whole(self) -> float:
        """Seconds per token to read the whole text."""
        return seconds_of(lambda: self.read(self.start(), self.context), self.setup.device) / self.context

    def time_segments(self, after_first: ReadState) -> float:
        """Seconds per token to read the text, from four segments: the first, and the next, middle and last of the rest.

        By the trapezoidal rule, which is exact where the time grows linearly. after_first: the state after the first.
        """
        size, device = self.segment, self.setup.device
        first = seconds_of(lambda: self.read(self.start(), size, size), device)
        later = []
        for position in (size, self.context // 2, self.context - size):
            state = self.enlarge(after_first, position)
            later.append(seconds_of(partial(self.read, state, position + size, size), device))
            del state
        mean = (later[0] + 2 * later[1] + later[2]) / 4
        return (first + mean * (self.context - size) / size) / self.context

    @torch.no_grad()
    def write(self, state: ReadState) -> None:
        """Write `WRITTEN_TOKENS` tokens, always the likeliest."""
        ids_11 = self.tokens_1T[:, -1:]
        for _ in range(WRITTEN_TOKENS):
            logits_11V, state = forward(self.model, state, ids_11, self.setup.dtype)
            ids_11 = logits_11V.argmax(-1)


def _reading(config: ModelConfig, context: int, setup: Setup) -> dict[str, Timer]:
    """Timers of reading a text, whole or interpolated, and of writing after it."""
    reading = RandomReading(config, context, setup)
    timers: dict[str, Timer] = {"prefill": reading.time_whole}
    if context <= MAX_WHOLE_SEGMENTS * reading.segment:
        at_end = reading.read(reading.start(), context)
    else:
        after_first = reading.read(reading.start(), reading.segment, reading.segment)
        at_end = reading.enlarge(after_first, context)
        if not reading.whole_fits or reading.time_segments(after_first) * context > PATIENCE * setup.seconds:
            timers = {"interpolated": lambda: reading.time_segments(after_first)}
    timers["decode"] = lambda: seconds_of(lambda: reading.write(at_end), setup.device) / WRITTEN_TOKENS
    return timers


def _training(config: ModelConfig, context: int, setup: Setup) -> dict[str, Timer]:
    """The timer of loss and backward pass."""
    model, tokens_1T = make_random(config, context, setup.device)

    def step() -> None:
        sequence_loss(model, tokens_1T, activation_checkpointing="mini-batch", dtype=setup.dtype).loss.backward()
        model.zero_grad()

    return {"train": lambda: seconds_of(step, setup.device) / context}


def make_random(config: ModelConfig, context: int, device: torch.device) -> tuple[Transformer, Tensor]:
    """A model with random weights, drawn on the device, and a row of random tokens, [1, context + 1]."""
    with device:
        model = Transformer(config, torch.Generator(device).manual_seed(SEED))
    generator = torch.Generator().manual_seed(SEED)
    return model, torch.randint(config.vocab_size, (1, context + 1), generator=generator).to(device)
