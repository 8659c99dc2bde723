"""What a model costs, by counting: its parameters, what a text leaves behind in it, operations per token.

Nothing is run: the figures follow from the configuration. Every mixer's part is in the mixer's file.

Counted are the operations of matrix products, a product and its sum as two: linear layers, fast weights and their
gradients, the products of attention and of the recurrences. Left out is what is small beside them: everything
element-wise (norms, softmax, gates, decays, a recurrence's update by a single token, the update of fast weights),
convolutions of a few tokens, the triangular solves of Gated DeltaNet, the optimiser.

- Attention is counted by its need: the pairs of a query and a key that it sees. A kernel works in tiles and pays for
  more, and where it does not keep its scores it computes them again; neither is counted. The same holds for logits.
- What is differentiated costs three times itself: every product has two factors, and each gets a gradient by a product
  of the same size. With a suffix the inner gradient is part of what is differentiated; see `inner_loop`.
- The head is counted at every token, as this project reads: every token gets its loss.
- Mamba 2 and Gated DeltaNet are counted as `ops.ssd` and `ops.gated_delta_rule` compute a text in PyTorch, by chunks.
  Other kernels have other chunks.

`tests/model/test_cost.py` compares all of it with models that are built and run under PyTorch's own counter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ttt_e2e.config.schema import ModelConfig, TrainConfig, TrainMode
from ttt_e2e.errors import UserError
from ttt_e2e.model.counting import KEPT_GRAPHS, num_pairs, product_operations, projection_operations, score_operations
from ttt_e2e.model.mixers import MIXER_COSTS
from ttt_e2e.model.mixers.attention import attention_cost
from ttt_e2e.model.trainable import choose_trainable
from ttt_e2e.model.transformer import parameter_shapes


@dataclass(frozen=True)
class Operations:
    """Floating-point operations per token, for one sequence.

    prefill: reading a text of `context` tokens from its start, the mean over its tokens; with a suffix, learning from
        every whole mini-batch.
    decoding: one token after such a text. The suffix does not learn from what the model writes; the memories of TTT-KVB
        and Titans do, with every mini-batch, and each token bears its part of that. Titans' attention counts as the
        mean over a segment, once there was one.
    training: forward and backward, the mean over a sequence; with a suffix, through the inner updates (meta-training).
    training_recomputed: the same with `activation_checkpointing="mini-batch"`. Without a suffix nothing is recomputed.
    """

    prefill: float
    decoding: float
    training: float
    training_recomputed: float


@dataclass(frozen=True)
class Cost:
    """A model's cost at a context: see `parameters`, `state_bytes` and `Operations`."""

    context: int
    parameters: int
    state_bytes: int
    operations: Operations


def cost(
    config: ModelConfig,
    context: int,
    dtype_bytes: int = 4,
    train_mode: TrainMode = "meta",
    prefix_frozen: bool = False,
) -> Cost:
    """All figures of a model at `context` tokens; see the functions below. Raises UserError if there is no token."""
    state = state_bytes(config, context, dtype_bytes)
    return Cost(context, parameters(config), state, operations(config, context, train_mode, prefix_frozen))


def parameters(config: ModelConfig) -> int:
    """How many parameters the model has, fast weights at their start included."""
    width, norms = config.hidden_size, config.pre_norm + config.post_norm
    mixers = sum(MIXER_COSTS[name](config, 1).parameters for name in config.mixers)
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * width
    # Mixers, static MLPs and fast ones are sub-layers with norms of their own, but not two MLPs in parallel.
    layers = config.num_hidden_layers + (config.num_hidden_layers if config.static_mlp else config.prefix_layers)
    layers += 0 if config.parallel_mlp else config.suffix_layers
    factors = config.suffix_layers * (_factors(config) + _rates(config))
    return embeddings + mixers + 3 * width * _hidden(config) + factors + layers * norms * width + width


def state_bytes(config: ModelConfig, context: int, dtype_bytes: int = 4) -> int:
    """Bytes that one sequence leaves behind after `context` tokens.

    Cached keys and values and the last inputs of short convolutions take `dtype_bytes` a number (4: float32, 2:
    bfloat16). Fast weights, recurrent states and memories are float32 always. What fills up and is emptied again, as do
    Titans' segments and the mini-batches that memories learn from, is counted at its fullest in these tokens.
    Raises UserError if there is no token.
    """
    _require_tokens(context)
    mixers = [MIXER_COSTS[name](config, context) for name in config.mixers]
    return dtype_bytes * sum(m.cached for m in mixers) + 4 * (fast_weights(config) + sum(m.accumulated for m in mixers))


def fast_weights(config: ModelConfig) -> int:
    """How many numbers a sequence has of its own in the fast MLPs; each takes four bytes."""
    whole = 3 * config.hidden_size * config.fast_intermediate_size
    return config.suffix_layers * (whole if config.fast_rank is None else _factors(config))


def trained_parameters(config: ModelConfig, train: TrainConfig) -> tuple[int, int]:
    """How many of the model's parameters `train` trains, and how many numbers its low-rank additions have.

    Raises UserError as `choose_trainable` does.
    """
    if train.trainable == "all":
        return parameters(config), 0
    shapes = parameter_shapes(config)
    trained, adapted = choose_trainable(config, train, shapes)
    return sum(math.prod(shapes[name]) for name in trained), sum(train.lora.r * sum(shapes[name]) for name in adapted)


def training_bytes(config: ModelConfig, train: TrainConfig | None = None) -> int:
    """Bytes that training holds besides activations, at least. `train`: what is trained; None: everything.

    What is trained has weights, gradients and two moments of AdamW, all float32. Frozen weights are float32 too, or
    bfloat16 if training computes in it, which is how they are held if they lose nothing by it.
    """
    own, added = (parameters(config), 0) if train is None else trained_parameters(config, train)
    frozen_bytes = 2 if train is not None and train.dtype == "bfloat16" else 4
    return 16 * (own + added) + frozen_bytes * (parameters(config) - own)


def hours(operations: float, tokens: int, rate: float) -> float:
    """Hours for so many tokens at `operations` each, on a machine that does `rate` of them a second."""
    return operations * tokens / rate / 3600


def operations(
    config: ModelConfig, context: int, train_mode: TrainMode = "meta", prefix_frozen: bool = False
) -> Operations:
    """Operations per token at `context` >= 1 tokens.

    With "pretrain" as `train_mode` nothing is learned in training. With `prefix_frozen`, what runs before the loop goes
    forward only, and the head gets no gradient, as with `trainable=suffix`. Low-rank additions are not counted, nor is
    what they save: the matrices that they are added to count as if they were trained.
    """
    _require_tokens(context)
    mixers = [MIXER_COSTS[name](config, context) for name in config.mixers]
    dense = _mlp(config, 1, _hidden(config)) + config.suffix_layers * _additions(config, 1) + _head(config, 1)
    forward = sum(m.text for m in mixers) + context * dense
    training = sum(m.training for m in mixers) + 3 * context * dense
    if prefix_frozen:
        training -= sum(m.training - m.text for m in mixers[: config.prefix_layers + 1])
        training -= 2 * config.prefix_layers * _mlp(config, context, config.intermediate_size) + _head(config, context)
    prefill, recomputed = forward, training
    b = config.mini_batch_size or 1
    if config.can_learn:
        prefill += _inner_gradient(config, context // b * b)
    if config.can_learn and train_mode == "meta":
        count = -(-context // b)
        # No update follows a sequence's last mini-batch: nothing would read it.
        learned = (count - 1) * b
        training += 3 * _inner_gradient(config, learned) - prefix_frozen * _head(config, learned)
        again = max(0, count - KEPT_GRAPHS) * b
        recomputed = training + _loop_forward(config, again) + _inner_gradient(config, again)
    decoding = sum(m.token for m in mixers) + dense
    return Operations(prefill / context, decoding, training / context, recomputed / context)


def prefix_operations(config: ModelConfig, context: int) -> int:
    """Operations of the prefix's blocks over a text of `context` tokens, forward."""
    mixers = sum(MIXER_COSTS[name](config, context).text for name in config.mixers[: config.prefix_layers])
    return mixers + config.prefix_layers * _mlp(config, context, config.intermediate_size)


def table(costs: Sequence[Cost], beside: Sequence[Cost] = ()) -> str:
    """A model's costs at several contexts as plain text, a line each.

    beside: another model's at the same contexts; what multiple of its figures these are is added in brackets.
    """
    columns = ("state", "prefill", "decoding", "training", "recomputing")
    lines = [f"{'context':<8}" + "".join(f"{name:>18}" for name in columns)]
    for i, at in enumerate(costs):
        units = ("", " K", " M", " G", " T", " P")
        cells = [in_bytes(at.state_bytes), *(_readable(figure, 1000, units) for figure in _figures(at)[1:])]
        if beside:
            ratios = (f / o for f, o in zip(_figures(at), _figures(beside[i]), strict=True))
            cells = [f"{cell} ({r:.{2 if r >= 0.1 else 4}f})" for cell, r in zip(cells, ratios, strict=True)]
        lines.append(f"{in_tokens(at.context):<8}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def in_bytes(number: float) -> str:
    """A number of bytes to read, such as "1.4 GiB"."""
    return _readable(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def in_tokens(number: int) -> str:
    """A number of tokens as the command line takes it: 131072 is "128K", 2097152 is "2M"."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if number % unit == 0:
            return f"{number // unit}{name}"
    return str(number)


def _readable(number: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while number >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    return f"{number:.4g}{units[power]}" if number < 1000 else f"{number:.0f}{units[power]}"


def _figures(value: Cost) -> tuple[float, ...]:
    at = value.operations
    return value.state_bytes, at.prefill, at.decoding, at.training, at.training_recomputed


def _require_tokens(context: int) -> None:
    if context < 1:
        raise UserError(f"A context has at least 1 token, not {context}.")


# -- the Transformer ---------------------------------------------------------------------------------------------------


def _mlp(config: ModelConfig, tokens: int, hidden: int) -> int:
    return product_operations(tokens, config.hidden_size, 3 * hidden)


def _factors(config: ModelConfig) -> int:
    """Numbers in the factors of what is added to one fast MLP: up [2 F, R] and down [R, D], up [D, R], down [R, F]."""
    return (config.fast_rank or 0) * (3 * config.fast_intermediate_size + 2 * config.hidden_size)


def _rates(config: ModelConfig) -> int:
    """Learning rates of the matrices, or factors, of one fast MLP that are parameters."""
    return (2 if config.fast_rank is None else 4) if config.inner_loop.learned_lr else 0


def _additions(config: ModelConfig, tokens: int) -> int:
    """What is added to one fast MLP: one product for every factor."""
    return product_operations(tokens, 1, _factors(config))


def _head(config: ModelConfig, tokens: int) -> int:
    return product_operations(tokens, config.hidden_size, config.vocab_size)


def _hidden(config: ModelConfig) -> int:
    """Hidden units of all MLPs together, static and fast."""
    suffix = config.suffix_layers * (_beside(config) + config.fast_intermediate_size)
    return config.prefix_layers * config.intermediate_size + suffix


def _beside(config: ModelConfig) -> int:
    """Hidden units of the static MLP beside a fast one."""
    return config.suffix_intermediate_size if config.static_mlp else 0


def _loop_forward(config: ModelConfig, tokens: int) -> int:
    """What stands inside the loop, over the first `tokens` of a text: all above the first suffix block's mixer."""
    suffix = config.suffix_layers
    attentions = (suffix - 1) * attention_cost(config, config.loop_window, tokens).text
    mlps = suffix * (_mlp(config, tokens, _beside(config) + config.fast_intermediate_size) + _additions(config, tokens))
    return mlps + attentions + _head(config, tokens)


def _inner_gradient(config: ModelConfig, tokens: int) -> int:
    """The inner gradients of the first `tokens` of a text, which are whole mini-batches: the chain of the vjps.

    A static layer's vjp is one product for the gradient of its input; a fast MLP's has a second one for the gradient
    of its weights: of its matrices or, with a rank, of the factors, where the matrices are static. Of the lowest fast
    MLP the input's gradient is not wanted, nor that of the static MLP in parallel to it. Cached keys and values are
    constants.
    """
    suffix, b = config.suffix_layers, config.mini_batch_size or 1
    static = (suffix - config.parallel_mlp) * _mlp(config, tokens, _beside(config))
    rank = config.fast_rank or 0
    matrices = _mlp(config, tokens, config.fast_intermediate_size) * (1 if rank else 2)
    fast = suffix * (matrices + 2 * _additions(config, tokens))
    fast -= product_operations(tokens, config.hidden_size, 2 * config.fast_intermediate_size + rank)
    # Gradients of scores and of queries go over all pairs; those of keys and values over the mini-batch's own.
    pairs = num_pairs(tokens, config.loop_window) + tokens // b * num_pairs(b, config.loop_window)
    attention = projection_operations(config, tokens) + score_operations(config, pairs)
    return static + fast + (suffix - 1) * attention + _head(config, tokens)
