"""The compiled path computes what the plain one does, is compiled once, and steps aside where that cannot be done."""

import shutil
import warnings

import pytest
import torch
import torch._inductor.config
from helpers import GEMMA, small_model
from torch import Tensor

from ttt_e2e.inference.streaming import read_mini_batch, start_reading
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.inner_loop.functions import EAGER, LoopFunctions
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.transformer import Transformer

# A compilation that fails, or is done again, would leave nothing but the plain path to be compared with itself.
pytestmark = pytest.mark.filterwarnings("error:Continuing without compilation")

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
F64 = torch.float64
# Two blocks each: a third of the same kinds would take compilation time and no path of its own.
SHAPES = {
    "shorter last mini-batch, recomputed": {},
    "nothing kept, sinks, recomputed": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 7,
        "attention_sink": True,
        "final_logit_softcapping": 3.0,
    },
    "full attention, one without positions, joint norms": {
        "pattern": ("full",),
        "rope_pattern": (True, True, False),
        "qk_norm_joint": True,
    },
    "one suffix block": {"suffix_layers": 1},
    "standard": {"suffix_layers": 0},
    "parallel MLPs, biases, YaRN, clipped, as in Gemma": {
        **GEMMA,
        "parallel_mlp": True,
        "suffix_intermediate_size": 10,
        "attention_bias": True,
        "attention_out_bias": True,
        "rope_scaling.rope_type": "yarn",
        "rope_scaling.factor": 4.0,
        "rope_scaling.original_max_position_embeddings": 16,
        "rope_scaling.attention_factor": 1.1,
        "inner_loop.max_grad_norm": 0.05,
    },
    "low rank, learned rates, grouped heads, odd window": {
        "fast_rank": 3,
        "inner_loop.learned_lr": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 7,
    },
}


def tokens(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(50, (batch, length + 1), generator=torch.Generator().manual_seed(seed))


def gradient(model: Transformer, text: Tensor, steps: LoopFunctions, **options: object) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    out = sequence_loss(model, text, dtype=F64, functions=steps, **options)  # type: ignore[arg-type]
    out.loss.backward()
    return out.nll_BT, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled yet; and nothing is twice because the inner rate is of float64, which no real one is."""
    monkeypatch.setenv("TENSORIFY_PYTHON_SCALARS", "0")
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_outer_gradient(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, differentiated and run as the compiler sees it, without its code generation.

    One compilation is for all mini-batches, of another text and with another inner rate too. Only for a shorter last
    mini-batch, and for a forward pass that is repeated with a graph, all is compiled once more.
    """
    if "nothing kept" in shape:
        monkeypatch.setattr("ttt_e2e.ops.tuning.KEPT_SCORES", {})
        monkeypatch.setattr("ttt_e2e.ops.tuning.KEPT_LOGITS", 0)
    model, steps = small_model(F64, num_hidden_layers=2, **SHAPES[shape]), compiled_functions(backend="aot_eager")
    recomputed = "recomputed" in shape
    options: dict = {
        "bos": 3,
        "activation_checkpointing": "sqrt" if recomputed else "none",
        "recompute_prefix": recomputed,
    }
    for seed, inner_lr in ((0, None), (1, 1.5)):
        text = tokens(28 if "shorter" in shape else 25, seed=seed)
        expected = gradient(model, text, EAGER, inner_lr=inner_lr, **options)
        with torch._dynamo.config.patch(error_on_recompile=not recomputed):
            compiled = gradient(model, text, steps, inner_lr=inner_lr, **options)
        for ours, theirs in zip(compiled, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@COMPILER
def test_generated_code() -> None:
    """One block, which has all that a block has, and no vector instructions: a kernel takes the compiler a second.

    The command that reads (tests/cli) has two blocks that learn, one attention in the loop, and vector instructions.
    """
    model, text = small_model(F64, num_hidden_layers=1, suffix_layers=1), tokens(15)
    expected = gradient(model, text, EAGER, bos=3)
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        found = gradient(model, text, compiled_functions(), bos=3)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_one_compilation_for_all_of_a_text() -> None:
    model, steps, text = small_model(F64, num_hidden_layers=3), compiled_functions(backend="aot_eager"), tokens(40)
    plain = compiled = start_reading(model, 2, F64)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(0, 40, 5):
            pieces = (text[:, i : i + 5], text[:, i + 1 : i + 6])
            plain, *expected = read_mini_batch(model, plain, *pieces, dtype=F64)
            compiled, *ours = read_mini_batch(model, compiled, *pieces, dtype=F64, functions=steps)
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
            assert compiled.static is not None and plain.static is not None
            for a, b in zip(compiled.static + compiled.loop.caches, plain.static + plain.loop.caches, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_what_cannot_be_compiled_runs_with_one_warning() -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler on this machine")

    model, text = small_model(F64), tokens(25)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss, _ = gradient(model, text, compiled_functions(backend=broken))
    ours = [w for w in caught if "without compilation" in str(w.message)]
    assert len(ours) == 1 and "no compiler on this machine" in str(ours[0].message)
    torch.testing.assert_close(loss, gradient(model, text, EAGER)[0], rtol=1e-9, atol=1e-11)
