"""Comparisons from end to end: what is trained, what is evaluated, what is reported."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reproduce_helpers import FEW_RATES, MINUTE, SYSTEMS, make_comparison, read_report, read_results

from ttt_e2e.data.prepare import prepare
from ttt_e2e.errors import UserError
from ttt_e2e.files import with_digest
from ttt_e2e.reproduce.scales import SCALES
from ttt_e2e.reproduce.systems import SYSTEMS as FIGURE1_SYSTEMS
from ttt_e2e.reproduce.systems import WARM_STARTS, extending, pretraining

pytestmark = pytest.mark.usefixtures("one_thread")


def test_report_is_complete(undisturbed: Path) -> None:
    report = read_report(undisturbed)
    assert report["finished"] and not report["failed"] and report["hours"] > 0
    assert report["plan"]["comparisons"]["figure1"]["seeds"] == [0, 1]
    assert report["machine"]["torch"] == torch.__version__
    assert list(report["systems"]) == [*SYSTEMS, "ngram"]
    assert {(e["system"], e["seed"], e["context"]) for e in report["evaluations"]} == {
        (name, seed, context) for name in [*SYSTEMS, "ngram"] for seed in (0, 1) for context in (8, 32)
    }
    for system in (report["systems"][name] for name in SYSTEMS):
        rates = [row["lr"] for row in system["sweep"]]
        assert len(rates) == 5 and rates == sorted(rates)
        best = min(system["sweep"], key=lambda row: row["loss"])
        assert system["lr"] == best["lr"] and system["parameters"] > 0
    for evaluation in report["evaluations"]:
        assert len(evaluation["books"]) >= 2
        assert ("frozen" in evaluation) == (evaluation["system"] in ("dynamic", "ttt-e2e", "ngram"))
        assert ("inner_lr" in evaluation) == (evaluation["system"] == "dynamic")
    for row in report["comparison"]:
        assert row["difference"]["seeds"] == 2 and row["difference"]["books_error"] is not None
        if row["system"] == "full":
            assert row["difference"]["mean"] == 0
    assert report["by_position"]["context"] == 32 and len(report["by_position"]["rows"]) == 5
    assert len(report["latency"]) == 2 * len(SYSTEMS)
    for name in ("figure1.png", "figure1-by-position.png"):
        assert (undisturbed / name).read_bytes().startswith(b"\x89PNG")
    assert str(undisturbed.parent) not in (undisturbed / "figure1.json").read_text()  # no paths of this machine
    text = (undisturbed / "figure1.md").read_text()
    assert "Finished; " in text and text.count("| TTT-E2E |") == 6 and "(seeds " in text
    assert text.count("| n-gram floor |") == 3
    assert "| TTT-E2E | 8.0 | ~32.0 |" in text
    assert not list(undisturbed.rglob("checkpoints"))


def test_report_and_plan_have_these_keys_on_disk(undisturbed: Path) -> None:
    plan = json.loads((undisturbed / "plan.json").read_text())
    assert (plan["format"], plan["version"]) == ("ttt-e2e comparison", 4)
    assert sorted(plan) == ["comparisons", "configs", "device", "digests", "format", "scale", "sha256", "version"]
    assert sorted(plan["scale"]) == [
        *("contexts", "eval_batch_tokens", "eval_tokens", "extend_lr", "extend_tokens", "extend_tokens_per_step"),
        *("inner_lr_tokens", "inner_lrs", "latency_contexts", "latency_seconds", "micro_batch_tokens"),
        *("mini_batch_size", "name", "pretrain_context", "pretrain_tokens", "processes", "second_round"),
        *("settings", "size", "sliding_window", "sweep_factors", "sweep_tokens", "tokens_per_step", "val_share"),
        *("vocab_size", "warm_start_tokens"),
    ]
    report = read_report(undisturbed)
    assert sorted(report) == [
        *("baseline", "by_kind", "by_position", "comparison", "evaluations", "failed", "finished", "hours", "latency"),
        *("machine", "name", "plan", "systems", "version"),
    ]
    assert sorted(report["comparison"][0]["loss"]) == ["books", "books_error", "mean", "seeds", "seeds_error"]
    assert sorted(report["latency"][0]) == ["context", "decode_us", "prefill_us", "system", "train_us", "whole"]


def test_systems_read_the_same_tokens(undisturbed: Path) -> None:
    by_stage: dict[str, list[Any]] = {}
    for folder, result in read_results(undisturbed).items():
        if "loader" in result:
            _, _, stage = folder.split("/", 2)
            read = result["loader"], result["tokens"]
            by_stage.setdefault("sweep" if "sweep" in stage else stage, []).append(read)
    assert {len(read) for stage, read in by_stage.items() if stage != "sweep"} == {3} and len(by_stage["sweep"]) == 15
    for read in by_stage.values():
        assert all(other == read[0] for other in read)
    assert by_stage["seed0/pretrain"][0] != by_stage["seed1/pretrain"][0]
    for system in FIGURE1_SYSTEMS:
        first = pretraining(MINUTE, system, 3).train
        second = extending(MINUTE, system, 3, 32).train
        assert (first.context, first.batch, first.accumulate, first.steps, first.seed) == (8, 8, 2, 8, 3)
        assert (second.context, second.batch, second.accumulate, second.steps, second.seed) == (32, 2, 2, 3, 3)


def test_dynamic_evaluation_is_the_window_model_that_learns(undisturbed: Path) -> None:
    evaluations = {(e["system"], e["seed"], e["context"]): e for e in read_report(undisturbed)["evaluations"]}
    for seed, context in ((0, 8), (1, 32)):
        window, dynamic = (evaluations[name, seed, context] for name in ("window", "dynamic"))
        for frozen, expected in zip(dynamic["frozen"], window["books"], strict=True):
            assert frozen["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert dynamic["books"] != dynamic["frozen"]
        tried = {lr: loss for lr, loss in dynamic["inner_lr_losses"] if loss is not None}
        assert tried[dynamic["inner_lr"]] == min(tried.values()) and len(dynamic["inner_lr_losses"]) == 5
    assert not (undisturbed / "runs/dynamic/seed0/pretrain").exists()


def test_finished_jobs_are_not_repeated(data: Path, undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("result.json")}
    report = read_report(undisturbed)
    make_comparison(undisturbed, data, systems=["ttt-e2e"], contexts=[8])
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("result.json")} == before
    assert read_report(undisturbed) == report


def test_comparison_can_be_narrowed_and_widened(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    make_comparison(tmp_path, data, systems=["ttt-e2e"], contexts=[32])
    evaluated = {(e["system"], e["context"]) for e in read_report(tmp_path)["evaluations"]}
    assert evaluated == {("full", 32), ("ttt-e2e", 32), ("ngram", 32)}
    make_comparison(tmp_path, data, systems=["full"], contexts=[8])
    report = read_report(tmp_path)
    expected_rows = [("full", 8), ("full", 32), ("ttt-e2e", 32), ("ngram", 8), ("ngram", 32)]
    assert [(r["system"], r["context"]) for r in report["comparison"]] == expected_rows
    expected = {(e["system"], e["seed"], e["context"]): e["books"] for e in read_report(undisturbed)["evaluations"]}
    for e in report["evaluations"]:
        assert e["books"] == expected[e["system"], e["seed"], e["context"]]


def test_other_options_in_the_same_folder_are_refused(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    before = (undisturbed / "plan.json").read_bytes()
    with pytest.raises(UserError, match=r"scale.pretrain_tokens = 512, not 640; repeat its options"):
        make_comparison(undisturbed, data, dataclasses.replace(MINUTE, pretrain_tokens=640))
    (tmp_path / "text.txt").write_text("green fish and blue trees " * 100)
    (tmp_path / "held.txt").write_text("blue fish and green trees " * 100)
    options: dict[str, Any] = {"tokenizer": str(data / "tokenizer.json"), "progress": False}
    prepare([tmp_path / "text.txt"], tmp_path / "tokens", val=[tmp_path / "held.txt"], **options)
    with pytest.raises(UserError, match=r"holds a comparison with digests.data = \w+, not \w+; repeat"):
        make_comparison(undisturbed, tmp_path / "tokens")
    assert (undisturbed / "plan.json").read_bytes() == before


def test_folder_of_an_older_version_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"format": "ttt-e2e reproduce", "version": 2}')
    with pytest.raises(UserError, match=r"format version 2, .* reads version 4; finish it with the version"):
        make_comparison(tmp_path, data)


def test_comparisons_in_one_folder_share_jobs(data: Path, tmp_path: Path) -> None:
    make_comparison(tmp_path, data, FEW_RATES, systems=["ttt-e2e"], contexts=[8])
    shared = {folder: result for folder, result in read_results(tmp_path).items() if folder.startswith("runs/ttt-e2e")}
    first = read_report(tmp_path)
    make_comparison(tmp_path, data, FEW_RATES, name="ablations", systems=["no-meta"], contexts=[8])
    assert {folder: read_results(tmp_path)[folder] for folder in shared} == shared
    report = read_report(tmp_path, "ablations")
    assert report["finished"] and list(report["systems"]) == ["ttt-e2e", "no-meta", "ngram"]
    assert read_report(tmp_path) == first and set(report["plan"]["comparisons"]) == {"figure1", "ablations"}
    make_comparison(tmp_path, data, FEW_RATES, systems=["ttt-e2e"], contexts=[8])
    assert list(read_report(tmp_path)["systems"]) == ["full", "ttt-e2e", "ngram"]


def test_ablations_share_the_learning_rate_of_ttt_e2e(data: Path, tmp_path: Path) -> None:
    make_comparison(tmp_path, data, FEW_RATES, name="ablations", systems=["no-meta", "no-static-mlp"], contexts=[8])
    report = read_report(tmp_path, "ablations")
    assert [row["system"] for row in report["comparison"]] == ["ttt-e2e", "no-static-mlp", "no-meta", "ngram"]
    assert report["finished"] and report["comparison"][0]["difference"]["mean"] == 0
    assert [e["system"] for e in report["evaluations"] if "inner_lr" in e] == ["no-meta"]
    assert {name for name, system in report["systems"].items() if system["sweep"]} == {"ttt-e2e"}
    assert len({system["lr"] for name, system in report["systems"].items() if name != "ngram"}) == 1
    trained = json.loads((tmp_path / "runs/no-meta/seed0/pretrain/job.json").read_text())
    assert trained["config"]["train"]["lr"] == report["systems"]["ttt-e2e"]["lr"]
    assert not (tmp_path / "runs/no-meta/sweep").exists()


def test_warm_starts(data: Path, tmp_path: Path) -> None:
    outcome = make_comparison(tmp_path, data, FEW_RATES, name="warmstart", systems=None)
    report = read_report(tmp_path, "warmstart")
    assert report["finished"] and not outcome.problems
    results = read_results(tmp_path)
    names = [system.name for system in WARM_STARTS]
    assert [name for name in report["systems"] if not name.endswith("-first")] == [*names, "ngram-on"]
    assert {(e["system"], e["context"]) for e in report["evaluations"]} == {
        (n, c) for n in (*names, "ngram-on") for c in (8, 32)
    }
    # The n-grams are of the tokens of all stages.
    stages = json.loads((tmp_path / "runs/ngram-on/seed0/evaluate-32/job.json").read_text())["stages"]
    assert [(s["context"], s["tokens"], s["seed"]) for s in stages] == [(8, 512, 0), (8, 128, 1), (32, 192, 0)]
    for name in names:
        folder = f"runs/{name}/seed0/pretrain"
        if name == "switch":
            assert folder not in results
            continue
        assert results[folder]["tokens"] == 128 and len(report["systems"][name]["sweep"]) == 3
        assert not (tmp_path / folder / "start").exists()
        # All second stages read the same tokens, and other ones than the first stages.
        assert results[folder]["loader"] == results["runs/full-on/seed0/pretrain"]["loader"]
        assert results[folder]["loader"]["seed"] == 1
    # Within one window, the window changes nothing.
    losses = {(row["system"], row["context"]): row["loss"]["mean"] for row in report["comparison"]}
    assert losses["switch", 8] == pytest.approx(losses["full-on", 8], abs=1e-6)
    assert losses["switch", 32] != pytest.approx(losses["full-on", 32], abs=1e-6)
    text = (tmp_path / "warmstart.md").read_text()
    assert "full attention, first stage" in text and "Microseconds" not in text


def test_invalid_options_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no system 'wndow'.*there are: full, window"):
        make_comparison(tmp_path, data, systems=["wndow"])
    with pytest.raises(UserError, match="no context of 9; it has 8, 32"):
        make_comparison(tmp_path, data, contexts=[9])
    with pytest.raises(UserError, match="no document of more than 100000 tokens"):
        make_comparison(tmp_path, data, dataclasses.replace(MINUTE, contexts=(8, 100_000), eval_tokens=200_000))
    with pytest.raises(UserError, match=r"paper does not run on a CPU\. Needs eight GPUs"):
        make_comparison(tmp_path, data, SCALES["paper"])
    with pytest.raises(UserError, match="vocabulary"):
        make_comparison(tmp_path, data, SCALES["tiny"])
    assert not (tmp_path / "plan.json").exists()


def test_dry_run_prints_the_plan_and_trains_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_comparison(tmp_path, data, dry_run=True)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["plan.json"]
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    # Three models are trained, with steps of 64 tokens.
    assert rows["sweep"] == ["15", "0", f"{15 * 3 * 64:,}"]
    assert rows["pretrain"] == ["3", "0", f"{3 * 8 * 64:,}"]
    assert rows["extend"] == ["3", "0", f"{3 * 3 * 64:,}"]
    assert rows["evaluate"][:2] == ["8", "0"] and rows["ngram"][:2] == ["2", "0"] and rows["latency"][:2] == ["1", "0"]


def test_settings_that_an_earlier_version_did_not_have_change_no_plan(data: Path, tmp_path: Path) -> None:
    make_comparison(tmp_path, data, dry_run=True)
    plan = json.loads((tmp_path / "plan.json").read_text())
    for config in plan["configs"].values():
        del config["train"]["trainable"], config["train"]["lora"]
    (tmp_path / "plan.json").write_text(json.dumps(with_digest(plan)))
    make_comparison(tmp_path, data, dry_run=True)
    plan["configs"]["full"]["train"]["betas"] = [0.5, 0.5]
    (tmp_path / "plan.json").write_text(json.dumps(with_digest(plan)))
    with pytest.raises(UserError, match="other settings of full, from another version"):
        make_comparison(tmp_path, data, dry_run=True)
