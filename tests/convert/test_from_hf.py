"""Checkpoints that transformers itself has written, as models of ours: the same logits, and what is written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import CASES, SHAPE, Pretrained, convert, logits, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from ttt_e2e.config.schema import replace
from ttt_e2e.convert.from_hf import convert_from_hf, describe
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.errors import UserError
from ttt_e2e.inference.streaming import read_mini_batch, start_reading
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.checkpoint import load_transformer
from ttt_e2e.model.cost import parameters

transformers = pytest.importorskip("transformers", reason="transformers, which writes the checkpoints, is missing")


def has_post_norms(name: str) -> bool:
    """Whether the case is of a family whose MLPs can only be split."""
    return name.startswith(("olmo", "gemma2", "gemma3"))


# -- the same model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fast"),
    [(name, fast) for name in CASES for fast in ("new", "split") if fast == "split" or not has_post_norms(name)],
)
def test_logits_are_those_of_transformers(pretrained: Pretrained, tmp_path: Path, name: str, fast: Any) -> None:
    theirs, folder = pretrained(name)
    window = CASES[name][1].get("sliding_window") or 60
    done = convert_from_hf(
        folder, tmp_path / "out", LearningOptions(sliding_window=window, mini_batch_size=5, fast=fast)
    )
    model = load_transformer(tmp_path / "out")
    assert done.parameters == parameters(model.config) == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        expected = theirs(tokens()).logits
    assert expected.std() > 0.3  # else everything would be near everything
    length = window if "some layers" in name else 60
    difference = (logits(model, tokens()) - expected)[:, :length].abs().max().item()
    print(f"{name}, {fast}: {difference:.1e} of {expected.abs().max():.1f}")
    assert difference < 1e-4


@pytest.mark.parametrize("name", [name for name in CASES if "rope_type" in str(CASES[name]) and "dynamic" not in name])
def test_logits_depend_on_the_rope_scaling(pretrained: Pretrained, tmp_path: Path, name: str) -> None:
    theirs, folder = pretrained(name)
    window = CASES[name][1].get("sliding_window") or 60
    model = load_transformer(convert(folder, tmp_path, sliding_window=window))
    assert model.config.rope_scaling.rope_type != "default"
    with torch.no_grad():
        expected = theirs(tokens()).logits
    for changes in (
        {"rope_scaling.rope_type": "default", "rope_scaling.factor": 1.0, "rope_scaling.pair_factors": (1.0,)},
        {"rope_scaling.attention_factor": 1.05 * model.config.rope_scaling.attention_factor},
    ):
        model.config = replace(model.config, changes)
        assert (logits(model, tokens()) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize(
    ("name", "fast"),
    [
        ("qwen3, biases, yarn", "new"),
        ("qwen3, biases, yarn", "split"),
        ("gemma, one key head", "new"),
        ("gemma2, biases, sliding window", "split"),
        ("gemma3, sliding window", "split"),
        ("olmo3, biases, tied, sliding window", "split"),
    ],
)
def test_predictions_are_the_original_until_the_first_update(
    pretrained: Pretrained, tmp_path: Path, name: str, fast: str, rank: int | None
) -> None:
    theirs, folder = pretrained(name)
    window = CASES[name][1].get("sliding_window") or 60
    model = load_transformer(convert(folder, tmp_path, sliding_window=window, fast=fast, fast_rank=rank))
    learning, frozen = (sequence_loss(model, tokens(), learn=learn).nll_BT for learn in (True, False))
    torch.testing.assert_close(learning[:, :5], frozen[:, :5], rtol=0, atol=0)
    assert (learning[:, 5:] - frozen[:, 5:]).abs().mean() > 1e-4
    with torch.no_grad():
        log_p = theirs(tokens()).logits.log_softmax(-1)[:, :-1]
    expected = -log_p.gather(-1, tokens()[:, 1:, None])[..., 0]
    assert (frozen - expected).abs().max() < 1e-4


def test_new_fast_mlp_learns_its_second_matrix_first(pretrained: Pretrained, tmp_path: Path) -> None:
    model = load_transformer(convert(pretrained("llama")[1], tmp_path, fast="new"))
    assert model.config.fast_intermediate_size == 12 and model.suffix[0].fast.w_out.abs().max() == 0
    assert model.suffix[0].fast.w_in.std().item() == pytest.approx(SHAPE["initializer_range"], rel=0.1)
    states, text = [start_reading(model, 2)], tokens()
    for i in (0, 5):
        state, _, norm = read_mini_batch(model, states[-1], text[:, i : i + 5], text[:, i + 1 : i + 6])
        assert (norm > 1e-3).all()
        states.append(state)
    (w_in, w_out), *_ = zip(*(state.loop.fast[0] for state in states), strict=True), None
    assert torch.equal(w_in[1], w_in[0]) and not torch.equal(w_in[2], w_in[1])
    assert not torch.equal(w_out[1], w_out[0]) and not torch.equal(w_out[2], w_out[1])


def test_low_rank_factors_learn_one_after_another(pretrained: Pretrained, tmp_path: Path) -> None:
    expected = {
        "new": [{"up_out"}, {"up_in", "up_out", "down_out"}, {"up_in", "down_in", "up_out", "down_out"}],
        "split": [{"up_in", "up_out"}, *[{"up_in", "down_in", "up_out", "down_out"}] * 2],
    }
    for fast, moved in expected.items():
        convert_from_hf(
            pretrained("llama")[1], tmp_path / fast, LearningOptions(60, mini_batch_size=5, fast=fast, fast_rank=3)
        )  # type: ignore[arg-type]
        model, text = load_transformer(tmp_path / fast), tokens()
        state = start_reading(model, 2)
        for i in range(3):
            before = state.loop.fast[0]
            state, _, _ = read_mini_batch(model, state, text[:, 5 * i : 5 * i + 5], text[:, 5 * i + 1 : 5 * i + 6])
            now = state.loop.fast[0]._asdict()
            names = {
                name[: name.rindex("_")] for name, old in before._asdict().items() if not torch.equal(old, now[name])
            }
            assert names == moved[i], (fast, i)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_split_takes_the_first_hidden_units(pretrained: Pretrained, tmp_path: Path, share: float) -> None:
    theirs, folder = pretrained("llama")
    model = load_transformer(convert(folder, tmp_path, fast="split", fast_share=share, suffix=0.5))
    taken, mlp = int(48 * share), theirs.model.layers[3].mlp
    assert (model.config.suffix_layers, model.config.fast_intermediate_size, model.config.suffix_intermediate_size) == (
        2,
        taken,
        48 - taken,
    )
    fast, static = model.blocks[3].fast, model.blocks[3].mlp
    assert torch.equal(fast.w_in, torch.cat((mlp.gate_proj.weight[:taken], mlp.up_proj.weight[:taken])))
    assert torch.equal(static.w_in, torch.cat((mlp.gate_proj.weight[taken:], mlp.up_proj.weight[taken:])))
    assert torch.equal(torch.cat((fast.w_out, static.w_out), 1), mlp.down_proj.weight)


@pytest.mark.parametrize("fast", ["new", "split"])
def test_low_rank_factors_are_added_to_the_same_weights(pretrained: Pretrained, tmp_path: Path, fast: Any) -> None:
    """They come on top of the weights of a conversion without them, and begin as those of a model that is made anew."""
    folder = pretrained("llama")[1]
    done = convert_from_hf(
        folder, tmp_path / "low", LearningOptions(sliding_window=60, mini_batch_size=5, fast=fast, fast_rank=3)
    )
    whole, low = (
        dict(load_transformer(path).named_parameters())
        for path in (convert(folder, tmp_path, fast=fast), tmp_path / "low")
    )
    assert all(torch.equal(low[name], whole[name]) for name in whole)
    added = {name.rpartition(".")[2]: low[name] for name in set(low) - set(whole)}
    assert {name: tuple(factor.shape) for name, factor in added.items()} == {
        "up_in": (24, 3),
        "down_in": (3, 32),
        "up_out": (32, 3),
        "down_out": (3, 12),
    }
    assert added["up_in"].abs().max() == added["up_out"].abs().max() == 0
    for name in ("down_in", "down_out"):
        assert float(added[name].detach().norm(dim=1).mean()) == pytest.approx(1, abs=0.35)
    assert done.parameters == parameters(done.config) == sum(weight.numel() for weight in low.values())
    assert "additions of rank 3" in " ".join(describe(done))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize(
    ("name", "fast"),
    [("qwen2, tied", "new"), ("qwen2, tied", "split"), ("gemma2, biases, sliding window", "split")],
)
def test_all_weights_get_a_gradient(
    pretrained: Pretrained, tmp_path: Path, name: str, fast: str, rank: int | None
) -> None:
    folder, window = pretrained(name)[1], CASES[name][1].get("sliding_window") or 60
    model = load_transformer(convert(folder, tmp_path, sliding_window=window, fast=fast, fast_rank=rank))
    sequence_loss(model, tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_dtype_of_the_weights(
    pretrained: Pretrained, tmp_path: Path, stored: torch.dtype, dtype: str | None, expected: torch.dtype
) -> None:
    theirs, original = pretrained("mistral, wide heads")
    copy = transformers.MistralForCausalLM.from_pretrained(original, dtype=stored)
    copy.save_pretrained(tmp_path / "checkpoint")
    done = convert_from_hf(tmp_path / "checkpoint", tmp_path / "out", dtype=dtype)
    assert load_file(tmp_path / "out/model.safetensors")["embedding"].dtype == expected
    assert done.dtype == str(expected).removeprefix("torch.")
    weight = theirs.model.embed_tokens.weight.to(stored).to(expected).float()
    assert torch.equal(load_transformer(tmp_path / "out").embedding, weight)


def test_notes_name_the_source(pretrained: Pretrained, tmp_path: Path) -> None:
    folder = pretrained("llama")[1]
    notes = json.loads((convert(folder, tmp_path, fast="split") / "config.json").read_text())["notes"]
    assert (notes["source"], notes["source_family"], notes["fast"]) == (str(folder), "llama", "split")
    assert len(notes["source_config_sha256"]) == 64


def test_memory_does_not_grow_with_the_checkpoint(pretrained: Pretrained, tmp_path: Path) -> None:
    """A checkpoint of 8 shards, 192 MiB in all, converted in less than one and a half of them."""
    if not Path("/proc/self/clear_refs").is_file():
        pytest.skip("the system does not say how much memory a process held at most")
    shape = {**SHAPE, "vocab_size": 8, "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 8}
    config = transformers.LlamaConfig(**shape, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path / "big")
    with torch.device("meta"):
        weights = transformers.LlamaForCausalLM(config).state_dict()
    shards: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        if name != "lm_head.weight":
            layer = name.split(".")[2] if ".layers." in name else "0"
            shards.setdefault(f"model-{layer}.safetensors", {})[name] = torch.ones(weight.shape)
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / "big" / file)
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (tmp_path / "big/model.safetensors.index.json").write_text(json.dumps(index))
    sizes = [file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors")]
    script = (
        "import sys\n"
        "from ttt_e2e.convert.from_hf import convert_from_hf\n"
        "from ttt_e2e.convert.learning import LearningOptions\n"
        "def kib(name):\n"
        "    return int(next(line for line in open('/proc/self/status') if line.startswith(name)).split()[1])\n"
        "convert_from_hf(sys.argv[1], sys.argv[2] + '0', LearningOptions(sliding_window=64))\n"  # imports everything
        "before = kib('VmRSS')\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # resets the peak
        "convert_from_hf(sys.argv[3], sys.argv[2], LearningOptions(sliding_window=64))\n"
        "print(1024 * (kib('VmHWM') - before))\n"
    )
    folders = (pretrained("llama")[1], tmp_path / "out", tmp_path / "big")
    command = [sys.executable, "-c", script, *map(str, folders)]
    # Large arrays are then given back when they are freed, which otherwise hangs on what is allocated between them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    print(f"grew by {grown / 2**20:.0f} MiB; {len(sizes)} shards of up to {max(sizes) / 2**20:.0f} MiB")
    assert sum(sizes) > 6 * max(sizes)
    assert grown < 1.5 * max(sizes)


def test_failure_leaves_nothing(pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr("ttt_e2e.convert.from_hf.parameter_shapes", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        convert(pretrained("llama")[1], tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sliding_window": 129}, "window of 129 tokens is longer than 128, the range of its rotary positions"),
        ({"sliding_window": 8, "mini_batch_size": 9}, "mini-batch b = 9 is longer than the window k = 8"),
        ({"suffix": 0.0}, "suffix is a part of the blocks"),
        ({"suffix": 1.5}, "suffix is a part of the blocks"),
        ({"fast_share": 0.0}, "share of the pretrained one is above 0"),
        ({"fast_share": 1.0, "fast": "split"}, "leaves nothing of 48 hidden units"),
        ({"dtype": "int8"}, "written as float32 or bfloat16, not int8"),
    ],
)
def test_options_that_are_refused(
    pretrained: Pretrained, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        convert(pretrained("llama")[1], tmp_path, **options)
