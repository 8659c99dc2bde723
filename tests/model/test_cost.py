"""What is counted from a configuration, against models that are built and run under PyTorch's own counter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import GEMMA, make_config, small_config, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ttt_e2e.config.presets import PRESETS
from ttt_e2e.config.schema import MIXERS, ActivationCheckpointing, ModelConfig, TrainConfig
from ttt_e2e.errors import UserError
from ttt_e2e.inference.streaming import forward, read_mini_batch, start_reading
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.cost import cost, operations, parameters, state_bytes, table
from ttt_e2e.model.counting import KEPT_GRAPHS
from ttt_e2e.model.trainable import set_trainable
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.ops import tuning
from ttt_e2e.ops.attention import inner_loop_attention

SUFFIXES = {
    "plain": {},
    "grouped heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "untied head": {"tie_word_embeddings": False},
    "no norms": {"pre_norm": False, "post_norm": False, "qk_norm": False},
    "full attention": {"pattern": ("full",)},
    "one suffix block, learned rates": {"suffix_layers": 1, "inner_loop.learned_lr": True},
    "all suffix": {"suffix_layers": 4},
    "no static MLP": {"static_mlp": False},
    "window no multiple of b": {"sliding_window": 7},
    "full below": {"pattern": ("full", "full", "full", "window"), "suffix_layers": 1},
    "wide heads and biases": {"head_dim": 6, "attention_bias": True, "attention_out_bias": True},
    "widths of their own": {"fast_intermediate_size": 10, "suffix_intermediate_size": 14},
    "fast width alone": {"fast_intermediate_size": 10, "static_mlp": False},
    "parallel MLPs": {"parallel_mlp": True, "fast_intermediate_size": 10, "suffix_intermediate_size": 14},
    "one parallel block": {"parallel_mlp": True, "suffix_layers": 1, "suffix_intermediate_size": 14},
    "as in Gemma": {**GEMMA, "attn_logit_softcapping": None},
    "low rank, learned rates": {"fast_rank": 3, "inner_loop.learned_lr": True},
    "low rank, no static MLP": {"fast_rank": 3, "fast_intermediate_size": 10, "static_mlp": False, "suffix_layers": 1},
    "low rank, parallel MLPs": {
        "fast_rank": 2,
        "parallel_mlp": True,
        "fast_intermediate_size": 10,
        "suffix_intermediate_size": 14,
    },
}
STANDARDS: dict[str, dict] = {
    "standard": {"suffix_layers": 0, "mini_batch_size": None},
    "standard, full attention": {"suffix_layers": 0, "mini_batch_size": None, "pattern": ("full",)},
}
SHAPES = {**SUFFIXES, **STANDARDS}
LENGTHS = [3, 5, 18, 20]  # less than a mini-batch, one, and several with a rest and without


def tokens(length: int) -> Tensor:
    return torch.randint(50, (1, length), generator=torch.Generator().manual_seed(0))


class Counter(TorchDispatchMode):
    """PyTorch's counts of operations, without its `FlopCounterMode`, whose hooks do not bear the recomputed loop."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = torch.ops.aten.baddbmm if func is torch.ops.aten.baddbmm_.default else func._overloadpacket
        if packet in flop_registry and "convolution" not in str(packet):
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def counted(run: Callable[[], object]) -> int:
    """Operations of the matrix products in `run`."""
    with Counter() as counter:
        run()
    return counter.total


@pytest.fixture(autouse=True)
def whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and head by whole matrices, which the counter sees. `unseen` says what is too much in that."""
    monkeypatch.setitem(tuning.KEPT_SCORES, "meta", 2**40)
    monkeypatch.setattr("ttt_e2e.ops.tuning.KEPT_LOGITS", 2**40)
    for module in ("attention", "titans"):
        monkeypatch.setattr(f"ttt_e2e.model.mixers.{module}.sdpa", lambda *args: inner_loop_attention(*args)[0])


def unseen(pieces: list[int], window: int | None) -> tuple[int, int]:
    """Entries that no query sees in the matrices of every piece's queries and keys, cached ones first.

    The second number is that of the keys of the piece alone.
    """
    of_all = of_own = start = 0
    for length in pieces:
        cached = start if window is None else min(start, window)
        for i in range(length):
            seen = start + i + 1 if window is None else min(start + i + 1, window)
            of_all += cached + length - seen
            of_own += length - min(i + 1, seen)
        start += length
    return of_all, of_own


def unseen_below(config: ModelConfig, pieces: list[int]) -> int:
    """Operations for such entries in a text that all mixers below the loop are given in these pieces."""
    entries = 0
    for mixer in config.mixers[: config.prefix_layers + 1]:
        if mixer in ("full", "window", "ttt-kvb", "window+gated-deltanet"):
            entries += unseen(pieces, None if mixer == "full" else config.sliding_window)[0]
        if mixer == "titans":  # two keys a token, and it walks by mini-batches
            position = 0
            for piece in pieces:
                for length in cut(position, piece, config.mini_batch_size):
                    entries += length * (length - 1)
                position += piece
    return 2 * entries * entry(config)


def unseen_inside(config: ModelConfig, pieces: list[int], learned: int) -> int:
    """The same of the attentions in the loop, and of the inner gradients of the first `learned` pieces."""
    entries = 0
    for _ in range(config.suffix_layers - 1):
        entries += 2 * unseen(pieces, config.loop_window)[0]
        entries += 2 * sum(unseen(pieces[:learned], config.loop_window))
    return entries * entry(config)


def entry(config: ModelConfig) -> int:
    """Operations for an entry of one of attention's matrix products, in all heads."""
    return 2 * config.num_attention_heads * config.head_dim


def cut(start: int, length: int, piece: int | None) -> list[int]:
    """`length` tokens from position `start`, in pieces that end at multiples of `piece`."""
    pieces = []
    while length:
        pieces.append(length if piece is None else min(length, piece - start % piece))
        start, length = start + pieces[-1], length - pieces[-1]
    return pieces


# -- parameters and state ----------------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    layers, head_width = draw(st.integers(1, 5)), 2 * draw(st.integers(1, 4))
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    suffix = draw(st.integers(0, layers))
    inside = draw(st.sampled_from(["full", "window"]))
    names = draw(st.lists(st.sampled_from(MIXERS), min_size=layers, max_size=layers))
    names = [name if i <= layers - suffix else inside for i, name in enumerate(names)]
    b = draw(st.integers(1, 4))
    attentions, static = {"full", "window"} >= {*names}, draw(st.booleans())
    return make_config(
        vocab_size=draw(st.integers(1, 60)),
        hidden_size=heads * head_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([None, 1, heads])),
        intermediate_size=draw(st.integers(1, 20)),
        suffix_layers=suffix,
        pattern=tuple(names),
        static_mlp=static,
        parallel_mlp=static and draw(st.booleans()),
        fast_intermediate_size=draw(st.sampled_from([None, 7])),
        suffix_intermediate_size=draw(st.sampled_from([None, 5])),
        fast_rank=draw(st.sampled_from([None, 1, 3])),
        head_dim=draw(st.sampled_from([None, 6])) if attentions else None,
        attention_bias=attentions and draw(st.booleans()),
        attention_out_bias=attentions and draw(st.booleans()),
        rope_pattern=draw(st.sampled_from([(True,), (False, True)])) if attentions else (True,),
        sliding_window=b * draw(st.integers(1, 4)),
        attention_sink="window" in names and draw(st.booleans()),
        mini_batch_size=b,
        qk_norm=(qk_norm := draw(st.booleans())),
        qk_norm_joint=qk_norm and attentions and draw(st.booleans()),
        pre_norm=draw(st.booleans()),
        post_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        mamba2__expand=draw(st.integers(1, 3)),
        mamba2__state_size=draw(st.integers(1, 9)),
        mamba2__n_groups=draw(st.sampled_from([1, heads])),
        mamba2__conv_kernel=draw(st.integers(1, 5)),
        memory__intermediate_size=draw(st.sampled_from([None, 3])),
        memory__num_persistent_tokens=draw(st.integers(0, 3)),
    )


def built(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets(name: str) -> None:
    assert parameters(PRESETS[name].model) == built(PRESETS[name].model)


@settings(max_examples=50, deadline=None)
@given(configs())
def test_parameters(config: ModelConfig) -> None:
    assert parameters(config) == built(config)


@settings(max_examples=50, deadline=None)
@given(configs(), st.integers(1, 30), st.sampled_from([torch.float32, torch.bfloat16]))
def test_state_bytes(config: ModelConfig, length: int, dtype: torch.dtype) -> None:
    model, text = Transformer(config), tokens(length) % config.vocab_size
    _, state = forward(model, start_reading(model, 1), text, dtype)
    tensors = [t for value in (*(state.static or ()), *state.loop.fast, *state.loop.caches) for t in value]
    measured = sum(t.numel() * t.element_size() for t in tensors)
    assert state_bytes(config, length, dtype.itemsize) == measured + emptied(config, length, dtype.itemsize)


def emptied(config: ModelConfig, length: int, dtype_bytes: int) -> int:
    """What segments and mini-batches held at their fullest, beyond what they hold after `length` tokens."""
    b, missing = config.mini_batch_size or 1, 0
    for mixer in config.mixers:
        if mixer in ("ttt-kvb", "titans"):
            figures = 1 if mixer == "ttt-kvb" else 3
            token = 2 * config.hidden_size * dtype_bytes + 4 * figures * config.num_attention_heads
            missing += (min(length, b) - length % b) * token
        if mixer == "titans":
            missing += (
                (min(length, config.sliding_window) - length % config.sliding_window)
                * 4
                * config.hidden_size
                * dtype_bytes
            )
    return missing


# -- operations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "mini-batch"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_training(shape: str, length: int, recompute: ActivationCheckpointing) -> None:
    config, model, text = small_config(**SHAPES[shape]), small_model(**SHAPES[shape]), tokens(length + 1)
    count = counted(lambda: sequence_loss(model, text, activation_checkpointing=recompute).loss.backward())
    expected, pieces = operations(config, length), cut(0, length, config.mini_batch_size)
    total = expected.training
    count -= 3 * (unseen_below(config, [length]) + unseen_inside(config, pieces, len(pieces) - 1))
    if recompute == "mini-batch":
        total = expected.training_recomputed
        again = max(0, len(pieces) - KEPT_GRAPHS)
        count -= unseen_inside(config, pieces[:again], again)
    assert count == round(total * length)


@pytest.mark.parametrize("shape", [name for name in SUFFIXES if name != "no norms"])
@pytest.mark.parametrize(("recompute", "learn"), [("none", True), ("mini-batch", True), ("none", False)])
def test_training_with_a_frozen_prefix(shape: str, recompute: ActivationCheckpointing, learn: bool) -> None:
    """Norms are there: without, the lowest MLPs' inputs would need no gradient either."""
    config, model, text = small_config(**SUFFIXES[shape]), small_model(**SUFFIXES[shape]), tokens(24)
    set_trainable(model, TrainConfig(trainable="suffix"))
    options = {"learn": learn, "activation_checkpointing": recompute, "prefix_frozen": True}
    count = counted(lambda: sequence_loss(model, text, **options).loss.backward())
    pieces = cut(0, 23, config.mini_batch_size) if learn else [23]
    learned = len(pieces) - 1
    expected = operations(config, 23, "meta" if learn else "pretrain", prefix_frozen=True)
    total = expected.training if recompute == "none" else expected.training_recomputed
    wasted = unseen_below(config, [23]) + 3 * unseen_inside(config, pieces, learned)
    if recompute != "none":
        again = max(0, len(pieces) - KEPT_GRAPHS)
        wasted += unseen_inside(config, pieces[:again], again)
    assert count - wasted == round(total * 23)


@pytest.mark.parametrize("shape", SUFFIXES)
def test_training_without_learning(shape: str) -> None:
    config, model, text = small_config(**SHAPES[shape]), small_model(**SHAPES[shape]), tokens(24)
    count = counted(lambda: sequence_loss(model, text, learn=False).loss.backward())
    expected = operations(config, 23, train_mode="pretrain")
    count -= 3 * (unseen_below(config, [23]) + unseen_inside(config, [23], 0))
    assert count == round(expected.training * 23) == round(expected.training_recomputed * 23)
    assert expected.prefill == operations(config, 23).prefill


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_and_decoding(shape: str, length: int) -> None:
    config, model, text = small_config(**SHAPES[shape]), small_model(**SHAPES[shape]), tokens(length + 1)
    pieces, whole, state = (
        cut(0, length, config.mini_batch_size),
        length // (config.mini_batch_size or 99),
        start_reading(model, 1),
    )

    def prefill() -> None:
        nonlocal state
        for ids, targets in zip(text[:, :-1].split(pieces, 1), text[:, 1:].split(pieces, 1), strict=True):
            learn = ids.shape[1] == config.mini_batch_size
            state, _, _ = read_mini_batch(model, state, ids, targets, learn=learn)

    def wasted(pieces: list[int], whole: int = 0) -> int:
        return unseen_below(config, pieces) + unseen_inside(config, pieces, whole)

    expected = operations(config, length)
    assert counted(prefill) - wasted(pieces, whole) == round(expected.prefill * length)
    token = counted(lambda: forward(model, state, text[:, -1:])) - (wasted([*pieces, 1]) - wasted(pieces))
    assert token == expected.decoding


MIXED = {
    "mamba2": {},
    "mamba2, groups": {"mamba2.n_groups": 2, "mamba2.expand": 3},
    "gated-deltanet": {},
    "gated-deltanet, expand": {"gated_deltanet.expand_v": 3},
    "ttt-kvb": {"num_key_value_heads": 1},
    "ttt-kvb, narrow": {"memory.intermediate_size": 3, "sliding_window": 5},
    "titans": {},
    "titans, narrow": {
        "memory.intermediate_size": 3,
        "sliding_window": 5,
        "num_key_value_heads": 1,
        "memory.num_persistent_tokens": 0,
        "qk_norm": False,
    },
    "window+gated-deltanet": {"num_key_value_heads": 1, "sliding_window": 5},
    "hybrid": {"num_hidden_layers": 4, "pattern": ("titans", "mamba2", "ttt-kvb", "gated-deltanet")},
}
LONG = [128, 130]  # with a rest and without, in chunks and in mini-batches


def mixed(shape: str, **changes: object) -> dict:
    """Changes that make a small model of such mixers."""
    return (
        dict(
            pattern=(shape.split(",")[0],),
            num_hidden_layers=2,
            suffix_layers=0,
            sliding_window=10,
            mamba2__state_size=8,
        )
        | MIXED[shape]
        | changes
    )


def at_the_edges(config: ModelConfig, length: int) -> int:
    """What the backward pass of chunked mixers has beyond twice the forward pass, and what it lacks."""
    extra = 0
    for mixer in config.mixers:
        if mixer == "mamba2":  # nobody reads the state after the last chunk; if it is short, it is computed by itself
            inner = config.mamba2.expand * config.hidden_size
            extra -= 2 * 2 * (length % tuning.SSD_CHUNK) * config.mamba2.state_size * inner
        if mixer.endswith("gated-deltanet"):  # nor there, and the memory before the first is a constant
            count = -(-length // tuning.DELTA_RULE_CHUNK)
            chunk = -(-length // count)
            heads = config.gated_deltanet.expand_v * config.num_attention_heads
            extra -= 3 * 2 * chunk * config.head_dim**2 * heads
            extra += 2 * count * chunk**3 * heads  # the gradient of the triangular solve
    return extra


@pytest.mark.parametrize("length", LONG)
@pytest.mark.parametrize("shape", MIXED)
def test_mixers(shape: str, length: int) -> None:
    changes, more = mixed(shape), 10
    config, model, text = small_config(**changes), small_model(**changes), tokens(length + more)
    state, pieces = start_reading(model, 1), [length, *[1] * more]
    wasted = unseen_below(config, pieces[:1])

    def prefill() -> None:
        nonlocal state
        state, _, _ = read_mini_batch(model, state, text[:, :length], text[:, 1 : length + 1])

    def decode() -> None:
        nonlocal state
        for i in range(length, length + more):
            _, state = forward(model, state, text[:, i : i + 1])

    expected = operations(config, length)
    assert counted(prefill) - wasted == round(expected.prefill * length)
    # Two mini-batches, and with Titans a segment, over which its tokens are alike in the mean.
    tokens_after = sum(operations(config, length + i).decoding for i in range(more))
    assert counted(decode) - (unseen_below(config, pieces) - wasted) == tokens_after

    training = counted(lambda: sequence_loss(model, text[:, : length + 1]).loss.backward())
    assert training - 3 * wasted == round(expected.training * length) + at_the_edges(config, length)


@pytest.mark.parametrize("length", LONG)
def test_training_of_mixers_below_a_suffix(length: int) -> None:
    changes = mixed("hybrid", pattern=("titans", "gated-deltanet", "ttt-kvb", "window"), suffix_layers=2)
    config, model, text = small_config(**changes), small_model(**changes), tokens(length + 1)
    pieces = cut(0, length, config.mini_batch_size)
    training = counted(lambda: sequence_loss(model, text).loss.backward())
    training -= 3 * (unseen_below(config, [length]) + unseen_inside(config, pieces, len(pieces) - 1))
    assert training == round(operations(config, length).training * length) + at_the_edges(config, length)


def test_a_published_size_as_it_is_run() -> None:
    """A whole meta-training step of 125m at 8K, without its numbers; attention and head as at small sizes."""
    config = PRESETS["125m"].model
    with torch.device("meta"):
        model, text = Transformer(config), torch.zeros(1, 8193, dtype=torch.int64)
    count = counted(lambda: sequence_loss(model, text).loss.backward())
    pieces = cut(0, 8192, config.mini_batch_size)
    count -= 3 * (unseen_below(config, [8192]) + unseen_inside(config, pieces, len(pieces) - 1))
    assert count == round(operations(config, 8192).training * 8192)


def test_figures_that_are_known() -> None:
    """The ratio in this project's table of times, and the published sizes' order of magnitude."""
    shape: dict = dict(
        vocab_size=1024,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        sliding_window=512,
        mini_batch_size=128,
    )
    meta = operations(ModelConfig(**shape, intermediate_size=560, suffix_layers=2), 2048)
    standard = operations(ModelConfig(**shape, intermediate_size=700), 2048)
    assert meta.training / standard.training == pytest.approx(1.34, abs=0.005)
    large, full = (operations(PRESETS[name].model, 8192) for name in ("3b", "3b-full"))
    assert full.training == full.training_recomputed == 3 * full.prefill
    assert large.training / full.training == pytest.approx(1.42, abs=0.01)
    assert large.training_recomputed / full.training == pytest.approx(1.63, abs=0.01)


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_table() -> None:
    config, full, contexts = PRESETS["tiny"].model, PRESETS["tiny-full"].model, [131_072, 1000]
    ours, others = ([cost(c, context, 2) for context in contexts] for c in (config, full))
    at = ours[0]
    assert (at.parameters, at.state_bytes) == (parameters(config), state_bytes(config, 131_072, 2))
    assert at.operations == operations(config, 131_072)
    alone, beside = table(ours), table(ours, others)
    assert [line.split()[0] for line in alone.splitlines()] == ["context", "128K", "1000"]
    assert "(" not in alone and beside.count("(") == 10
    assert f"({at.operations.prefill / others[0].operations.prefill:.4f})" in beside
    assert f"{at.state_bytes / 2**20:.4g} MiB ({at.state_bytes / others[0].state_bytes:.4f})" in beside


def test_no_tokens() -> None:
    for function in (cost, state_bytes, operations):
        with pytest.raises(UserError, match="at least 1 token"):
            function(PRESETS["tiny"].model, 0)
