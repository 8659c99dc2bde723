"""Checkpoints that transformers itself has written, as models of ours: the same logits, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hf_helpers import CASES, SHAPE, Pretrained, change_config, convert, tokens
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from ttt_e2e.config.schema import replace
from ttt_e2e.convert.from_hf import convert_from_hf, describe
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.errors import UserError
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.streaming import forward, read_mini_batch, start_reading
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.checkpoint import load_transformer
from ttt_e2e.model.cost import parameters
from ttt_e2e.model.transformer import Transformer

transformers = pytest.importorskip("transformers", reason="transformers, which writes the checkpoints, is missing")


def has_post_norms(name: str) -> bool:
    """Whether the case is of a family whose MLPs can only be split."""
    return name.startswith(("olmo", "gemma2", "gemma3"))


def logits(model: Transformer, text: Tensor) -> Tensor:
    return forward(model, start_reading(model, len(text)), text)[0]


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
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
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


# -- tokenizers --------------------------------------------------------------------------------------------------------


def bpe(specials: list[str]) -> tokenizers.Tokenizer:
    """Bytes as tokens, as Llama 3 and Qwen have them, and special ones after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    return backend


@pytest.mark.parametrize(
    ("name", "specials", "bos"),
    [
        ("llama, tied, llama3", ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|begin_of_text|>"),
        ("qwen2, tied", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>"),
        ("llama", ["<s>", "</s>"], "<s>"),
        ("gemma3, windows in some layers", ["<pad>", "<eos>", "<bos>", "<end_of_turn>"], "<bos>"),
    ],
)
def test_converted_model_reads_and_writes_texts(tmp_path: Path, name: str, specials: list[str], bos: str) -> None:
    """With a vocabulary rounded up, as Qwen's is: the rows that no token names are left out."""
    family, changes, _ = CASES[name]
    backend, folder = bpe(specials), tmp_path / "checkpoint"
    size = backend.get_vocab_size()
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}ForCausalLM")
    theirs = kind(kind.config_class(**{**SHAPE, **changes, "vocab_size": size + 13})).eval()
    theirs.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": "{{ messages[0]['content'] }}", "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    window = changes.get("sliding_window", 64)
    done = convert_from_hf(folder, tmp_path / "out", LearningOptions(sliding_window=window, mini_batch_size=8))
    assert done.has_tokenizer and done.unused_ids == 13 and "13 ids" in " ".join(describe(done))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    model, tokenizer = load_model(tmp_path / "out", "cpu")
    assert tokenizer.bos == backend.token_to_id(bos)
    ids = torch.from_numpy(tokenizer.encode(f"A Straße, {bos} and back."))[None]
    assert backend.token_to_id(bos) not in ids
    with torch.no_grad():
        expected = theirs(ids).logits
    assert (logits(model, ids) - expected[..., :size])[:, :window].abs().max() < 1e-4
    session = Session(model, tokenizer)
    session.read("It rained all night. " * 4)
    assert session.info().text_bytes == 84
    written = list(Session(model, tokenizer).generate_tokens("And so", max_tokens=4, temperature=0.0))
    text = [tokenizer.bos, *tokenizer.encode("And so").tolist()]
    for token in written:
        with torch.no_grad():
            assert token == theirs(torch.tensor([text])).logits[0, -1, :size].argmax()
        text.append(token)
    assert len(written) == 4


def test_missing_tokenizer_is_reported(pretrained: Pretrained, tmp_path: Path) -> None:
    done = convert_from_hf(pretrained("llama")[1], tmp_path / "out")
    assert not done.has_tokenizer and "no tokenizer.json" in describe(done)[-1]


def test_tokenizers_that_do_not_fit_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    backend = bpe(["<s>"])
    backend.save(str(checkpoint / "tokenizer.json"))
    with pytest.raises(UserError, match="has 257 tokens, but its model has a vocabulary of 96"):
        convert(checkpoint, tmp_path)
    bpe([]).save(str(checkpoint / "tokenizer.json"))
    with pytest.raises(UserError, match="no token that begins a document"):
        convert(checkpoint, tmp_path)


def test_tokens_without_an_embedding_are_refused_in_a_text_alone(pretrained: Pretrained, tmp_path: Path) -> None:
    """The checkpoint loads in transformers, too, and there such a token is an index out of range."""
    theirs, folder = pretrained("llama")
    folder = Path(shutil.copytree(folder, tmp_path / "checkpoint"))
    backend = tokenizers.Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(["<s>", *map(chr, range(32, 127))])}, [])
    )
    backend.add_special_tokens(["<s>"])
    backend.add_tokens(["<extra>"])
    backend.add_special_tokens(["<pad>"])
    backend.save(str(folder / "tokenizer.json"))
    model, tokenizer = load_model(convert(folder, tmp_path))
    ids = tokenizer.encode("A text.")
    with torch.no_grad():
        assert (
            logits(model, torch.from_numpy(ids)[None]) - theirs(torch.from_numpy(ids)[None]).logits
        ).abs().max() < 1e-4
    assert model.config.vocab_size == tokenizer.vocab_size == 96
    session = Session(model, tokenizer)
    session.read("A text. " * 9)
    for text in ("A <extra> text", [backend.token_to_id("<pad>")]):
        with pytest.raises(UserError, match=r"'<extra>', of which the model has no embedding|from 0 to 95"):
            session.read(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(
    pretrained: Pretrained, tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    folder = Path(shutil.copytree(pretrained("llama, one key head, sharded")[1], tmp_path / "checkpoint"))
    file = sorted(folder.glob("*.safetensors"))[1]
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} that are not finite numbers"):
        convert(folder, tmp_path)
    assert not (tmp_path / "out").exists()


def test_weights_that_bfloat16_cannot_hold_are_refused(pretrained: Pretrained, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pretrained("llama")[1], tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 3.4e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model.norm.weight that are not finite numbers in torch.bfloat16"):
        convert(folder, tmp_path, dtype="bfloat16")


# -- names -------------------------------------------------------------------------------------------------------------


def test_name_is_found_in_the_cache(pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache/models--someone--something"
    revision = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(pretrained("llama, one key head, sharded")[1], cache / "snapshots" / revision)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    convert_from_hf("someone/something", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["notes"]["source"] == "someone/something"
    next((cache / "snapshots" / revision).glob("*.safetensors")).unlink()
    with pytest.raises(
        UserError, match=r"something .*not complete in the Hugging Face cache|which .* lists, is missing"
    ):
        convert_from_hf("someone/something", tmp_path / "other")
    with pytest.raises(
        UserError, match="someone/else is not a folder here, is not complete in the Hugging Face cache and"
    ):
        convert_from_hf("someone/else", tmp_path / "other")
    for nothing in ("nowhere", "a/b/c"):
        with pytest.raises(UserError, match=f"There is no folder {nothing}; give"):
            convert_from_hf(nothing, tmp_path / "other")


# -- what is refused ---------------------------------------------------------------------------------------------------


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


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_damaged_files_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    shard = shards(checkpoint)[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(UserError, match=f"{shard.name} is truncated or not a safetensors file"):
        convert(checkpoint, tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}, which model.safetensors.index.json lists, is missing"):
        convert(checkpoint, tmp_path)
    tensors = load_file(shards(checkpoint)[0])
    save_file({name + "x": weight for name, weight in tensors.items()}, shard)
    with pytest.raises(UserError, match=r"places .* in a file that does not have it"):
        convert(checkpoint, tmp_path)
    index = checkpoint / "model.safetensors.index.json"
    for broken in ("{", '{"weight_map": []}', '{"weight_map": {"a": "../a.safetensors"}}'):
        index.write_text(broken)
        with pytest.raises(UserError, match=r"is not JSON|does not list the files of the weights"):
            convert(checkpoint, tmp_path)
    index.unlink()
    with pytest.raises(UserError, match=r"has no weights: neither model.safetensors nor"):
        convert(checkpoint, tmp_path)
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json is missing"):
        convert(checkpoint, tmp_path)
    with pytest.raises(UserError, match="is a file; give the folder"):
        convert(checkpoint / "generation_config.json", tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists; name another folder"):
        convert(checkpoint, tmp_path)


def test_unexpected_tensors_are_refused(pretrained: Pretrained, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pretrained("llama")[1], tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name} in .* is of type I8: a quantised checkpoint"):
        convert(folder, tmp_path)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "model.safetensors")
    assert convert(folder, tmp_path).is_dir()  # Llama 1 has them; they follow from the configuration
    change_config(folder, tie_word_embeddings=True)
    tied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tied, folder / "model.safetensors")
    assert convert_from_hf(folder, tmp_path / "tied").config.tie_word_embeddings
