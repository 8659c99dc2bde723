"""`reproduce pretrained`: all systems start from one model and train its last blocks."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_model
from reproduce_helpers import read_report, read_results
from safetensors.torch import load_file

from ttt_e2e.config.schema import replace
from ttt_e2e.data.prepare import prepare
from ttt_e2e.errors import UserError
from ttt_e2e.files import read_json
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.checkpoint import TOKENIZER, WEIGHTS, load_transformer, save_model
from ttt_e2e.reproduce.held_out import BookReader, held_out_books
from ttt_e2e.reproduce.run import reproduce
from ttt_e2e.reproduce.scales import Scale, pretrained_scale
from ttt_e2e.reproduce.start import in_shape_of
from ttt_e2e.reproduce.systems import from_one_model, pretraining
from ttt_e2e.reproduce.tables import position_cells

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("full", "window", "hybrid", "gated-deltanet", "ttt-kvb", "dynamic", "ttt-e2e")
SHORT = {"full", "hybrid"}  # those that cannot read more than they were trained on


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of two kinds of texts, from two folders."""
    folder, choices = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = {"books": ["the", "green", "bird", "sang", "and"], "code": ["def", "f(x):", "return", "x", "+ 1"]}
    for split, kind, i in ((s, k, i) for s in ("train", "val") for k in words for i in range(4)):
        path = folder / split / kind / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(choices.choices(words[kind], k=120)))
    prepare([folder / "train"], folder / "tokens", val=[folder / "val"], vocab_size=272, progress=False)
    return folder / "tokens"


@pytest.fixture(scope="module")
def model(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model: parallel fast MLPs in its last two blocks, a window of 8 with sinks."""
    shape: dict[str, Any] = dict(post_norm=False, parallel_mlp=True, fast_intermediate_size=8, attention_sink=True)
    folder = tmp_path_factory.mktemp("model") / "model"
    changes = dict(vocab_size=272, sliding_window=8, mini_batch_size=4, suffix_intermediate_size=16)
    save_model(small_model(**shape, **changes), folder, tokens / TOKENIZER)
    return folder


def minute_scale(model: Path) -> Scale:
    """The scale of a few steps."""
    scale = pretrained_scale(model, tokens=4 * 32)
    return dataclasses.replace(
        scale, pretrain_context=32, contexts=(32, 64), tokens_per_step=32, micro_batch_tokens=32, sweep_tokens=2 * 32,
        inner_lr_tokens=64, eval_tokens=64, eval_batch_tokens=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tokens: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole comparison."""
    out = tmp_path_factory.mktemp("pretrained") / "out"
    outcome = reproduce(
        "pretrained", minute_scale(model), out, data=tokens, num_workers=0, device="cpu", progress=False
    )
    assert not outcome.problems and not outcome.interrupted
    return out


def test_every_system_has_its_best_of_three_rates(done: Path) -> None:
    report = read_report(done, "pretrained")
    assert report["finished"] and not report["failed"]
    assert list(report["systems"]) == [*NAMES, "ngram"]
    for name in NAMES:
        sweep = report["systems"][name]["sweep"]
        assert [row["lr"] for row in sweep] == pytest.approx([1e-4, 3e-4, 9e-4])
        assert report["systems"][name]["lr"] == min(sweep, key=lambda row: row["loss"])["lr"]
    evaluated = {(e["system"], e["context"]) for e in report["evaluations"]}
    assert evaluated == {(name, c) for name in (*NAMES, "ngram") for c in (32, 64)} - {(name, 64) for name in SHORT}
    assert {e["system"] for e in report["evaluations"] if "inner_lr" in e} == {"dynamic"}
    assert {e["system"] for e in report["evaluations"] if "frozen" in e} == {"dynamic", "ttt-e2e", "ngram"}


def test_every_system_starts_with_the_predictions_of_the_window_or_of_full_attention(model: Path) -> None:
    source = load_transformer(model)
    texts = torch.randint(1, 272, (2, 33), generator=torch.Generator().manual_seed(0))
    losses = {}
    for system in from_one_model(minute_scale(model)):
        config = pretraining(minute_scale(model), system, 0).model
        start = in_shape_of(source, config)
        assert start.config == config
        losses[system.name] = sequence_loss(start, texts, learn=False).nll_BT
    inside = losses["full"][:, : source.config.sliding_window]
    for name, loss in losses.items():
        torch.testing.assert_close(loss[:, : source.config.sliding_window], inside, rtol=1e-5, atol=1e-5)
        if name not in SHORT:
            torch.testing.assert_close(loss, losses["window"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(losses["full"], losses["window"], rtol=1e-2)


def test_a_model_with_added_fast_mlps_has_no_start_without_them() -> None:
    model = small_model(post_norm=False)
    with pytest.raises(UserError, match="converted with --fast split"):
        in_shape_of(model, replace(model.config, {"suffix_layers": 0}))


def test_only_the_suffix_is_trained(done: Path, model: Path) -> None:
    before = load_file(model / WEIGHTS)
    for name in ("full", "window", "ttt-e2e"):
        after = load_file(done / f"runs/{name}/seed0/pretrain/run/model" / WEIGHTS)
        changed = {key for key in before.keys() & after.keys() if not torch.equal(before[key], after[key])}
        inside = {key for key in before if key.startswith(("blocks.2", "blocks.3")) and "blocks.2.mixer" not in key}
        assert changed == {key for key in (*inside, "final_norm.weight") if key in after}
        assert any(key.endswith("log_lr_scale") for key in after) == (name == "ttt-e2e")
        assert any("sink" in key for key in after) == (name != "full")
    for name in ("hybrid", "gated-deltanet", "ttt-kvb"):
        after = load_file(done / f"runs/{name}/seed0/pretrain/run/model" / WEIGHTS)
        below = [key for key in before if key.startswith(("embedding", "head", "blocks.0", "blocks.1"))]
        assert len(below) > 10 and all(torch.equal(before[key], after[key]) for key in below)
        # After a few steps the memory is no longer silent.
        gates = [key for key in after if key.endswith(("mixer.deltanet.w_out", "mixer.read_norm"))]
        assert len(gates) == (0 if name == "hybrid" else 2)
        above = [key for key in after if key.startswith(("blocks.2", "blocks.3"))]
        assert all(not torch.equal(after[key], before[key]) for key in above if key in before and "mlp" not in key)
        assert all(after[key].any() for key in above if key.endswith("w_out"))


def test_systems_with_one_prefix_share_its_outputs_and_its_texts(done: Path) -> None:
    settings = {f.parent.relative_to(done).as_posix(): read_json(f) for f in done.glob("runs/**/job.json")}
    caches = {job.split("/")[1]: Path(s["cache"]).name for job, s in settings.items() if s.get("cache")}
    assert caches == {"full": "prefix-full-seed0", "window": "prefix-window-seed0", "ttt-e2e": "prefix-window-seed0"}
    trained = {job: r["loader"] for job, r in read_results(done).items() if job.endswith("seed0/pretrain")}
    assert len(trained) == 6 and len({json.dumps(loader) for loader in trained.values()}) == 1


def test_the_losses_are_those_of_the_models(done: Path, tokens: Path) -> None:
    from ttt_e2e.data.shards import TokenSet

    held_out = TokenSet.open(tokens, "val")
    books = held_out_books(held_out, 64, 64)
    results = read_results(done)
    for name, trained, learn in (
        ("window", "window", False),
        ("dynamic", "window", True),
        ("ttt-e2e", "ttt-e2e", True),
    ):
        reader = BookReader(
            load_transformer(done / f"runs/{trained}/seed0/pretrain/run/model"), held_out.bos, 64, torch.bfloat16
        )
        result = results[f"runs/{name}/seed0/evaluate-64"]
        expected = reader.book_losses(books, 64, learn=learn, inner_lr=result.get("inner_lr"))
        assert [book["loss"] for book in result["books"]] == pytest.approx([book["loss"] for book in expected])


def test_report_tells_kinds_of_texts_apart(done: Path) -> None:
    report = read_report(done, "pretrained")
    assert [(p["kind"], p["context"]) for p in report["by_kind"]] == [
        ("books", 32), ("books", 64), ("code", 32), ("code", 64),
    ]  # fmt: skip
    assert [row["system"] for row in report["by_kind"][1]["rows"]] == [*(n for n in NAMES if n not in SHORT), "ngram"]
    text = (done / "pretrained.md").read_text()
    assert "## books: loss by position in texts of 32" in text and "## code: loss by position in texts of 64" in text
    assert (done / "pretrained-code-64.png").read_bytes().startswith(b"\x89PNG")
    for file in ("pretrained.json", "plan.json"):
        assert str(done.parent.parent) not in (done / file).read_text()  # no paths of this machine


def test_position_cells_are_means_and_shares_of_the_distance() -> None:
    def row(system: str, *losses: float) -> dict[str, Any]:
        return {"system": system, "bins": [{"loss": {"mean": loss}} for loss in losses]}

    positions = {
        "position_edges": [0, 256, 512, 1024],
        "rows": [row("full", 4.0, 3.0, 2.0), row("window", 4.0, 3.0, 3.0), row("ttt-e2e", 4.0, 3.0, 2.25)],
    }
    assert position_cells(positions) == [["3.5000", "2.0000"], ["3.5000", "3.0000"], ["3.5000", "2.2500 (75%)"]]


def test_it_continues_with_the_same_model_only(done: Path, tokens: Path, model: Path, tmp_path: Path) -> None:
    other = load_transformer(model)
    with torch.no_grad():
        other.final_norm.weight.add_(1.0)
    save_model(other, tmp_path / "other", tokens / TOKENIZER)
    options: dict[str, Any] = dict(data=tokens, num_workers=0, device="cpu", progress=False, dry_run=True)
    reproduce("pretrained", minute_scale(model), done, **options)
    with pytest.raises(UserError, match=r"digests\.start_from"):
        reproduce("pretrained", minute_scale(tmp_path / "other"), done, **options)


def test_a_model_that_never_learns_is_refused(tmp_path: Path) -> None:
    save_model(small_model(suffix_layers=0, mini_batch_size=None), tmp_path / "standard", None)
    with pytest.raises(UserError, match="not a model that learns while it reads; make one with `ttt-e2e convert`"):
        pretrained_scale(tmp_path / "standard")
