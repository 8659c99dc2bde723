"""The scales and systems: how each is trained."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import small_config, small_model

from ttt_e2e.config.parse import flatten
from ttt_e2e.config.presets import preset
from ttt_e2e.convert.from_standard import warm_start
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.cost import parameters
from ttt_e2e.reproduce.plan import Comparison, latency_jobs, training_jobs
from ttt_e2e.reproduce.scales import SCALES, Scale
from ttt_e2e.reproduce.systems import SYSTEMS, ablations, choose, extending, pretraining


@pytest.mark.parametrize("scale", SCALES.values(), ids=list(SCALES))
@pytest.mark.parametrize("name", ["figure1", "ablations", "warmstart"])
def test_stages_of_all_systems_fit_the_scale(scale: Scale, name: str, tmp_path: Path) -> None:
    systems = choose(name, scale, None)
    comparison = Comparison(
        name=name,
        scale=scale,
        systems=systems,
        seeds=(0, 1),
        contexts=scale.contexts,
        data=tmp_path / "tokens",
        books=tmp_path / "tokens",
        digests={},
        device="cpu",
        book_tokens=1_000_000,
    )
    folders: set[str] = set()
    for job in training_jobs(comparison):
        assert set(job.needs) <= folders and job.folder not in folders and job.tokens > 0
        folders.add(job.folder)
    assert len(latency_jobs(comparison)) == (name == "figure1")
    assert scale.pretrain_context in scale.contexts and scale.sliding_window <= scale.pretrain_context
    base = parameters(pretraining(scale, systems[0], 0).model)
    for system in systems:
        stages = [(pretraining(scale, system, 0), scale.tokens_per_step)]
        stages += [(extending(scale, system, 0, t), scale.extend_tokens_per_step) for t in scale.contexts]
        for config, tokens_per_step in stages:
            assert config.train.batch * config.train.context == tokens_per_step
            assert config.train.batch % (scale.processes * config.train.accumulate) == 0
            assert config.model.vocab_size == scale.vocab_size
            if system.fast != "new":  # new MLPs are additional parameters
                assert abs(parameters(config.model) / base - 1) < 0.03


def test_paper_scale_has_the_published_schedule() -> None:
    scale = SCALES["paper"]
    full = choose("figure1", scale, ["full"])[0]
    train = pretraining(scale, full, 0).train
    assert (train.steps, train.batch, train.context, train.lr, train.dtype) == (52_000, 128, 8192, 8e-4, "bfloat16")
    extended = extending(scale, full, 0, 131_072)
    assert (extended.train.steps, extended.train.batch, extended.train.lr) == (1300, 8, 4e-4)
    assert (extended.train.warmup_steps, extended.train.inner_warmup_steps) == (130, 0)
    assert extended.model.rope_theta == 1e7
    assert preset("3b-full").model == pretraining(scale, SYSTEMS[0], 0).model


def test_ablations_change_one_thing_each() -> None:
    configs = {system.name: pretraining(SCALES["tiny"], system, 0) for system in ablations(SCALES["tiny"])}
    base = configs.pop("ttt-e2e")
    assert configs["window-512"].model.sliding_window == 512
    assert configs["mini-batch-32"].model.mini_batch_size == 32
    assert configs["suffix-8"].model.suffix_layers == 8 and not configs["no-static-mlp"].model.static_mlp
    assert configs["no-meta"].train.train_mode == "pretrain"
    widths = {f"model.{prefix}intermediate_size" for prefix in ("", "fast_", "suffix_")}
    for config in configs.values():
        ours, theirs = flatten(config), flatten(base)
        assert len({key for key in ours if ours[key] != theirs[key]} - widths) == 1


def test_further_training_has_no_inner_warmup_even_if_pretraining_has_none() -> None:
    scale = dataclasses.replace(SCALES["tiny"], pretrain_tokens=9 * 1024)  # fewer steps than the warm-up's divisor
    ttt = choose("figure1", scale, ["ttt-e2e"])[-1]
    assert pretraining(scale, ttt, 0).train.inner_warmup_steps == 0
    train = extending(scale, ttt, 0, 1024).train
    assert train.steps == 80 and (train.warmup_steps, train.inner_warmup_steps) == (8, 0)


def test_dynamic_evaluation_starts_as_the_window_model() -> None:
    window = small_model(torch.float64, suffix_layers=0, mini_batch_size=None)
    config = small_config(suffix_layers=2, static_mlp=False)
    dynamic = warm_start(window, config)
    tokens_BT1 = torch.randint(50, (2, 31), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        frozen = sequence_loss(dynamic, tokens_BT1, learn=False, dtype=torch.float64).nll_BT
        expected = sequence_loss(window, tokens_BT1, dtype=torch.float64).nll_BT
        learned = sequence_loss(dynamic, tokens_BT1, inner_lr=0.1, dtype=torch.float64).nll_BT
    torch.testing.assert_close(frozen, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(learned[:, :5], expected[:, :5], rtol=1e-12, atol=1e-12)
    assert (learned[:, 5:] - expected[:, 5:]).abs().max() > 1e-3
    assert parameters(config) == parameters(window.config)
