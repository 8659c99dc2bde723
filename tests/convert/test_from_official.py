"""Checkpoints of the official trainer, as model folders: the reference one, and small ones written here alike."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_config, small_model
from safetensors.torch import load_file

from ttt_e2e.cli.main import main
from ttt_e2e.config.schema import replace
from ttt_e2e.convert.from_official import convert_from_official, official_config, state_dict_from_official
from ttt_e2e.convert.orbax import find_step
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.checkpoint import load_config, load_transformer, save_model
from ttt_e2e.model.transformer import Transformer

ITEM = "model_weights"
SETTINGS = ("pattern=window", "rope_theta=5e5", "sliding_window=12", "mini_batch_size=5")


@pytest.fixture(scope="session")
def tensorstore() -> Any:
    return pytest.importorskip("tensorstore", reason="tensorstore reads these checkpoints: the extra 'official'")


# -- what the official trainer would have written ----------------------------------------------------------------------


def neighbours(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows with rotary pairs (i, i + K/2) in every head, reordered to neighbouring pairs."""
    order = [i // 2 + (i % 2) * (head_dim // 2) for i in range(head_dim)]
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    return heads[:, order].reshape(rows.shape)


def official_arrays(model: Transformer) -> dict[str, np.ndarray]:
    """The weights of `model` under the official names and in the official layouts, written out the long way."""
    config, state = model.config, {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    k = config.head_dim
    per_layer: dict[str, list[np.ndarray]] = {}

    def add(name: str, array: np.ndarray) -> None:
        per_layer.setdefault(f"language_model.model.h.{name}.weight", []).append(array)

    for i in range(config.num_hidden_layers):
        ours = {n.removeprefix(f"blocks.{i}."): w for n, w in state.items() if n.startswith(f"blocks.{i}.")}
        query, key, value = np.split(ours["mixer.w_qkv"], 3)
        for name, array in (("wq", neighbours(query, k)), ("wk", neighbours(key, k)), ("wv", value)):
            add(f"blocks.seq_modeling_block.{name}", array.T)
        add("blocks.seq_modeling_block.wo", ours["mixer.w_out"].T)
        for name in ("q_norm", "k_norm"):
            add(f"blocks.seq_modeling_block.{name}", neighbours(ours[f"mixer.{name}"], k))
        add("blocks.seq_norm", ours["mixer_norm.weight"])
        add("blocks.seq_post_norm", ours["mixer_post_norm.weight"])
        for kind, place, norm in (
            ("mlp", "blocks.feed_forward", "blocks.ffn"),
            ("fast", "prime_storage.feed_forward_prime", "prime_storage.ffn_prime"),
        ):
            if f"{kind}.w_in" in ours:
                gate, value = np.split(ours[f"{kind}.w_in"], 2)
                for name, array in (("w1", gate), ("w3", value), ("w2", ours[f"{kind}.w_out"])):
                    add(f"{place}.{name}", array.T)
                add(f"{norm}_norm", ours[f"{kind}_norm.weight"])
                add(f"{norm}_post_norm", ours[f"{kind}_post_norm.weight"])
    arrays = {name: np.stack(layers) for name, layers in per_layer.items()}
    arrays["language_model.model.wte.weight"] = state["embedding"]
    arrays["language_model.model.ln_f.weight"] = state["final_norm.weight"]
    if not config.tie_word_embeddings:
        arrays["language_model.lm_head.weight"] = state["head"].T
    return arrays


def write_step(
    folder: Path, arrays: dict[str, np.ndarray], layers: int | None = None, dtype: str = "float32", **metadata: Any
) -> Path:
    """A step's folder in the layout of the reference checkpoint, with chunks of `layers` layers (None: all).

    metadata: changes of `_CHECKPOINT_METADATA`.
    """
    import tensorstore as ts

    item = folder / ITEM
    item.mkdir(parents=True)
    facts = {"init_timestamp_nsecs": 1, "commit_timestamp_nsecs": 2, "custom_metadata": {}}
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps({**facts, **metadata}))
    tree: dict[str, Any] = {}
    empty = ("language_model.lm_head", "step_index.init")
    for name in (*arrays, *(name for name in empty if name not in arrays)):
        keys = name.split(".")
        value = {"value_type": "jax.Array" if name in arrays else "None", "skip_deserialize": name not in arrays}
        entry = {"key_metadata": [{"key": key, "key_type": 2} for key in keys], "value_metadata": value}
        tree[str(tuple(keys))] = entry
    described = {"tree_metadata": tree, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    (item / "_METADATA").write_text(json.dumps(described))
    for name, array in arrays.items():
        chunk = [min(layers, len(array)) if layers else len(array), *array.shape[1:]]
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}},
            "path": name,
            "store_data_equal_to_fill_value": True,
            "metadata": {
                "shape": list(array.shape),
                "chunks": chunk,
                "dtype": {"float32": "<f4", "float64": "<f8"}.get(dtype, dtype),
                "compressor": {"id": "zstd", "level": 1},
            },
        }
        ts.open(spec, create=True).result().write(array.astype(ts.dtype(dtype).numpy_dtype)).result()
    return folder


@pytest.fixture(scope="module")
def checkpoint(tensorstore: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one step of the small model; not to be changed."""
    return write_step(tmp_path_factory.mktemp("official") / "100", official_arrays(small_model()))


# -- the mapping, which needs neither tensorstore nor the reference ----------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False}, {"suffix_layers": 0}, {"num_attention_heads": 4}]
)
def test_official_arrays_become_our_weights(changes: dict[str, Any]) -> None:
    model = small_model(**changes)
    arrays = official_arrays(model)
    state = state_dict_from_official({f"params.{name}": array for name, array in arrays.items()}, model.config)
    assert {name: weight.tolist() for name, weight in state.items()} == {
        name: weight.tolist() for name, weight in model.named_parameters()
    }
    shapes = {name: array.shape for name, array in arrays.items()}
    changed = [f"{name}={value}" for name, value in changes.items()]
    found = official_config(shapes, None, [*SETTINGS, *changed])
    assert found == replace(model.config, {"initializer_range": 0.02})


def test_weights_of_norms_that_are_switched_off_are_ignored() -> None:
    """The official model has the weights of all norms, used or not."""
    arrays = official_arrays(small_model())
    off = {"qk_norm": False, "pre_norm": False, "post_norm": False}
    state = state_dict_from_official(arrays, small_config(**off))
    assert state.keys() == dict(Transformer(small_config(**off)).named_parameters()).keys()
    with pytest.raises(UserError, match=r"unknown parameters: .*extra"):
        state_dict_from_official({**arrays, "language_model.extra_norm.weight": np.zeros(3)}, small_config(**off))


def test_arrays_that_do_not_fit_are_refused() -> None:
    arrays = official_arrays(small_model())
    config = small_config()
    embedding = "language_model.model.wte.weight"
    with pytest.raises(UserError, match=r"lacks language_model.model.wte.weight, which"):
        state_dict_from_official({n: a for n, a in arrays.items() if n != embedding}, config)
    with pytest.raises(UserError, match=r"unknown parameters: language_model.more"):
        state_dict_from_official({**arrays, "language_model.more": np.zeros(3)}, config)
    with pytest.raises(UserError, match=r"language_model.model.wte.weight of shape \[49, 16\], .* \[50, 16\]"):
        state_dict_from_official({**arrays, embedding: arrays[embedding][1:]}, config)
    with pytest.raises(UserError, match=r"No official model has such a blocks\.0\.mixer"):
        state_dict_from_official(arrays, small_config(pattern=("mamba2", "window", "window", "window")))


def test_official_config_needs_what_the_shapes_do_not_tell() -> None:
    shapes = {name: array.shape for name, array in official_arrays(small_model()).items()}
    with pytest.raises(
        UserError, match=r"does not tell pattern, rope_theta, sliding_window, mini_batch_size: name a preset"
    ):
        official_config(shapes, None, [])
    with pytest.raises(UserError, match=r"does not tell mini_batch_size:"):
        official_config(shapes, None, ["model.pattern=window", "rope_theta=1e4", "sliding_window=12"])
    full = official_config(shapes, None, ["pattern=full", "rope_theta=1e4", "mini_batch_size=5"])
    assert (full.mixers[0], full.rope_theta) == ("full", 1e4)
    with pytest.raises(UserError, match=r"has num_hidden_layers 4, where the configuration has 3;"):
        official_config(shapes, None, [*SETTINGS, "num_hidden_layers=3"])
    with pytest.raises(
        UserError, match=r"has vocab_size 50, hidden_size 16, num_hidden_layers 4, .* configuration has 4096, 128, 8, "
    ):
        official_config(shapes, "tiny", [])
    with pytest.raises(UserError, match="no preset"):
        official_config(shapes, "tinny", [])
    with pytest.raises(UserError, match="leave out those that begin with train"):
        official_config(shapes, None, [*SETTINGS, "train.steps=3"])
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    changes = [f"{name}={getattr(small_config(), name)}" for name in names]
    assert official_config(shapes, "tiny", [*changes, "sliding_window=512"]).mini_batch_size == 64
    with pytest.raises(UserError, match="give a checkpoint of the official implementation"):
        official_config({"params.dense.kernel": (3, 4)}, None, SETTINGS)


def step_folder(folder: Path, *, metadata: dict[str, Any] | None = None, item: str = ITEM) -> Path:
    """A step's folder without any weights in it."""
    (folder / item).mkdir(parents=True)
    (folder / item / "_METADATA").write_text("{}")
    (folder / item / "manifest.ocdbt").touch()
    if metadata is not None:
        (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    return folder


def test_find_step_takes_the_last_complete_one(tmp_path: Path) -> None:
    committed = {"init_timestamp_nsecs": 1, "commit_timestamp_nsecs": 2}
    for number in (9, 100, 20):
        step_folder(tmp_path / str(number), metadata=committed)
    step_folder(tmp_path / "300.orbax-checkpoint-tmp-17")
    (tmp_path / "logs").mkdir()
    assert find_step(tmp_path, ITEM) == tmp_path / "100"
    assert find_step(tmp_path, ITEM, 9) == find_step(tmp_path / "9", ITEM) == tmp_path / "9"
    step_folder(tmp_path / "200", metadata={**committed, "commit_timestamp_nsecs": None})
    with pytest.warns(UserWarning, match=r"Step 200 is skipped: it was never committed\."):
        assert find_step(tmp_path, ITEM) == tmp_path / "100"
    with pytest.raises(UserError, match="has no step 7; there are: 9, 20, 100, 200"):
        find_step(tmp_path, ITEM, 7)
    with pytest.raises(UserError, match="is a single step; leave out the number 9"):
        find_step(tmp_path / "9", ITEM, 9)
    (tmp_path / "200/commit_success.txt").touch()  # an object store's own mark
    assert find_step(tmp_path, ITEM) == tmp_path / "200"


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ("uncommitted", "it was never committed"),
        ("item", "its model_weights was never finished"),
        ("no item", "it has no model_weights"),
        ("_METADATA", "its model_weights has no _METADATA"),
        ("manifest.ocdbt", "its model_weights has no manifest.ocdbt"),
    ],
)
def test_find_step_refuses_incomplete_steps(tmp_path: Path, damage: str, match: str, alone: bool) -> None:
    metadata = {"init_timestamp_nsecs": 1, "commit_timestamp_nsecs": None if damage == "uncommitted" else 2}
    step = step_folder(tmp_path / "100", metadata=metadata)
    if damage == "item":
        (step / ITEM).rename(step / f"{ITEM}.orbax-checkpoint-tmp-5")
    elif damage == "no item":
        shutil.rmtree(step / ITEM)
    elif damage != "uncommitted":
        (step / ITEM / damage).unlink()
    with pytest.raises(UserError, match=match):
        find_step(step if alone else tmp_path, ITEM)
    with pytest.raises(UserError, match=match):
        find_step(tmp_path, ITEM, 100)


def test_find_step_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        find_step(tmp_path / "nowhere", ITEM)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds no checkpoint; give a folder that has model_weights in it"):
        find_step(tmp_path, ITEM)
    unfinished = step_folder(tmp_path / "300.orbax-checkpoint-tmp-17")
    with pytest.raises(UserError, match="only unfinished steps"):
        find_step(tmp_path, ITEM)
    with pytest.raises(UserError, match="incomplete: it was never finished"):
        find_step(unfinished, ITEM)
    with pytest.raises(UserError, match="no step 300; there are: no finished ones"):
        find_step(tmp_path, ITEM, 300)


def test_missing_tensorstore_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_folder(tmp_path / "0")
    value = {"key_metadata": [{"key": "a"}], "value_metadata": {"value_type": "jax.Array"}}
    (step / ITEM / "_METADATA").write_text(json.dumps({"tree_metadata": {"a": value}}))
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(UserError, match=r'needs tensorstore: pip install "ttt-e2e\[official\]"'):
        convert_from_official(tmp_path, tmp_path / "model", settings=SETTINGS)


# -- whole checkpoints -------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused(tensorstore: Any, tmp_path: Path) -> None:
    arrays = official_arrays(small_model())
    name = next(name for name in arrays if name.endswith("w2.weight"))
    arrays[name].flat[-1] = np.nan
    write_step(tmp_path / "100", arrays, None)
    with pytest.raises(UserError, match=f"{name} that are not finite numbers"):
        convert_from_official(tmp_path, tmp_path / "model", settings=SETTINGS)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("layers", [None, 1, 3])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"suffix_layers": 0, "mini_batch_size": 5}])
def test_converted_folder_is_what_save_model_writes(
    tensorstore: Any, tmp_path: Path, layers: int | None, changes: dict[str, Any]
) -> None:
    model = small_model(**changes, initializer_range=0.02)
    write_step(tmp_path / "a #%20 path/100", official_arrays(model), layers)
    done = convert_from_official(tmp_path / "a #%20 path", tmp_path / "model", settings=SETTINGS)
    assert (done.step.name, done.dtype) == ("100", "float32")
    assert done.parameters == sum(weight.numel() for weight in model.parameters())
    assert load_config(tmp_path / "model") == model.config
    save_model(model, tmp_path / "saved", None)
    converted, saved = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "saved"))
    assert converted == saved
    loaded = load_transformer(tmp_path / "model")  # its digest fits
    assert all(torch.equal(weight, loaded.get_parameter(name)) for name, weight in model.named_parameters())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    notes = json.loads((tmp_path / "model/config.json").read_text())["notes"]
    assert notes["step"] == "100" and "official" in notes["from"]


def test_bfloat16_stays_bfloat16(tensorstore: Any, tmp_path: Path) -> None:
    model = small_model()
    write_step(tmp_path / "0", official_arrays(model), 1, "bfloat16")
    assert convert_from_official(tmp_path / "0", tmp_path / "model", settings=SETTINGS).dtype == "bfloat16"
    save_model(model, tmp_path / "saved", None, dtype=torch.bfloat16)
    converted, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "saved"))
    assert all(converted[name].dtype == torch.bfloat16 and torch.equal(converted[name], saved[name]) for name in saved)
    loaded = load_transformer(tmp_path / "model")
    assert torch.equal(loaded.embedding, model.embedding.bfloat16().float())


def test_tokenizer_is_copied(tmp_path: Path, checkpoint: Path) -> None:
    Tokenizer.train(["a b"], 300).save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"has \d+ tokens, but the checkpoint has a vocabulary of 50"):
        convert_from_official(
            checkpoint, tmp_path / "model", settings=SETTINGS, tokenizer=str(tmp_path / "tokenizer.json")
        )
    assert not (tmp_path / "model").exists()
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    model = small_model(vocab_size=tokenizer.vocab_size)
    write_step(tmp_path / "0", official_arrays(model))
    convert_from_official(
        tmp_path / "0", tmp_path / "model", settings=SETTINGS, tokenizer=str(tmp_path / "tokenizer.json")
    )
    assert Tokenizer.load(tmp_path / "model").digest == tokenizer.digest


def test_existing_folder_is_not_overwritten(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/diary.txt").write_text("mine")
    with pytest.raises(UserError, match="model exists; name another folder"):
        convert_from_official(checkpoint, tmp_path / "model", settings=SETTINGS)
    assert (tmp_path / "model/diary.txt").read_text() == "mine"


def assert_refused(folder: Path, match: str) -> None:
    """The conversion is refused and leaves nothing behind."""
    out = folder / "model"
    with pytest.raises(UserError, match=match):
        convert_from_official(folder / "100", out, settings=SETTINGS)
    assert sorted(path.name for path in folder.iterdir()) == ["100"]


def test_damaged_data_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "100")
    for data in (tmp_path / "100" / ITEM / "d").iterdir():
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    assert_refused(tmp_path, r"'language_model\..*' in .* is missing or damaged \([A-Z_]+\); use a complete copy")


def test_missing_chunk_is_not_read_as_zeros(tensorstore: Any, tmp_path: Path) -> None:
    write_step(tmp_path / "100", official_arrays(small_model()), 1)
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path / '100' / ITEM}/"}}
    store = tensorstore.KvStore.open(database).result()
    name = "language_model.model.h.blocks.feed_forward.w2.weight"
    store.delete_range(tensorstore.KvStore.KeyRange(f"{name}/3", f"{name}/4")).result()
    assert_refused(tmp_path, rf"'{name}' in .* is missing or damaged")


def test_missing_array_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "100")
    listed = tmp_path / "100" / ITEM / "_METADATA"
    listed.write_text(listed.read_text().replace("ln_f", "ln_g"))
    assert_refused(tmp_path, r"'language_model\.model\.ln_g\.weight' in .* is missing or damaged")
    listed.write_text(listed.read_text().replace('"key"', '"kex"'))
    assert_refused(tmp_path, "_METADATA is altered")


def test_missing_and_misshapen_arrays_are_refused(tensorstore: Any, tmp_path: Path) -> None:
    arrays = official_arrays(small_model())
    norm = "language_model.model.ln_f.weight"
    write_step(tmp_path / "a/100", {name: array for name, array in arrays.items() if name != norm})
    assert_refused(tmp_path / "a", rf"lacks {norm}, which")
    write_step(tmp_path / "b/100", {**arrays, norm: np.ones(17, np.float32)})
    assert_refused(tmp_path / "b", rf"{norm} of shape \[17\], but the configuration requires \[16\]")
    write_step(tmp_path / "c/100", arrays, dtype="float64")
    assert_refused(tmp_path / "c", "is float64; weights are float32")


MEASURE = """
import sys
from pathlib import Path
from ttt_e2e.convert.from_official import convert_from_official
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
folder, settings = Path(sys.argv[1]), sys.argv[2:]
convert_from_official(folder / "small", folder / "warm", settings=settings)  # without the memory of imports
before = peak()
convert_from_official(folder / "large", folder / "model", settings=settings)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tensorstore: Any, tmp_path: Path) -> None:
    """79 MiB of weights, in arrays of up to 19 MiB whose layers have 1.2 MiB."""
    write_step(tmp_path / "small/0", official_arrays(small_model()), 1)
    model = small_model(vocab_size=64, num_hidden_layers=16, hidden_size=256, intermediate_size=1200)
    write_step(tmp_path / "large/0", official_arrays(model), 1)
    run = [sys.executable, "-c", MEASURE, str(tmp_path), *SETTINGS]
    # Otherwise each of tensorstore's threads keeps what it has freed, more on a busy machine.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    rise = float(subprocess.run(run, env=environment, capture_output=True, check=True, text=True).stdout)
    size = (tmp_path / "model/model.safetensors").stat().st_size / 2**20
    assert size > 75
    assert rise < size / 2


# -- the command -------------------------------------------------------------------------------------------------------


def test_convert_from_official_on_the_command_line(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", "from-official", str(checkpoint.parent), str(tmp_path / "model"), *SETTINGS]
    assert main([*command, "--step", "100", "--quiet"]) == 0
    count = sum(weight.numel() for weight in small_model().parameters())
    assert capsys.readouterr().out == f"{tmp_path / 'model'}: step 100, {count:,} parameters in float32\n"
    assert load_transformer(tmp_path / "model").config == small_config(initializer_range=0.02)


# -- the reference checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "0"])
def test_the_official_checkpoint(tensorstore: Any, golden_dir: Path, tmp_path: Path, inside: str) -> None:
    """What the official trainer wrote is what its reference numbers were computed with, bit for bit."""
    settings = ("pattern=window", "sliding_window=32", "mini_batch_size=16", "rope_theta=500000")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = convert_from_official(golden_dir / "orbax_tiny_e2e" / inside, tmp_path / "model", settings=settings)
    reference = load_file(golden_dir / "tiny_e2e.safetensors")
    assert done.parameters == json.loads((golden_dir / "tiny_e2e.json").read_text())["info"]["n_params"]
    model = load_transformer(tmp_path / "model")
    arrays = {name.removeprefix("params."): t.numpy() for name, t in reference.items() if name.startswith("params.")}
    expected = state_dict_from_official(arrays, model.config)
    ours = dict(model.named_parameters())
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in expected.items())
    for learn, name in ((True, "token_nll"), (False, "token_nll_no_ttt")):
        with torch.no_grad():
            found = sequence_loss(model, reference["tokens"], bos=1, learn=learn)
        assert (found.nll_BT - reference[name]).abs().max() < 2e-5
