import json
from pathlib import Path

import pytest
import torch
from helpers import flipped
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ttt_e2e.config.schema import ModelConfig, replace
from ttt_e2e.errors import UserError
from ttt_e2e.files import with_digest
from ttt_e2e.model.checkpoint import load_transformer, model_digest, save_model
from ttt_e2e.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=16,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=8,
    suffix_layers=1,
    sliding_window=8,
    mini_batch_size=4,
)


MODEL = Transformer(CONFIG, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("intact") / "model"
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    save_model(MODEL, folder, source / "tokenizer.json")
    return folder


@pytest.fixture
def model() -> Transformer:
    return Transformer(CONFIG, torch.Generator().manual_seed(0))


@pytest.fixture
def folder(model: Transformer, tmp_path: Path) -> Path:
    tokenizer = tmp_path / "source.json"
    tokenizer.write_text('{"a": 1}')
    save_model(model, tmp_path / "model", tokenizer, notes={"from": "a test"})
    return tmp_path / "model"


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(with_digest({**json.loads(path.read_text()), **changes})))


def test_a_model_comes_back_bit_for_bit(model: Transformer, folder: Path) -> None:
    before = torch.random.get_rng_state()
    loaded = load_transformer(folder)
    assert loaded.config == CONFIG
    for name, weight in model.named_parameters():
        assert torch.equal(weight, loaded.get_parameter(name))
    assert model_digest(loaded) == model_digest(model)
    assert (folder / "tokenizer.json").read_text() == '{"a": 1}'
    assert json.loads((folder / "config.json").read_text())["notes"] == {"from": "a test"}
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_comes_back_as_float32(model: Transformer, tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(model, tmp_path / "model", None, dtype=dtype)
    assert load_file(tmp_path / "model/model.safetensors")["embedding"].dtype == dtype
    loaded = load_transformer(tmp_path / "model")
    for name, weight in model.named_parameters():
        assert torch.equal(weight.to(dtype).float(), loaded.get_parameter(name))
    assert not (tmp_path / "model/tokenizer.json").exists()


def test_saving_replaces_a_model_and_leaves_nothing_beside_it(model: Transformer, folder: Path) -> None:
    with torch.no_grad():
        model.embedding.add_(1)
    save_model(model, folder, None)
    assert model_digest(load_transformer(folder)) == model_digest(model)
    assert sorted(f.name for f in folder.parent.iterdir()) == ["model", "source.json"]


def test_digest_tells_weights_apart(model: Transformer) -> None:
    before = model_digest(model)
    with torch.no_grad():
        model.final_norm.weight[0] += 1e-6
    assert model_digest(model) != before


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no model folder"):
        load_transformer(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"not a model folder: it has no {name}"):
        load_transformer(folder)


def test_a_run_is_no_model_but_names_one(model: Transformer, tmp_path: Path) -> None:
    save_model(model, tmp_path / "run/checkpoints/step-00000020", None)
    with pytest.raises(UserError, match=r"Its newest model is .*step-00000020\."):
        load_transformer(tmp_path / "run")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_weights(folder: Path, share: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        load_transformer(folder)


def test_altered_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="altered after it was written"):
        load_transformer(folder)


def test_truncated_configuration(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match="not JSON"):
        load_transformer(folder)


@given(bit=st.integers(0, 1 << 30))
@settings(max_examples=60)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_a_flipped_bit_is_refused_or_changes_nothing(intact: Path, name: str, bit: int) -> None:
    path = intact / name
    content = path.read_bytes()
    path.write_bytes(flipped(content, bit % (8 * len(content))))
    try:
        loaded = load_transformer(intact)
        assert name in ("config.json", "model.safetensors")
        assert loaded.config == CONFIG and model_digest(loaded) == model_digest(MODEL)
    except UserError:
        pass
    finally:
        path.write_bytes(content)


def test_foreign_configuration(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is not a ttt-e2e model"):
        load_transformer(folder)


@pytest.mark.parametrize(("version", "remedy"), [(3, "convert or train the model again"), (5, "update ttt-e2e")])
def test_load_transformer_refuses_other_format_versions(folder: Path, version: int, remedy: str) -> None:
    rewrite(folder, version=version)
    with pytest.raises(UserError, match=f"format version {version}, and this ttt-e2e reads version 4; {remedy}"):
        load_transformer(folder)


def test_configuration_of_another_shape(folder: Path) -> None:
    model = json.loads((folder / "config.json").read_text())["model"]
    rewrite(folder, model={**model, "intermediate_size": 12})
    with pytest.raises(UserError, match=r"has shape .* is expected"):
        load_transformer(folder)
    rewrite(folder, model={**model, "num_hidden_layers": 3})
    with pytest.raises(UserError, match="lacks tensors: blocks"):
        load_transformer(folder)
    rewrite(folder, model={**model, "qk_norm": False})
    with pytest.raises(UserError, match="has unknown tensors"):
        load_transformer(folder)


def test_weights_of_another_program(model: Transformer, folder: Path) -> None:
    tensors = {name: weight.detach() for name, weight in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="no digest"):
        load_transformer(folder)
    save_file({name: weight.int() for name, weight in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="not floating point"):
        load_transformer(folder)


MIXER = "mixer.b_out mixer.b_qkv mixer.k_norm mixer.q_norm mixer.w_out mixer.w_qkv mixer_norm.weight"
MLP = "mixer_post_norm.weight mlp.w_in mlp.w_out mlp_norm.weight mlp_post_norm.weight"
FAST = "fast.down_in fast.down_out fast.up_in fast.up_out fast.w_in fast.w_out fast_norm.weight fast_post_norm.weight"
NAMES = {
    *("embedding", "final_norm.weight", "head"),
    *(f"blocks.0.{name}" for name in f"{MIXER} {MLP}".split()),
    *(f"blocks.1.{name}" for name in f"{MIXER} {MLP} {FAST}".split()),
}
MIXER_NAMES = {
    "mamba2": "a_log conv_bias conv_weight d_skip dt_bias norm w_in w_out",
    "gated-deltanet": "a_log dt_bias norm w_ba w_conv w_in w_out",
    "ttt-kvb": "attention.k_norm attention.q_norm attention.w_out attention.w_qkv memory.w_in memory.w_out read_norm "
    "step_bias w_out w_qkv w_step",
    "titans": "context_norm gate_norm k_norm memory.w_in memory.w_out persistent_k persistent_v q_norm steps_bias "
    "w_context w_kv w_memory w_out w_q w_steps",
    "window+gated-deltanet": "attention.k_norm attention.q_norm attention.w_out attention.w_qkv deltanet.a_log "
    "deltanet.dt_bias deltanet.norm deltanet.w_ba deltanet.w_conv deltanet.w_in deltanet.w_out",
}


def test_names_in_the_weights_file_do_not_follow_renames_in_the_code(tmp_path: Path) -> None:
    """They are a file format: a module that is renamed must keep the names under which its weights were saved."""
    config = replace(
        CONFIG, {"fast_rank": 2, "tie_word_embeddings": False, "attention_bias": True, "attention_out_bias": True}
    )
    save_model(Transformer(config), tmp_path / "model", None)
    assert set(load_file(tmp_path / "model" / "model.safetensors")) == NAMES
    for mixer, names in MIXER_NAMES.items():
        config = replace(CONFIG, {"suffix_layers": 0, "num_hidden_layers": 1, "pattern": (mixer,)})
        save_model(Transformer(config), tmp_path / mixer, None)
        found = {name for name in load_file(tmp_path / mixer / "model.safetensors") if ".mixer." in name}
        assert found == {f"blocks.0.mixer.{name}" for name in names.split()}
