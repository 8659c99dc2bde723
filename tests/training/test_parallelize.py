"""Several processes train as one, hold a part each, and end with one sentence."""

import errno
import os
import re
import shutil
import signal
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from helpers import made_up_tokens, run_group, start_group
from parallel_cases import CASES, SETTINGS, differences, disturb, hold_writing, in_step, measured, train, train_cases

from ttt_e2e.cli.main import main
from ttt_e2e.config.schema import TrainConfig
from ttt_e2e.errors import INTERRUPTED, UserError
from ttt_e2e.inner_loop import meta_loss
from ttt_e2e.model.checkpoint import load_transformer, model_digest, stored_digest
from ttt_e2e.training import checkpoint, trainer
from ttt_e2e.training.checkpoint import list_checkpoints
from ttt_e2e.training.parallelize import mesh_shape

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train_cases(CASES, 2, 1, folder)
    return folder


@pytest.mark.parametrize(("count", "replicate"), [(2, 1), (4, 2)])
def test_processes_train_as_one_and_hold_a_part_each(
    one_process: Path, tmp_path: Path, count: int, replicate: int
) -> None:
    assert run_group(count, train_cases, CASES, 2, replicate, tmp_path) == [0] * count
    found = differences(CASES, one_process, tmp_path)
    assert max(found.values()) < 1e-9, found
    for number, name in enumerate(CASES):
        result = torch.load(tmp_path / f"{number}.pt")
        shards = count // replicate
        # The tensors that do not divide evenly here are a few rates and norms.
        assert max(result["sizes"]) == pytest.approx(result["size"] / shards, rel=0.02), name


def test_mesh_that_does_not_fit_is_refused() -> None:
    assert mesh_shape(TrainConfig(), 6) == (1, 6)
    assert mesh_shape(TrainConfig(data_parallel_replicate_degree=3), 6) == (3, 2)
    assert mesh_shape(TrainConfig(data_parallel_replicate_degree=2, data_parallel_shard_degree=3), 6) == (2, 3)
    for replicate, shard in ((4, -1), (2, 2), (1, 4)):
        config = TrainConfig(data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard)
        with pytest.raises(UserError, match=f"degree={shard} does not fit 6 processes; choose factors of 6"):
            mesh_shape(config, 6)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_tokens(tmp_path_factory.mktemp("data"), 100)


def run_alone(data: Path, out: Path, *changes: str) -> None:
    command = ["train", "tiny", *SETTINGS, "--data", str(data), "--out", str(out), "--device", "cpu", "--quiet"]
    assert main([*command, *changes]) == 0


def test_checkpoint_of_four_processes_is_resumed_by_two_and_by_one(data: Path, tmp_path: Path) -> None:
    """With the same losses, in the run's own evaluations as well, whose sequences do not divide among processes."""

    stop_in_step_four = partial(disturb, 2, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    run_alone(data, tmp_path / "whole")
    assert run_group(4, lambda: train(data, tmp_path / "by4", before=stop_in_step_four)) == [INTERRUPTED] * 4
    newest = list_checkpoints(tmp_path / "by4")[0]
    assert newest.name == "step-00000004"
    assert len(list((newest / "optimizer").iterdir())) == 4 and not (newest / "optimizer.safetensors").exists()
    assert model_digest(load_transformer(newest)) == stored_digest(newest)
    shutil.copytree(tmp_path / "by4", tmp_path / "by1")
    assert run_group(2, lambda: train(data, tmp_path / "by4", "--resume")) == [0, 0]
    run_alone(data, tmp_path / "by1", "--resume")
    for name in ("by4", "by1"):
        for ours, theirs in zip(measured(tmp_path / name), measured(tmp_path / "whole"), strict=True):
            assert ours["step"] == theirs["step"]
            assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-6)
            if "eval" in theirs:
                assert ours["eval"]["tokens"] == theirs["eval"]["tokens"]
                assert ours["eval"]["loss"] == pytest.approx(theirs["eval"]["loss"], rel=1e-6)


def test_bad_input_is_one_sentence(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def differs(rank: int, *changes: str) -> None:
        train(data, tmp_path / "run", *(changes if rank == 1 else ()))

    def with_rank(function: Callable[[int], object]) -> Callable[[], object]:
        return lambda: function(int(os.environ["RANK"]))

    def other_version(rank: int) -> None:
        if rank == 1:
            trainer.__version__ = "0.0.7"

    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: train(data, tmp_path / "run", "batch=3"), "A batch of 3 sequences does not split over 2 processes"),
        (
            lambda: train(data, tmp_path / "run", "data_parallel_shard_degree=3"),
            "A mesh of data_parallel_replicate_degree=1 x data_parallel_shard_degree=3 does not fit 2 processes",
        ),
        (with_rank(lambda rank: differs(rank, "lr=0.5")), "Rank 1 has train.lr = 0.5, but rank 0 has 0.001"),
        (with_rank(lambda rank: differs(rank, "hidden_size=32")), "Rank 1 has model.hidden_size = 32"),
        (lambda: train(data, tmp_path / "run", before=other_version), "Rank 1 has ttt-e2e = 0.0.7"),
        (with_rank(lambda rank: differs(rank, "--data", str(tmp_path / "nowhere"))), "nowhere"),
    ]
    for case, sentence in cases:
        assert run_group(2, case) == [1, 1]
        errors = capfd.readouterr().err.strip().splitlines()
        assert len(errors) == 1 and errors[0].startswith("ttt-e2e: error: ") and sentence in errors[0], errors
    assert not (tmp_path / "run").exists()


def test_what_happens_to_one_process_ends_all_in_one_sentence(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A full disk, a loss that is not a number, a kill, a hang; the resumed run is the undisturbed one."""

    def fill_disk() -> None:
        def full(*arguments: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        checkpoint.save_safetensors = full  # type: ignore[assignment]

    def poison() -> None:
        meta_loss.mini_batch_mean = lambda nll_BT, mask_BT, b: nll_BT.mean(1) * float("nan")

    def hang() -> None:
        """In rank 1. Until then nobody was late: only now rank 0 waits no longer than two seconds."""
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        for group in [*dist.distributed_c10d._world.pg_map][:2]:  # for tensors, and for what processes tell each other
            assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=60)
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)

    out = tmp_path / "run"
    assert run_group(2, lambda: train(data, tmp_path / "whole")) == [0, 0]
    cases: list[tuple[int, Callable[[int], object], str]] = [
        (
            1,
            partial(disturb, 1, 4, fill_disk),
            r"No space left on the disk while writing .*step-00000004; the previous one is kept\.",
        ),
        (
            1,
            partial(disturb, 1, 2, poison),
            r"Step 4 has a loss of nan .* The last checkpoint is kept: .*step-00000002",
        ),
        (1, partial(disturb, 1, 3, lambda: os.kill(os.getpid(), signal.SIGKILL)), r"Rank 1 does not answer"),
        (0, partial(disturb, 0, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)), r"Rank 0 does not answer"),
        (1, lambda rank: in_step(2, hang), r"Rank 1 .* hangs since 60 s, which is train.timeout_seconds"),
    ]
    for rank, before, sentence in cases:
        processes = start_group(2, lambda: train(data, out, "--resume", before=before))  # noqa: B023
        processes[1 - rank].join()
        for process in processes:
            process.kill()
        text = capfd.readouterr().err
        errors = [line for line in text.splitlines() if line.startswith("ttt-e2e: error: ")]
        assert len(errors) == 1 and re.search(sentence, errors[0]), (text, [p.exitcode for p in processes])
        assert processes[1 - rank].exitcode == 1
    assert run_group(2, lambda: train(data, out, "--resume", before=hold_writing)) == [0, 0]
    assert measured(out) == measured(tmp_path / "whole")
    pattern = "**/*.safetensors"
    files = [{f.relative_to(run): f.read_bytes() for f in run.glob(pattern)} for run in (out, tmp_path / "whole")]
    assert files[0] == files[1] and len(files[0]) == 1 + 2 * 3
