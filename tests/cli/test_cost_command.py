"""`ttt-e2e cost`: of presets, of model folders, and of pretrained Transformers that are not converted yet."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from cli_helpers import run
from helpers import small_model

from ttt_e2e.config.parse import override
from ttt_e2e.config.presets import PRESETS
from ttt_e2e.config.schema import RunConfig, TrainConfig
from ttt_e2e.convert.hf_config import read_source
from ttt_e2e.convert.learning import LearningOptions, config_from_source, full_attention_config
from ttt_e2e.inner_loop.activations import activation_bytes
from ttt_e2e.model.checkpoint import save_model
from ttt_e2e.model.cluster import Cluster, estimate
from ttt_e2e.model.cost import cost, hours, parameters, training_bytes
from ttt_e2e.training.optimizer import make_optimizer

QWEN = dict(
    model_type="qwen3",
    vocab_size=500,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "Qwen3-0.00006B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN))
    return folder


def test_cost_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cost", "tiny", "--context", "8K", "2M", 1000) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^{context} .*\(", out, re.M) for context in ("8K", "2M", "1000"))
    assert f"{parameters(PRESETS['tiny'].model):,} parameters" in out
    assert run("cost", "tiny-full") == 0
    assert "(" not in capsys.readouterr().out.split("\n\n")[1]  # nothing to compare with
    assert run("cost", "tiny", "--json", "num_hidden_layers=4", "train.dtype=bfloat16") == 0
    report = json.loads(capsys.readouterr().out)
    model = override(PRESETS["tiny"], ["num_hidden_layers=4"]).model
    assert report["bytes"]["bfloat16"] == 2 * parameters(model)
    assert report["costs"]["tiny"] == [asdict(cost(model, context, 2)) for context in (4096, 16384, 65536)]
    assert set(report["costs"]) == {"tiny", "tiny-full"}


def test_cost_of_a_pretrained_transformer(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It counts what a conversion with the same options would make, and the original, from config.json alone."""
    source = read_source(QWEN, checkpoint)
    options = ("--window", 128, "--fast", "split", "--fast-rank", 4, "--suffix", 0.5)
    expected = config_from_source(source, LearningOptions(sliding_window=128, fast="split", fast_rank=4, suffix=0.5))
    for where in (checkpoint, checkpoint / "config.json"):
        assert run("cost", where, *options, "--context", 300, "--train", 1000, "--flops", "25G", "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert report["costs"] == {
            "Qwen3-0.00006B": [asdict(cost(expected, 300, 2))],
            "the original": [asdict(cost(full_attention_config(source), 300, 2))],
        }
        assert report["bytes"]["training"] == 16 * parameters(expected)
        training = report["costs"]["Qwen3-0.00006B"][0]["operations"]["training"]
        assert report["training"]["hours"][0]["training"] == pytest.approx(training * 1000 / 25e9 / 3600)
    assert run("cost", checkpoint, "--train", "1K") == 0
    out = capsys.readouterr().out
    assert "at 400 T operations a second" in out and re.search(r"^2K +[\d.e-]+ +[\d.e-]+$", out, re.M)


def test_full_attention_config_counts_the_original(checkpoint: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    config = transformers.Qwen3Config(**QWEN)
    original = transformers.Qwen3ForCausalLM(config)
    assert parameters(full_attention_config(read_source(QWEN, checkpoint))) == sum(
        p.numel() for p in original.parameters()
    )


def test_cost_of_a_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    save_model(model, tmp_path / "mine", None)
    assert run("cost", tmp_path / "mine", "--context", 100, "--json") == 0
    assert json.loads(capsys.readouterr().out)["costs"] == {"mine": [asdict(cost(model.config, 100, 2))]}


def test_cost_counts_activations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(small_model(), tmp_path / "mine", None)
    argv = ("cost", tmp_path / "mine", "--context", 16, 64, "--activations", "batch=6", "accumulate=2")
    assert run(*argv, "--json") == 0
    config = override(RunConfig(small_model().config, PRESETS["3b"].train), ["batch=6", "accumulate=2"])
    expected = [sum(activation_bytes(config, context)) for context in (16, 64)]
    assert json.loads(capsys.readouterr().out)["bytes"]["activations"] == expected
    assert run(*argv) == 0
    assert re.search(
        r"Activations of a step, of 3 sequences at a time, .* at 16, .* at 64$", capsys.readouterr().out, re.M
    )


LITTLE = (
    "cost",
    "tiny",
    "num_hidden_layers=3",
    "suffix_layers=1",
    "hidden_size=32",
    "sliding_window=64",
    "context=128",
)


def test_cost_on_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """Each GPU keeps as many sequences as with the first number; larger groups, or more of them by the settings."""
    assert run(*LITTLE, "batch=32", "accumulate=2", "--gpus", 8, 64, "--hardware", "a100", "--json") == 0
    report = json.loads(capsys.readouterr().out)["cluster"]
    config = override(PRESETS["tiny"], [*LITTLE[2:], "batch=32", "accumulate=2"])
    activations = activation_bytes(override(config, ["batch=2", "accumulate=1"]), 128)
    more = override(config, ["batch=256"])
    estimates = [
        estimate(config, Cluster("a100", 8, 8), *activations),
        estimate(more, Cluster("a100", 64, 64), *activations),
    ]
    assert report == {"hardware": "a100", "utilization": 0.4, "estimates": [asdict(at) for at in estimates]}

    argv = (*LITTLE, "batch=8", "data_parallel_shard_degree=4", "data_parallel_replicate_degree=2", "--gpus", 8, 16)
    assert run(*argv, "--utilization", 0.25) == 0
    out = capsys.readouterr().out
    assert "8 x h100, 4 shards, 1 of 128 at a time" in out and "at 25 % of 67 T operations a second" in out
    rows = [re.search(rf"^{n} +4 +{n} .* s +[\d,]+ +\d+ %$", out, re.M) for n in (8, 16)]
    assert all(rows) and re.search(r"^total +[\d.]+ MiB$", out, re.M)


def test_a_training_that_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    """The report is printed all the same, and the advice is right."""
    argv = (*LITTLE, "context=16384", "batch=4096", "activation_checkpointing=none", "--gpus", 8, "--json")
    assert run(*argv) == 1
    out, error = capsys.readouterr()
    assert json.loads(out)["cluster"]["estimates"][0]["memory"]["activations"] > 80e9
    found = re.search(r"the h100 has 74.51 GiB; with accumulate=(\d+) it would need at least (\S+ \S+)\.$", error)
    assert found is not None
    assert run(*argv[:-1], f"accumulate={found[1]}") == 2  # after --gpus stand numbers only
    capsys.readouterr()
    assert run(*argv[:-3], f"accumulate={found[1]}", "--gpus", 8) == 0
    assert re.search(rf"^total +{found[2]}$", capsys.readouterr().out, re.M)
    assert run(*argv[:-3], f"accumulate={int(found[1]) // 2}", "--gpus", 8) == 1  # one less would not do
    capsys.readouterr()

    huge = (*LITTLE, "context=268435456", "batch=8", "activation_checkpointing=sqrt", "--gpus", 8)
    assert run(*huge) == 1
    assert re.search(
        r"one sequence of 256M needs .* with activation_checkpointing=sqrt and recompute_prefix=true: choose",
        capsys.readouterr().err,
    )


def test_training_bytes_are_weights_gradients_and_moments() -> None:
    """Weights, gradients and moments, as PyTorch makes them."""
    model = small_model()
    optimizer = make_optimizer(model, TrainConfig())
    sum(weight.sum() for weight in model.parameters()).backward()
    optimizer.step()
    held = [t for w in model.parameters() for t in (w, w.grad, optimizer.state[w]["exp_avg"])]
    held += [optimizer.state[w]["exp_avg_sq"] for w in model.parameters()]
    assert training_bytes(model.config) == sum(t.numel() * t.element_size() for t in held if t is not None)
    assert hours(2e9, 3600, 1e12) == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("tiny --window 3", "of a preset or a model folder change settings"),
        ("nowhere", "There is no preset 'nowhere'"),
        ("tiny --flops fast", "'fast' is not a number of operations a second"),
        ("./nowhere", "There is no"),
        ("tiny --gpus 12", "12 GPUs are not whole nodes of 8"),
        ("tiny --gpus 8", "A batch of 4 sequences does not split over 8 GPUs"),
        ("tiny --gpus 4 --hardware h300", "no figures of 'h300'"),
        ("tiny data_parallel_shard_degree=3 --gpus 4", "does not fit 4 processes"),
        ("tiny --hardware h100", "add --gpus N"),
        ("tiny --utilization 0.5", "add --gpus N"),
        ("{checkpoint} --window 1024", "longer than 512"),
        ("{checkpoint} --suffix 2", "--suffix: '2' is not a number above 0 and at most 1"),
    ],
)
def test_invalid_models_and_options_are_errors(
    argv: str, sentence: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("cost", *argv.format(checkpoint=checkpoint).split()) in (1, 2)
    assert sentence in capsys.readouterr().err


def test_a_name_on_hugging_face_without_a_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run("cost", "no-such-owner/no-such-model") == 1
    assert "could not be downloaded" in capsys.readouterr().err
