"""The trainer as a user meets it. Run as a program, this file trains as one of the processes of torchrun."""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import made_up_tokens, run_group, set_back_clock, small_config, start_copy

from ttt_e2e.config.parse import override
from ttt_e2e.config.schema import RunConfig, TrainConfig
from ttt_e2e.data.shards import TokenSet
from ttt_e2e.errors import UserError
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.model.checkpoint import load_transformer, model_digest
from ttt_e2e.training import parallelize, trainer
from ttt_e2e.training.checkpoint import list_checkpoints
from ttt_e2e.training.metrics import read_metrics
from ttt_e2e.training.trainer import TrainResult, train

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = RunConfig(
    small_config(vocab_size=272, initializer_range=0.05),
    TrainConfig(
        context=20,
        batch=4,
        accumulate=2,
        steps=12,
        lr=1e-2,
        eval_every=4,
        eval_tokens=200,
        checkpoint_every=3,
        keep_checkpoints=2,
    ),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred little documents."""
    return made_up_tokens(tmp_path_factory.mktemp("data"), 100)


def run(data: Path, out: Path, *changes: str, **options: Any) -> TrainResult:
    return train(override(CONFIG, list(changes)), data, out, progress=False, device="cpu", **options)


def measured(out: Path) -> list[dict[str, Any]]:
    """The metrics without the measured times."""
    timing = {"seconds", "tokens_per_second"}
    return [{key: value for key, value in line.items() if key not in timing} for line in read_metrics(out)]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(data, out)
    return out


def test_run_learns_and_leaves_all_files(data: Path, whole: Path) -> None:
    lines = measured(whole)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert set(steps[0]) == {"step", "loss", "lr", "inner_lr", "grad_norm", "tokens"}
    assert steps[-1]["tokens"] == 12 * 4 * 20
    evaluations = [line for line in lines if "eval" in line]
    assert [line["step"] for line in evaluations] == [4, 8, 12]
    last = evaluations[-1]["eval"]
    assert last["gain"] == pytest.approx(last["loss_without_learning"] - last["loss"])
    assert len(last["gain_by_quarter"]) == 4
    assert [folder.name for folder in list_checkpoints(whole)] == ["step-00000012", "step-00000009"]
    model = load_transformer(whole / "model")
    assert model_digest(model) == model_digest(load_transformer(list_checkpoints(whole)[0]))
    assert (whole / "model/tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()
    assert json.loads((whole / "config.json").read_text())["train"]["steps"] == 12


def test_accumulation_does_not_change_the_losses(data: Path, whole: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "run", "accumulate=1", "activation_checkpointing=sqrt")
    for ours, theirs in zip(measured(tmp_path / "run"), measured(whole), strict=True):
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_compiled_run_is_the_same_when_resumed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ("batch=2", "accumulate=1", "steps=4", "eval_every=0", "activation_checkpointing=none")
    run(data, tmp_path / "plain", *changes)
    torch._dynamo.reset()
    monkeypatch.setattr(
        parallelize, "compiled_functions", lambda device, **sharded: compiled_functions(device, "aot_eager", **sharded)
    )
    sequence_loss, static_caches = trainer.sequence_loss, []

    def interrupting(*args: Any, **options: Any) -> Any:
        static_caches.append(options["functions"].static_cache)
        if len(static_caches) == 4 + 2:  # in the second run's second step
            os.kill(os.getpid(), signal.SIGINT)
        return sequence_loss(*args, **options)

    monkeypatch.setattr(trainer, "sequence_loss", interrupting)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Continuing without compilation")
        run(data, tmp_path / "whole", *changes, compile=True)
        assert run(data, tmp_path / "stopped", *changes, compile=True).step == 2
        run(data, tmp_path / "stopped", *changes, compile=True, resume=True)
    assert all(static_caches) and len(static_caches) == 8
    assert measured(tmp_path / "stopped") == measured(tmp_path / "whole")
    for ours, theirs in zip(measured(tmp_path / "whole"), measured(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_fast_weights_of_low_rank_are_trained(data: Path, tmp_path: Path) -> None:
    """They train like all others, in either way of the outer gradient; another rank is another model."""
    run(data, tmp_path / "run", "fast_rank=2")
    run(data, tmp_path / "again", "fast_rank=2", "activation_checkpointing=none")
    lines, again = ([line for line in measured(tmp_path / name) if "loss" in line] for name in ("run", "again"))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in lines], abs=1e-4)
    model = load_transformer(tmp_path / "run/model")
    assert all(block.fast.up_in.abs().max() > 1e-4 for block in model.suffix)
    with pytest.raises(UserError, match="fast_rank = 2, not 3"):
        run(data, tmp_path / "other", "fast_rank=3", start_from=tmp_path / "run/model")


def test_inner_rates_start_in_a_trained_model_and_stay(data: Path, whole: Path, tmp_path: Path) -> None:
    """A model without learned rates gets them when it is trained further, and its first loss is the same."""
    changes = ("steps=3", "warmup_steps=0", "inner_warmup_steps=0", "eval_every=0", "truncated_bptt_steps=3")
    run(data, tmp_path / "plain", *changes, start_from=whole / "model")
    run(data, tmp_path / "rates", *changes, "inner_loop.learned_lr=true", start_from=whole / "model")
    plain, rates = (measured(tmp_path / name) for name in ("plain", "rates"))
    assert rates[0]["loss"] == plain[0]["loss"] and rates[2]["loss"] != plain[2]["loss"]
    model = load_transformer(tmp_path / "rates/model")
    assert all(block.log_lr_scale.abs().min() > 1e-3 for block in model.suffix)
    with pytest.raises(UserError, match=r"learned_lr = True, not False; set model\.inner_loop\.learned_lr=True"):
        run(data, tmp_path / "other", start_from=tmp_path / "rates/model")


def test_training_on_zarr_arrays(data: Path, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(tmp_path / "arrays"), mode="w")
    for split in ("train", "val"):
        tokens = TokenSet.open(data, split)
        flat = np.concatenate([tokens.document(i) for i in range(len(tokens))]).astype(np.uint32)
        group.create_array(split, data=flat)
    with pytest.raises(UserError, match=r"is not a folder of prepared tokens; write it with `ttt-e2e prepare`"):
        run(tmp_path / "arrays", tmp_path / "run")
    with pytest.raises(UserError, match="leave --tokenizer out"):
        run(data, tmp_path / "run", tokenizer=str(data / "tokenizer.json"))
    summary = run(tmp_path / "arrays", tmp_path / "run", "steps=2", tokenizer=str(data / "tokenizer.json"))
    assert summary.evaluation is not None and summary.loss is not None
    assert (tmp_path / "run/model/tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()


def test_standard_model_is_trained(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = run(data, out, "suffix_layers=0", "pattern=full", "mini_batch_size=none", "steps=2", "log_every=2")
    assert summary.evaluation is not None
    assert set(summary.evaluation) == {"loss", "tokens"}
    assert [line["step"] for line in measured(out)] == [2, 2]


@pytest.mark.parametrize("change", ["intermediate_size=16777216", "hidden_size=1048576", "num_attention_heads=65536"])
def test_a_model_larger_than_the_memory_is_refused_before_anything_is_made(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr("ttt_e2e.training.trainer.memory_bytes", lambda device: 2**33)
    with pytest.raises(UserError, match=r"takes at least .*B of memory, and the cpu has 8 GiB"):
        run(data, tmp_path / "run", change, *(["head_dim=256"] if "heads" in change else []))
    assert not (tmp_path / "run").exists()


def test_existing_run_is_not_overwritten(data: Path, whole: Path, tmp_path: Path) -> None:
    before = measured(whole)
    with pytest.raises(UserError, match="already holds a run; continue it with --resume"):
        run(data, whole)
    assert measured(whole) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        run(data, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        run(data, tmp_path / "notes.txt")


def test_resuming_a_finished_run_changes_nothing(data: Path, whole: Path) -> None:
    before, weights = measured(whole), (whole / "model/model.safetensors").read_bytes()
    summary = run(data, whole, resume=True)
    assert (summary.step, summary.loss, summary.interrupted) == (12, None, False)
    assert measured(whole) == before
    assert (whole / "model/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("change", ["lr=0.5", "inner_loop.max_grad_norm=0.5", "context=24", "steps=13"])
def test_resume_refuses_another_configuration(data: Path, whole: Path, change: str) -> None:
    with pytest.raises(UserError, match=rf"\.{change.split('=')[0]} = .* resume it with the same configuration"):
        run(data, whole, change, resume=True)


def test_resume_allows_another_cadence(data: Path, whole: Path) -> None:
    assert run(data, whole, "keep_checkpoints=5", "eval_every=0", resume=True).step == 12
    run(data, whole, resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_and_the_resumed_run_is_the_same(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    sequence_loss, calls = trainer.sequence_loss, []

    def interrupting(*args: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == 9:  # in the middle of the fifth step
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # under torchrun one Ctrl-C arrives twice
        return sequence_loss(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "sequence_loss", interrupting)
        summary = run(data, tmp_path / "run")
    assert (summary.interrupted, summary.step, summary.model) == (True, 5, None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not run(data, tmp_path / "run", resume=True).interrupted
    assert measured(tmp_path / "run") == measured(whole)


def test_clock_that_goes_backwards_changes_nothing(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest checkpoint is that of the latest step, whatever the times of the files are."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        set_back_clock(patch.setattr)
        patch.setattr(trainer, "sequence_loss", trainer.sequence_loss)
        interrupt(9)  # two micro-batches a step
        assert run(data, out).step == 5
    set_back_clock(monkeypatch.setattr)
    for age, folder in enumerate(list_checkpoints(out)):
        for path in (folder, *folder.iterdir()):
            os.utime(path, (1e9 * age, 1e9 * age))
    assert not run(data, out, resume=True).interrupted
    assert measured(out) == measured(whole)
    for name in ("checkpoints/step-00000009/optimizer.safetensors", "model/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_damaged_newest_checkpoint_is_skipped(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(data, out)
    weights = (out / "model/model.safetensors").read_bytes()
    (list_checkpoints(out)[0] / "optimizer.safetensors").write_bytes(b"nothing")
    (out / "metrics.jsonl").write_text((out / "metrics.jsonl").read_text() + '{"step": 13, "lo')
    (out / "checkpoints/.step-00000013.123.part").mkdir()
    (out / ".metrics.jsonl.123.part").write_text("left by a killed process")
    run(data, out, resume=True)
    assert not list(out.rglob(".*"))
    assert "optimizer.safetensors is altered or cut short: it has 7 of" in capsys.readouterr().out
    assert measured(out) == measured(whole)
    assert (out / "model/model.safetensors").read_bytes() == weights


def test_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence_loss, calls = trainer.sequence_loss, []

    def exploding(*args: Any, **options: Any) -> Any:
        calls.append(0)
        result = sequence_loss(*args, **options)
        return result._replace(loss=result.loss * float("nan")) if len(calls) == 10 else result

    monkeypatch.setattr(trainer, "sequence_loss", exploding)
    with pytest.raises(UserError, match=r"Step 5 has a loss of nan .* kept: .*step-00000003\. .* lower train\.lr"):
        run(data, tmp_path / "run")
    assert [line["step"] for line in measured(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]


def test_data_of_another_vocabulary_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocabulary of 272, but the model has 300"):
        run(data, tmp_path / "run", "vocab_size=300")
    assert not (tmp_path / "run").exists()


def test_batch_that_does_not_split_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not split"):
        run(data, tmp_path / "run", "batch=3")


def test_missing_device_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no device 'abacus'"):
        train(CONFIG, data, tmp_path / "run", device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="There is no device 'cuda'"):
            train(CONFIG, data, tmp_path / "run", device="cuda")


def test_extension_starts_from_trained_weights(data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ("context=40", "batch=2", "steps=2", "inner_warmup_steps=0", "rope_theta=1e6")
    (whole / "model/chat_template.jinja").write_text("{{ messages }}")
    run(data, out, *changes, start_from=whole / "model")
    assert (out / "model/chat_template.jinja").read_text() == "{{ messages }}"
    first, fresh = measured(out)[0]["loss"], measured(whole)[0]["loss"]
    assert first < fresh - 0.5
    assert json.loads((out / "config.json").read_text())["start_from"] == str((whole / "model").resolve())
    with pytest.raises(UserError, match=r"started from .*/model, not from"):
        run(data, out, *changes, resume=True, start_from=list_checkpoints(whole)[-1])
    shutil.copytree(whole / "model", tmp_path / "moved")
    assert run(data, out, *changes, resume=True, start_from=tmp_path / "moved").step == 2


def test_start_from_a_model_that_does_not_fit_is_refused(data: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has sliding_window = 12, not 10; set model\.sliding_window=12"):
        run(data, tmp_path / "run", "sliding_window=10", start_from=whole / "model")
    with pytest.raises(UserError, match="There is no model folder"):
        run(data, tmp_path / "run", start_from=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_losses(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(data, tmp_path / "run", "steps=2", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    expected = [(line["step"], line["loss"]) for line in measured(tmp_path / "run") if "loss" in line]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(s, pytest.approx(v, rel=1e-6)) for s, v in expected]


def test_weights_and_biases_continues_its_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[str, int]] = []

    class Run:
        def __init__(self, id: str) -> None:
            self.id = id

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((self.id, step))

        def finish(self) -> None:
            logged.append((self.id, -1))

    def init(**options: Any) -> Run:
        begun.append(options)
        return Run(options["id"])

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for folder in ("a/run", "b/run"):
        run(data, tmp_path / folder, "steps=2", wandb=True)
    run(data, tmp_path / "a/run", "steps=2", wandb=True, resume=True)
    ids = [options["id"] for options in begun]
    assert ids[0] != ids[1] and ids[2] == ids[0] and all(options["resume"] == "allow" for options in begun)
    assert [step for id, step in logged if id == ids[1]][-1] == -1 and {1, 2} <= {s for i, s in logged if i == ids[0]}


# -- in processes of their own -----------------------------------------------------------------------------------------


def train_in_copy(data: Path, out: Path, *changes: str, wait_at_end: bool = False, **options: Any) -> None:
    """Train as this program does, in a copy of this process (see `start_copy`)."""
    run(data, out, *changes, resume=True, threads=1, **options)
    if wait_at_end:
        signal.pause()


def wait_for_lines(out: Path, count: int, process: BaseProcess) -> None:
    while process.is_alive():
        metrics = out / "metrics.jsonl"
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.001)


@pytest.mark.slow
def test_run_killed_at_any_moment_is_the_same_when_resumed(data: Path, tmp_path: Path) -> None:
    changes = ("batch=2", "accumulate=1", "steps=24", "checkpoint_every=2", "eval_every=6")
    run(data, tmp_path / "whole", *changes)
    out, choose = tmp_path / "killed", random.Random()
    for target in (1, 7, 13, 20):
        # A run that has come to its end waits to be killed, in case this process is slow.
        process = start_copy(functools.partial(train_in_copy, wait_at_end=True), data, out, *changes)
        wait_for_lines(out, target, process)
        time.sleep(choose.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run(data, out, *changes, resume=True)
    assert measured(out) == measured(tmp_path / "whole")
    assert len(measured(out)) == 24 + 4
    for name in ("model/model.safetensors", "checkpoints/step-00000024/optimizer.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(out.rglob(".*"))


@pytest.mark.slow
def test_two_processes_of_torchrun_train_as_one(data: Path, tmp_path: Path) -> None:
    """Although the second of them is killed in the third step: torchrun starts both again."""
    changes = ("steps=4", "accumulate=1", "checkpoint_every=1")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    helpers = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([helpers, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *torchrun, __file__, str(data), str(tmp_path / "two"), *changes]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    # The checkpoint of step 1 is complete before that of step 2 is begun, which the signal may have cut off.
    assert re.search("Resuming after step [12]\\b", done.stdout)
    run(data, tmp_path / "one", *changes)
    for two, one in zip(measured(tmp_path / "two"), measured(tmp_path / "one"), strict=True):
        assert two["step"] == one["step"]
        if "loss" in one:
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
            assert two["tokens"] == one["tokens"]
        else:
            assert two["eval"]["tokens"] == one["eval"]["tokens"]
            assert two["eval"]["loss"] == pytest.approx(one["eval"]["loss"], abs=1e-4)


def train_in_two(data: Path, out: Path, *changes: str, interrupt_in_step: int = 0, **options: Any) -> None:
    """Train in two processes; only the second one gets the signal."""

    def member() -> None:
        if os.environ["RANK"] == "1" and interrupt_in_step:
            interrupt(interrupt_in_step)
        train_in_copy(data, out, *changes, **options)

    assert run_group(2, member) == [0, 0]


def test_ctrl_c_in_one_of_two_processes_stops_both(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both stop after the same step, and the resumed run is the same."""
    changes = ("steps=12", "accumulate=1", "checkpoint_every=0", "eval_every=0")
    train_in_two(data, tmp_path / "whole", *changes)
    out = tmp_path / "run"
    train_in_two(data, out, *changes, interrupt_in_step=5)
    assert "Stopped after step 5;" in capfd.readouterr().out
    assert len(measured(out)) == 5
    train_in_two(data, out, *changes)
    assert measured(out) == measured(tmp_path / "whole")


@pytest.mark.parametrize("changes", [("trainable=suffix", "cache_prefix=true"), ("trainable=lora", "lora.r=2")])
def test_two_processes_train_a_part_of_a_model_as_one(
    data: Path, whole: Path, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    """The outputs of a frozen prefix are shared, too."""
    changes = (*changes, "steps=3", "accumulate=1", "eval_every=0")
    for out, start in ((tmp_path / "one", run), (tmp_path / "two", train_in_two)):
        start(data, out, *changes, start_from=whole / "model")
    losses = [[line["loss"] for line in measured(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[0]) == 3
    if (tmp_path / "one/prefix").exists():
        files = [(tmp_path / name / "prefix/prefix.bin").read_bytes() for name in ("one", "two")]
        assert files[0] == files[1]


def interrupt(step: int, number: int = signal.SIGINT) -> None:
    """Send a signal to this process in the middle of a step that it makes with one micro-batch a step."""
    sequence_loss, calls = trainer.sequence_loss, []

    def interrupting(*args: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return sequence_loss(*args, **options)

    trainer.sequence_loss = interrupting


if __name__ == "__main__":
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        interrupt(3, signal.SIGKILL)
    run(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:], threads=1)
