"""GGUF files as models of ours: the logits of transformers, rotary settings, tokens to write with, and the commands."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import CASES, LLAMA3, SHAPE, Pretrained, tokens

gguf = pytest.importorskip("gguf", reason="gguf, which writes the files, is missing")
transformers = pytest.importorskip("transformers", reason="transformers, which has the models, is missing")

from gguf_helpers import SPECIAL, TEMPLATE, add_vocabulary, write_model  # noqa: E402

from ttt_e2e.cli.main import main  # noqa: E402
from ttt_e2e.convert.from_hf import convert_from_hf  # noqa: E402
from ttt_e2e.convert.gguf_files import read_gguf  # noqa: E402
from ttt_e2e.convert.learning import LearningOptions  # noqa: E402
from ttt_e2e.inference.load import chat_template, load_model  # noqa: E402
from ttt_e2e.inference.streaming import forward, start_reading  # noqa: E402
from ttt_e2e.model.checkpoint import load_config, load_transformer  # noqa: E402

WIDE: dict[str, Any] = dict(
    vocab_size=320,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=256,
    max_position_embeddings=64,
    initializer_range=0.05,
    rms_norm_eps=1e-5,
)  # rows of whole blocks of every type


def convert(path: Path, out: Path, **options: Any) -> Path:
    convert_from_hf(path, out, LearningOptions(**{"sliding_window": 24, "mini_batch_size": 5, **options}))
    return out


def new_model(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}ForCausalLM")
    model = kind(kind.config_class(**{**WIDE, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, so that a test sees them
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def difference(theirs: Any, folder: Path, text: torch.Tensor) -> float:
    with torch.no_grad():
        expected = theirs(text).logits
    assert expected.std() > 0.3  # else everything would be near everything
    model = load_transformer(folder)
    return float((forward(model, start_reading(model, len(text)), text)[0] - expected).abs().max())


# -- the same model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("Llama", kind) for kind in ("F32", "F16", "Q4_1", "Q5_K", "Q6_K")),
        *(("Qwen2", "Q8_0"), ("Qwen2", "Q4_K"), ("Qwen3", "Q4_0"), ("Mistral", "BF16")),
        *(("Gemma2", "Q8_0"), ("Gemma3", "Q4_0")),
    ],
)
def test_logits_are_those_of_transformers_for_the_same_file(tmp_path: Path, family: str, kind: str) -> None:
    settings = {"head_dim": 128, "tie_word_embeddings": kind != "Q4_1"}
    if family in ("Mistral", "Gemma2", "Gemma3"):
        settings["sliding_window"] = 64
    if family.startswith("Gemma"):  # one layer of six has other rotary positions; transformers takes 256 for the scale
        settings |= {"head_dim": 256, "num_hidden_layers": 6}
    path = write_model(tmp_path / "model.gguf", new_model(family, **settings), kind)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1}
    assert kinds == {kind}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    convert(path, tmp_path / "out", fast="split")
    found = difference(theirs.eval(), tmp_path / "out", tokens(24))
    print(f"{family}, {kind}: {found:.1e}")
    assert found < 1e-4


FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3")
# Tested by themselves, or not in GGUF files: Gemma has no biases and no head of its own there.
ELSEWHERE = ("llama3", "qwen3, biases", "dynamic", "some layers", "gemma, biases", "gemma2, biases", "capped")
NAMES = [name for name in CASES if name.split(",")[0] in FAMILIES and not any(part in name for part in ELSEWHERE)]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_model_that_was_written(pretrained: Pretrained, tmp_path: Path, name: str) -> None:
    theirs, _ = pretrained(name)
    rope = theirs.config.rope_parameters
    scaling: dict[str, Any] = {}
    if rope.get("rope_type", "default") != "default":
        scaling = {"rope__scaling__type": rope["rope_type"], "rope__scaling__factor": rope["factor"]}
    if scaling.get("rope__scaling__type") == "yarn":
        scaling["rope__scaling__original_context_length"] = rope["original_max_position_embeddings"]
        scaling["rope__scaling__yarn_beta_fast"] = float(rope["beta_fast"])
    folder = convert(write_model(tmp_path / "model.gguf", theirs, **scaling), tmp_path / "out")
    assert load_config(folder).rms_norm_eps == SHAPE["rms_norm_eps"]  # not what float32 makes of it
    assert difference(theirs, folder, tokens(24)) < 1e-4


@pytest.mark.parametrize(
    ("theta", "original", "low", "high", "factor"),
    [(500_000.0, 8192, 1.0, 4.0, 32.0), (500.0, 32, 1.0, 4.0, 8.0), (10_000.0, 4096, 2.0, 16.0, 5.0)],
)
def test_llama3_scaling_is_found_from_the_factors(
    tmp_path: Path, theta: float, original: int, low: float, high: float, factor: float
) -> None:
    rope = LLAMA3 | dict(
        rope_theta=theta,
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
        factor=factor,
    )
    theirs = new_model("Llama", head_dim=64, rope_parameters=rope)
    pairs = theta ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64) / theirs.model.rotary_emb.inv_freq
    assert pairs.max() > 0.99 * factor and pairs.min() < 1.01
    path = write_model(tmp_path / "model.gguf", theirs, tensors={"rope_freqs.weight": pairs.float()})
    convert(path, tmp_path / "out")
    scaling = load_config(tmp_path / "out").rope_scaling
    assert scaling.rope_type == "llama3" and scaling.factor == pytest.approx(factor)
    if low == 1:
        assert (scaling.original_max_position_embeddings, scaling.high_freq_factor) == (original, pytest.approx(high))
    assert difference(theirs, tmp_path / "out", tokens(24)) < 1e-4


def test_rows_and_columns_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    theirs = new_model("Llama", attention_bias=True, head_dim=128, num_key_value_heads=2)
    path = write_model(tmp_path / "model.gguf", theirs, "Q8_0")
    stored = read_gguf(path).tensors
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        whole, original = stored[name].read(slice(None)), theirs.state_dict()[name]
        assert whole.shape == original.shape and (whole - original).abs().max() < 2e-3
        part = stored[name].read(slice(3, 150), slice(7, 99))
        assert torch.equal(part, whole[3:150, 7:99])
    name = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(stored[name].read(slice(5, 140)), theirs.state_dict()[name][5:140])


def test_memory_does_not_grow_with_the_tensor_that_is_read(tmp_path: Path) -> None:
    theirs = new_model("Llama", vocab_size=20_000)
    path = write_model(tmp_path / "model.gguf", theirs, "Q8_0", tokenizer=lambda writer, _: add_vocabulary(writer, 320))
    stored = read_gguf(path).tensors["model.embed_tokens.weight"]
    whole = stored.read(slice(None))
    assert whole.nbytes > 20e6
    tracemalloc.start()
    part = stored.read(slice(9_000, 9_100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert torch.equal(part, whole[9_000:9_100]) and peak < 1e6


def test_norms_of_gemma_are_not_rounded(pretrained: Pretrained, tmp_path: Path) -> None:
    """They are close to 1 and hold the 1 in a file, where bfloat16 has few digits."""
    theirs, _ = pretrained("gemma3, sliding window")
    path = write_model(tmp_path / "model.gguf", theirs, "BF16")
    convert_from_hf(path, tmp_path / "out", LearningOptions(24, mini_batch_size=5), dtype="bfloat16")
    model = load_transformer(tmp_path / "out")
    assert torch.equal(model.final_norm.weight, 1 + theirs.model.norm.weight)
    assert torch.equal(model.embedding, theirs.model.embed_tokens.weight.bfloat16().float())


# -- what belongs to it ------------------------------------------------------------------------------------------------


def test_tokenizer_template_and_end_ids_survive(tmp_path: Path) -> None:
    from ttt_e2e.hf.export import convert_to_hf

    path = write_model(tmp_path / "model.gguf", new_model("Llama"))
    convert(path, tmp_path / "out")
    _, tokenizer = load_model(tmp_path / "out")
    assert (tokenizer.bos, tokenizer.end_ids) == (0, {0, 2})
    assert tokenizer.special == {token: i for i, token in enumerate(SPECIAL)}
    template = chat_template(tmp_path / "out")
    assert template is not None and template.source == TEMPLATE
    assert template.special_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    convert_to_hf(tmp_path / "out", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = theirs.apply_chat_template([{"role": "user", "content": "In 2024."}], tokenize=False)
    assert text == "<|im_start|>user\nIn 2024.<|im_end|>\n" and theirs.eos_token == "<|im_end|>"
    ids = theirs.apply_chat_template([{"role": "user", "content": "In 2024."}], return_dict=False)
    assert ids == [1, *tokenizer.encode("user\nIn 2024."), 2, *tokenizer.encode("\n")]
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert settings.eos_token_id == [0, 2] and settings.bos_token_id == 0


def test_ids_that_round_up_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    def padded(writer: Any, size: int) -> None:
        add_vocabulary(writer, size - 20, unused=20)

    path = write_model(tmp_path / "model.gguf", new_model("Qwen2"), tokenizer=padded)
    done = convert_from_hf(path, tmp_path / "out", LearningOptions(24, mini_batch_size=5))
    assert (done.unused_ids, done.config.vocab_size) == (20, 300)
    assert load_model(tmp_path / "out")[1].vocab_size == 300


def test_both_commands_write_the_same_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("model.gguf"), new_model("Llama"), "BF16")
    for action in ("from-gguf", "from-hf"):
        assert main(["convert", action, "model.gguf", action, "--window", "24", "--quiet"]) == 0
        assert f"{action}: llama: 2 blocks" in capsys.readouterr().out
    files = sorted(path.name for path in Path("from-gguf").iterdir())
    assert files == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    for name in files:
        assert Path("from-gguf", name).read_bytes() == Path("from-hf", name).read_bytes()
    assert main(["cost", "model.gguf", "--window", "24"]) == 0
    count = sum(parameter.numel() for parameter in load_transformer(Path("from-hf")).parameters())
    assert f"model: {count:,} parameters" in capsys.readouterr().out
    assert main(["convert", "from-gguf", "model.gguf", "from-hf"]) == 1
    assert "exists" in capsys.readouterr().err
