"""Time per token of every system, on one machine: to take in a text, to write after it, to train on it.

Weights and tokens are random, there is one sequence, and the systems take turns, round after round; figures are
medians. Nothing is compiled. The matrices are in the dtype that is asked for, those of fast MLPs in float32, as are all
of them in training.

Prefill is what comes before the first word of an answer. A model that learns reads mini-batch by mini-batch, as a
session does, and computes every token's loss, since it learns from them. Every other one reads the whole text in one
call and computes the logits of the last token only: the least that it can. Where that would take longer than it may, or
more memory than there is, some stretches of the text are read instead: its start, and three at later positions, with
states of their true size (a cache of all tokens is filled with random keys and values). A stretch is a window, or some
thousand tokens where there is none. Between them time is taken to grow linearly, which is what attention over all
tokens does; where the state stays as large, it does not grow. A stretch of a standard model is one piece of a longer
text, which costs attention on a CPU two to three times what it costs in one call: there the interpolated figures of
full attention are above those that are not, and no ratio should be taken between the two kinds.

Decoding is one token after the text. Nothing is learned from it, but a memory (TTT-KVB, Titans) trains at the end of
every mini-batch that it writes; that is left out. Spread over the tokens, it is less than prefill takes for one.

Training is loss and backward, through the inner updates where there are any, with `recompute="mini-batch"`.

Shapes: B = 1 sequence, T tokens, D width, V vocabulary.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import DTYPES
from ttt_e2e.inference.streaming import ReadState, forward, read_mini_batch, start_reading
from ttt_e2e.inner_loop.step import State, sequence_loss
from ttt_e2e.model.cost import fast_weights, in_tokens, parameters, state_bytes
from ttt_e2e.model.mixers.attention import Attention, Cache
from ttt_e2e.model.transformer import Block, Transformer
from ttt_e2e.training.parallelize import choose_device

SEED = 0
WRITTEN = 16  # tokens, one after the other, that decoding is timed over
STRETCH = {"cpu": 2048, "cuda": 8192}  # tokens of a stretch where no window says it
SHORT = 4  # up to so many stretches a text is always read as a whole
ROUNDS = 25  # at most
PATIENCE = 10  # what takes so many times `seconds` is timed once
# For training, the numbers that the backward pass finds stored, in widths per token and block: measured with the tiny
# presets, where attention stores 29 to 45 and the other mixers 57 to 90.
STORED = {"attention": 50, "other": 100}


class LatencyRow(NamedTuple):
    """Microseconds per token of one system at one context; None for what does not fit or was not asked for.

    whole: whether prefill was timed over the whole text, or interpolated.
    """

    system: str
    context: int
    prefill_us: float | None
    decode_us: float | None
    train_us: float | None
    whole: bool = True


class Setting(NamedTuple):
    """Where and how everything is timed. room: bytes that may be filled."""

    device: torch.device
    dtype: torch.dtype
    seconds: float
    room: float


Timer = Callable[[], float]  # does the work once; returns seconds per token


def measure(
    configs: dict[str, ModelConfig],
    contexts: list[int],
    *,
    seconds: float = 1.0,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    train: bool = True,
    progress: bool = True,
) -> list[LatencyRow]:
    """A row for every system (a name and its configuration) at every context.

    seconds: for how long each figure is timed again; ten times that is what a reading of the whole text may take.
    threads: of the CPU; None leaves them as they are. train: whether training is timed. What needs more memory than is
    free is left out (on a GPU it is tried, alone). Raises UserError for values out of range, unknown dtypes and devices
    that are not there.
    """
    if not configs or not contexts or min(contexts) < 1 or seconds <= 0 or (threads is not None and threads < 1):
        raise UserError(
            f"Latency needs systems ({len(configs)}), contexts of at least one token ({contexts}), a positive number "
            f"of seconds ({seconds}) and of threads ({threads})."
        )
    if dtype not in DTYPES:
        raise UserError(f"There is no dtype {dtype!r}; choose one of: {', '.join(DTYPES)}.")
    chosen, before = choose_device(device), torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    rows = []
    try:
        with tqdm(total=len(contexts) * len(configs) * (1 + train), disable=not progress, desc="timing") as bar:
            for context in contexts:
                found: dict[tuple[str, str], float] = {}
                for work in (_reading, _training)[: 1 + train]:
                    setting = Setting(chosen, DTYPES[dtype], seconds, 0.8 * free_memory(chosen))
                    found |= _measure(work, configs, context, setting, bar)
                for name in configs:
                    figures = [found.get((name, what)) for what in ("prefill", "sampled", "decode", "train")]
                    prefill, sampled, decode, training = (None if f is None else 1e6 * f for f in figures)
                    whole = sampled is None
                    rows.append(LatencyRow(name, context, prefill if whole else sampled, decode, training, whole))
    finally:
        torch.set_num_threads(before)
    return rows


def _measure(
    work: Callable[[ModelConfig, int, Setting], dict[str, Timer]],
    configs: dict[str, ModelConfig],
    context: int,
    setting: Setting,
    bar: tqdm,
) -> dict[tuple[str, str], float]:
    """Time `work` of every system, together with as many others as memory has room for."""
    need_of = reading_bytes if work is _reading else training_bytes
    needs = {name: need_of(config, context, setting) for name, config in configs.items()}
    found: dict[tuple[str, str], float] = {}
    together = groups(needs, setting.room, setting.device.type != "cpu")
    bar.update(len(configs) - sum(map(len, together)))
    for group in together:
        timers: dict[tuple[str, str], Timer] = {}
        for name in group:
            bar.set_postfix_str(f"{name} at {in_tokens(context)}")
            made = _unless_out_of_memory(partial(work, configs[name], context, setting))
            timers |= {(name, what): timer for what, timer in (made or {}).items()}
        found |= take_turns(timers, setting.seconds)
        del timers
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
        bar.update(len(group))
    return found


def groups(needs: dict[str, float], room: float, try_all: bool) -> list[list[str]]:
    """Names in groups that need at most `room` together, in their order.

    What needs more by itself stands alone if `try_all`, else it is left out.
    """
    made: list[list[str]] = []
    used = room
    for name, need in needs.items():
        if need > room and not try_all:
            continue
        if used + need > room:
            made.append([])
            used = 0.0
        made[-1].append(name)
        used += need
    return made


def take_turns(timers: dict[tuple[str, str], Timer], seconds: float) -> dict[tuple[str, str], float]:
    """The median time of each, one after the other in every round; those that ran out of memory are left out.

    The first round warms up. What took longer than `PATIENCE` times `seconds` in it is timed once more; everything else
    three times at least, and until `seconds` are spent.
    """
    found: dict[tuple[str, str], list[float]] = {}
    least: dict[tuple[str, str], int] = {}
    spent = dict.fromkeys(timers, 0.0)
    for key, timer in timers.items():
        started = time.perf_counter()
        if _unless_out_of_memory(timer) is not None:
            found[key], least[key] = [], 3 if time.perf_counter() - started <= PATIENCE * seconds else 1
    for done in range(ROUNDS):
        for key, times in found.items():
            if done < least[key] or spent[key] < seconds:
                started = time.perf_counter()
                times.append(timers[key]())
                spent[key] += time.perf_counter() - started
    return {key: statistics.median(times) for key, times in found.items()}


def _unless_out_of_memory(work: Callable[[], Any]) -> Any:
    """What `work` returns; None if it ran out of memory."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        words = ("out of memory", "can't allocate memory")  # PyTorch's, on a GPU and on a CPU
        if isinstance(error, RuntimeError) and not any(word in str(error).lower() for word in words):
            raise
        return None


def clock(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


# -- memory ------------------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> float:
    """Bytes that are free on the device; for a CPU whose system does not say, half of all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def reading_bytes(config: ModelConfig, context: int, setting: Setting, at_once: int | None = None) -> float:
    """About what reading takes, `at_once` tokens at a time (None: a stretch): weights, state, what is computed of it.

    The state counts three times: what comes out beside what went in, and keys beside the queries they are cut from.
    """
    item, tokens = setting.dtype.itemsize, at_once or min(stretch(config, setting.device), context)
    seen = context if "full" in config.mixers else 2 * config.sliding_window
    mask = 0 if setting.device.type == "cuda" or tokens >= context else 2 * item * tokens * min(seen, context)
    return (
        item * (parameters(config) + tokens * (12 * config.hidden_size + 4 * config.intermediate_size))
        + 12 * fast_weights(config)
        + 3 * state_bytes(config, context, item)
        + mask
    )


def training_bytes(config: ModelConfig, context: int, setting: Setting) -> float:
    """About what a step of training takes: weights, gradients, what the backward pass needs.

    A suffix adds its state at every border between mini-batches.
    """
    kind = "attention" if {*config.mixers} <= {"full", "window"} else "other"
    stored = setting.dtype.itemsize * STORED[kind] * config.hidden_size * config.num_hidden_layers * context
    borders = context // (config.mini_batch_size or context) if config.suffix_layers else 0
    states = borders * state_bytes(config, context, setting.dtype.itemsize)
    return 16 * parameters(config) + stored + states


# -- the work ----------------------------------------------------------------------------------------------------------


def stretch(config: ModelConfig, device: torch.device) -> int:
    """How many tokens are read where only some are: a window, in whole mini-batches."""
    windowed = {"window", "ttt-kvb", "titans"} & {*config.mixers}
    b = config.mini_batch_size or 1
    return -(-(config.sliding_window if windowed else STRETCH[device.type]) // b) * b


class Reader:
    """A model with random weights, before a random text of `context` tokens."""

    def __init__(self, config: ModelConfig, context: int, setting: Setting) -> None:
        self.setting, self.context = setting, context
        self.model = make_model(config, setting.device).requires_grad_(False)
        learned = {id(p) for block in self.model.suffix for p in block.fast.parameters()}
        for parameter in self.model.parameters():
            if parameter.dim() > 1 and id(parameter) not in learned:
                parameter.data = parameter.data.to(setting.dtype)
        self.tokens_1T = random_tokens(config, context + 1, setting.device)
        self.learns = bool(self.model.suffix)
        self.stretch = stretch(config, setting.device)
        self.whole_fits = self.learns or reading_bytes(config, context, setting, context) <= setting.room
        at_once = context if self.whole_fits else self.stretch
        self.piece = config.mini_batch_size or at_once if self.learns else at_once

    def start(self) -> ReadState:
        """The state before the text."""
        return start_reading(self.model, 1, self.setting.dtype)

    @torch.no_grad()
    def read(self, state: ReadState, stop: int, piece: int | None = None) -> ReadState:
        """Read on up to token `stop`, `piece` tokens at a time (None: as the whole text is read)."""
        model, dtype = self.model, self.setting.dtype
        x_1TD: Tensor | None = None
        while state.position < stop:
            first, last = state.position, min(state.position + (piece or self.piece), stop)
            ids_1T = self.tokens_1T[:, first:last]
            if self.learns:
                targets_1T = self.tokens_1T[:, first + 1 : last + 1]
                state, _, _ = read_mini_batch(model, state, ids_1T, targets_1T, dtype=dtype)
            else:
                x_1TD, static = model.forward_prefix(
                    ids_1T, model.place(first, last - first, dtype), state.static, dtype
                )
                state = ReadState(last, static, state.loop)
        if x_1TD is not None:
            model.logits(x_1TD[:, -1:])
        return state

    def state_at(self, after: ReadState, position: int) -> ReadState:
        """A state of the size that it has at `position`, made of the one `after` a stretch at least."""

        def grown(block: Block, state: Any) -> Any:
            if not isinstance(block.mixer, Attention) or block.mixer.window is not None:
                return state
            batch, heads, _, width = state.k_BGSK.shape
            like = dict(dtype=state.k_BGSK.dtype, device=state.k_BGSK.device)
            return Cache(*(torch.randn(batch, heads, position, width, **like) for _ in range(2)))

        model = self.model
        assert after.static is not None
        below, above = [*model.prefix, *model.suffix[:1]], model.suffix[1:]
        static = tuple(grown(*pair) for pair in zip(below, after.static, strict=True))
        caches = tuple(grown(*pair) for pair in zip(above, after.loop.caches, strict=True))
        return ReadState(position, static, State(after.loop.fast, caches))

    def whole(self) -> float:
        """Seconds per token to read the whole text."""
        return clock(lambda: self.read(self.start(), self.context), self.setting.device) / self.context

    def sampled(self, after: ReadState) -> float:
        """The same from four stretches: the first, and the next, the middle and the last one of the rest.

        after: the state after the first. By the trapezoidal rule, exact where time grows linearly.
        """
        size, device = self.stretch, self.setting.device
        piece = self.piece if self.learns else size
        first = clock(lambda: self.read(self.start(), size, piece), device)
        later = []
        for position in (size, self.context // 2, self.context - size):
            state = self.state_at(after, position)
            later.append(clock(partial(self.read, state, position + size, piece), device))
            del state
        mean = (later[0] + 2 * later[1] + later[2]) / 4
        return (first + mean * (self.context - size) / size) / self.context

    @torch.no_grad()
    def write(self, state: ReadState) -> None:
        """Write `WRITTEN` tokens, always the likeliest."""
        ids_11 = self.tokens_1T[:, -1:]
        for _ in range(WRITTEN):
            logits_11V, state = forward(self.model, state, ids_11, self.setting.dtype)
            ids_11 = logits_11V.argmax(-1)


def _reading(config: ModelConfig, context: int, setting: Setting) -> dict[str, Timer]:
    """Prefill, whole or sampled, and decoding after it."""
    reader = Reader(config, context, setting)
    if context <= SHORT * reader.stretch:
        at_end, prefill = reader.read(reader.start(), context), {"prefill": reader.whole}
    else:
        after = reader.read(reader.start(), reader.stretch, reader.piece if reader.learns else reader.stretch)
        at_end = reader.state_at(after, context)
        if reader.whole_fits and reader.sampled(after) * context <= PATIENCE * setting.seconds:
            prefill = {"prefill": reader.whole}
        else:
            prefill = {"sampled": lambda: reader.sampled(after)}
    return prefill | {"decode": lambda: clock(lambda: reader.write(at_end), setting.device) / WRITTEN}


def _training(config: ModelConfig, context: int, setting: Setting) -> dict[str, Timer]:
    """Loss and backward."""
    model = make_model(config, setting.device)
    tokens_1T = random_tokens(config, context + 1, setting.device)

    def step() -> None:
        sequence_loss(model, tokens_1T, activation_checkpointing="mini-batch", dtype=setting.dtype).loss.backward()
        model.zero_grad()

    return {"train": lambda: clock(step, setting.device) / context}


def make_model(config: ModelConfig, device: torch.device) -> Transformer:
    """A model with random weights, drawn on its device."""
    with device:
        return Transformer(config, torch.Generator(device).manual_seed(SEED))


def random_tokens(config: ModelConfig, count: int, device: torch.device) -> Tensor:
    """One row of random tokens, [1, count]."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(config.vocab_size, (1, count), generator=generator).to(device)
