"""The jobs of a comparison: what each needs, and the job.json that it is started with.

A job is a folder below OUT with job.json (what to do), log.txt (what it printed) and, once it is done, result.json:

    runs/SYSTEM/sweep/lr-0.003          a short first stage at one outer learning rate
    runs/SYSTEM/sweep/below, above      the same at half and at twice the best rate of those, if the scale wants it
    runs/SYSTEM/seed0/pretrain          the first stage at the best rate of all; in a warm start the second stage
    runs/SYSTEM/seed0/extend-4096       further training for one longer context
    runs/SYSTEM/seed0/evaluate-4096     the loss on the held-out books at one context
    runs/ngram/seed0/evaluate-4096      the same of the n-gram floor, counted on the tokens of those trainings
    prefix-MIXER-seed0                  no job: outputs of a frozen prefix, which the trainings of several systems read
    latency-0123abcd                    time per token by context, of the systems that the name is a digest of
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ttt_e2e.config.parse import from_dict, to_dict
from ttt_e2e.config.schema import RunConfig
from ttt_e2e.errors import UserError
from ttt_e2e.files import check_digest, check_format, read_json, with_digest, write_text
from ttt_e2e.reproduce.scales import Scale
from ttt_e2e.reproduce.systems import FLOOR, System, extending, pretraining

FORMAT, VERSION = "ttt-e2e comparison", 4
PLAN, JOB, LOG, RESULT = "plan.json", "job.json", "log.txt", "result.json"
RUN = "run"  # the folder of a job's training run, in the job's folder

_SECOND_ROUND = {"below": 0.5, "above": 2.0}  # of a sweep: learning rates, as factors of the first round's best


@dataclass(frozen=True)
class Comparison:
    """What is compared, and the data and device that it is compared on."""

    name: str  # a key of `systems.BASELINE`
    scale: Scale
    systems: tuple[System, ...]
    seeds: tuple[int, ...]
    contexts: tuple[int, ...]
    data: Path  # prepared tokens for the first stage
    books: Path  # prepared tokens for the longer contexts; the "val" documents are the held-out books
    digests: Mapping[str, str]  # of the tokens: "data" for the first stage, "books_train", "books_val"
    device: str  # "cpu" or "cuda"
    book_tokens: int  # read by an evaluation, of all held-out books together
    compile: bool = False  # whether training is compiled

    @property
    def floor(self) -> System:
        """The n-grams that the systems are compared with."""
        return FLOOR[self.name]


@dataclass(frozen=True)
class Job:
    """One piece of work that leaves a result."""

    folder: str  # below OUT; it identifies the job
    kind: str  # "sweep", "pretrain", "extend", "evaluate", "ngram" or "latency"
    system: System | None  # None for latency, where all systems are measured together
    seed: int
    context: int
    tokens: int  # to train on or to read
    needs: tuple[str, ...] = ()  # folders of the jobs that must have ended before


def training_jobs(comparison: Comparison) -> list[Job]:
    """All sweeps, trainings and evaluations, each after those that it needs."""
    scale = comparison.scale
    jobs: dict[str, Job] = {}
    for system in comparison.systems:
        trained = system.weights_from or system
        for seed in comparison.seeds:
            if trained.starts_from is not None:
                _add_first_stage(comparison, trained.starts_from, seed, jobs)
            first_stage = _add_first_stage(comparison, trained, seed, jobs)
            for context in comparison.contexts:
                model = first_stage
                if context > scale.pretrain_context and not system.extrapolates:
                    continue
                if context > scale.pretrain_context and scale.extend_tokens:
                    model = f"runs/{trained.name}/seed{seed}/extend-{context}"
                    size = _size(extending(scale, trained, seed, context))
                    jobs[model] = Job(model, "extend", trained, seed, *size, (first_stage,))
                folder = f"runs/{system.name}/seed{seed}/evaluate-{context}"
                jobs[folder] = Job(folder, "evaluate", system, seed, context, comparison.book_tokens, (model,))
    for seed, context in product(comparison.seeds, comparison.contexts):
        folder = f"runs/{comparison.floor.name}/seed{seed}/evaluate-{context}"
        jobs[folder] = Job(folder, "ngram", comparison.floor, seed, context, comparison.book_tokens)
    return _after_its_prefix(scale, list(jobs.values()))


def _after_its_prefix(scale: Scale, jobs: list[Job]) -> list[Job]:
    """The jobs, each after the first one that has the same prefix cache, which fills it."""
    first: dict[str, str] = {}
    for i, job in enumerate(jobs):
        if job.kind in ("sweep", "pretrain") and (cache := _prefix_cache(scale, job)) is not None:
            if cache in first:
                jobs[i] = dataclasses.replace(job, needs=(*job.needs, first[cache]))
            else:
                first[cache] = job.folder
    return jobs


def _prefix_cache(scale: Scale, job: Job) -> str | None:
    """The folder with the outputs of the prefix that the job trains on; None if it trains the prefix."""
    assert job.system is not None, "no training is without a system"
    config = pretraining(scale, job.system, job.seed)
    return f"prefix-{config.model.mixers[0]}-seed{config.train.seed}" if config.train.cache_prefix else None


def _add_first_stage(comparison: Comparison, system: System, seed: int, jobs: dict[str, Job]) -> str:
    """Add a system's sweep and its training to `jobs`; returns the training's folder."""
    scale, swept, before = comparison.scale, system.lr_from or system, system.starts_from
    start = () if before is None else (_first_stage(before, seed),)
    sweep_start = () if before is None else (_first_stage(before, comparison.seeds[0]),)
    size = _size(pretraining(scale, swept, 0, tokens=_sweep_tokens(scale, swept)))
    first_round = tuple(_first_round(scale, swept))
    second_round = [f"runs/{swept.name}/sweep/{name}" for name in _SECOND_ROUND if scale.second_round]
    sweep = [Job(folder, "sweep", swept, 0, *size, sweep_start) for folder in first_round]
    sweep += [Job(folder, "sweep", swept, 0, *size, (*sweep_start, *first_round)) for folder in second_round]
    folder = _first_stage(system, seed)
    needs = (*start, *(job.folder for job in sweep))
    training = Job(folder, "pretrain", system, seed, *_size(pretraining(scale, system, seed)), needs)
    jobs |= {job.folder: job for job in (*sweep, training)}
    return folder


def _first_stage(system: System, seed: int) -> str:
    return f"runs/{system.name}/seed{seed}/pretrain"


def latency_jobs(comparison: Comparison, needs: tuple[str, ...] = ()) -> list[Job]:
    """The job that measures time per token of these very systems, if the comparison has one.

    needs: all other jobs of a call, since work beside it would disturb the measurement.
    """
    if comparison.name != "figure1" or not comparison.scale.latency_contexts:
        return []
    names = ",".join(system.name for system in comparison.systems)
    return [Job(f"latency-{hashlib.sha256(names.encode()).hexdigest()[:8]}", "latency", None, 0, 0, 0, needs)]


# -- the sweep of the outer learning rate ------------------------------------------------------------------------------


def sweep_rates(scale: Scale, system: System, results: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """The outer learning rates of a system's sweep, ascending, by job folder.

    Both rounds, once `results` has a loss of the first one; until then the first.
    """
    system = system.lr_from or system
    rates = _first_round(scale, system)
    best = _lowest_loss(rates, results)
    if best is not None and scale.second_round:
        rates |= {f"runs/{system.name}/sweep/{name}": best * factor for name, factor in _SECOND_ROUND.items()}
    return dict(sorted(rates.items(), key=lambda pair: pair[1]))


def best_rate(scale: Scale, system: System, results: Mapping[str, dict[str, Any]]) -> float | None:
    """The rate of the lowest loss in a system's sweep; None if there is no loss. One that diverged has none."""
    return _lowest_loss(sweep_rates(scale, system, results), results)


def _first_round(scale: Scale, system: System) -> dict[str, float]:
    rates = (pretraining(scale, system, 0).train.lr * factor for factor in scale.sweep_factors)
    return {f"runs/{system.name}/sweep/lr-{lr:g}": lr for lr in rates}


def _lowest_loss(rates: Mapping[str, float], results: Mapping[str, dict[str, Any]]) -> float | None:
    losses = {rates[folder]: results[folder]["loss"] for folder in rates if "loss" in results.get(folder, {})}
    return min(losses, key=lambda lr: losses[lr]) if losses else None


def _sweep_tokens(scale: Scale, system: System) -> int:
    """Tokens for which a rate is tried. A second stage is short enough to be tried whole."""
    return scale.sweep_tokens if system.starts_from is None else scale.warm_start_tokens


def _size(config: RunConfig) -> tuple[int, int]:
    """Context and tokens of a stage."""
    return config.train.context, config.train.steps * config.train.batch * config.train.context


# -- job.json ----------------------------------------------------------------------------------------------------------


def job_settings(comparison: Comparison, job: Job, out: Path, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of job.json, once all that the job needs has ended.

    Raises UserError if what it needs could not be done, or failed.
    """
    scale, system = comparison.scale, job.system
    settings = {"kind": job.kind, "device": comparison.device, "threads": 1 if comparison.device == "cpu" else None}
    if system is None:
        stages = {s.name: pretraining(scale, s, 0) for s in comparison.systems}
        return settings | {
            "models": {name: to_dict(stage.model) for name, stage in stages.items()},
            "contexts": list(scale.latency_contexts),
            "seconds": scale.latency_seconds,
            "dtype": next(iter(stages.values())).train.dtype,
        }
    for need in job.needs:
        if need not in results:
            raise UserError(f"{need} could not be done.")
        if "/sweep/" not in need and "failed" in results[need]:
            raise UserError(f"{need} failed.")
    if job.kind == "ngram":
        return settings | {
            "stages": _counted_stages(comparison, system, job),
            "vocab_size": scale.vocab_size,
            "books": str(comparison.books.resolve()),
            "context": job.context,
            "longest_context": max(scale.contexts),
            "book_tokens": scale.eval_tokens,
            "weight_tokens": scale.inner_lr_tokens,
        }
    needed_model = str((out / job.needs[0] / RUN / "model").resolve()) if job.needs else None
    if job.kind == "evaluate":
        config = pretraining(scale, system, job.seed)
        return settings | {
            "model": needed_model,
            "becomes": to_dict(config.model) if system.weights_from is not None and scale.start_from is None else None,
            "learn": system.learns,
            "books": str(comparison.books.resolve()),
            "context": job.context,
            "longest_context": max(scale.contexts),
            "book_tokens": scale.eval_tokens,
            "batch_tokens": scale.eval_batch_tokens,
            "inner_lrs": list(scale.inner_lrs) if config.train.train_mode == "pretrain" and system.learns else [],
            "inner_lr_tokens": scale.inner_lr_tokens,
            "seed": job.seed,
            "dtype": config.train.dtype,
        }
    is_extension, is_sweep = job.kind == "extend", job.kind == "sweep"
    if is_extension:
        config = extending(scale, system, job.seed, job.context)
    else:
        lr = sweep_rates(scale, system, results).get(job.folder) if is_sweep else best_rate(scale, system, results)
        if lr is None:
            raise UserError("every learning rate of the sweep failed.")
        config = pretraining(scale, system, job.seed, lr, _sweep_tokens(scale, system) if is_sweep else None)
    start_from = None if scale.start_from is None else str(scale.start_from.resolve())
    cache = None if is_extension else _prefix_cache(scale, job)
    return settings | {
        "config": to_dict(config),
        "data": str((comparison.books if is_extension else comparison.data).resolve()),
        "start_from": needed_model if is_extension or system.starts_from is not None else start_from,
        "cache": None if cache is None else str((out / cache).resolve()),
        "compile": comparison.compile,
        "processes": scale.processes,
    }


def _counted_stages(comparison: Comparison, system: System, job: Job) -> list[dict[str, Any]]:
    """The tokens on which a system is trained before its evaluation at the context of `job`."""
    scale = comparison.scale
    stages = [(comparison.data, pretraining(scale, system, job.seed))]
    if system.starts_from is not None:
        stages.insert(0, (comparison.data, pretraining(scale, system.starts_from, job.seed)))
    if job.context > scale.pretrain_context and scale.extend_tokens:
        stages.append((comparison.books, extending(scale, system, job.seed, job.context)))
    result = []
    for data, config in stages:
        context, tokens = _size(config)
        result.append({"data": str(data.resolve()), "context": context, "tokens": tokens, "seed": config.train.seed})
    return result


# -- plan.json ---------------------------------------------------------------------------------------------------------


def write_plan(comparison: Comparison, out: Path) -> dict[str, list[Any]]:
    """Write OUT/plan.json, or add to the one that is there.

    Several comparisons can share a folder and the jobs that they have in common; a later call may name other systems,
    seeds and contexts. Returns all that any call has named of this comparison: "systems", "seeds" and "contexts".
    Raises UserError if anything else differs.
    """
    path = out / PLAN
    chosen: dict[str, list[Any]] = {
        "systems": [system.name for system in comparison.systems],
        "seeds": list(comparison.seeds),
        "contexts": list(comparison.contexts),
    }
    numbers = json.loads(json.dumps(asdict(dataclasses.replace(comparison.scale, start_from=None))))
    del numbers["requirements"], numbers["start_from"]  # a digest says which model it is
    plan = {
        "format": FORMAT,
        "version": VERSION,
        "scale": numbers,
        "device": comparison.device,
        "digests": dict(comparison.digests),
        "configs": {system.name: to_dict(pretraining(comparison.scale, system, 0)) for system in comparison.systems},
        "comparisons": {},
    }
    if path.exists():
        previous = read_plan(out)
        before, now = _fixed(previous), _fixed(plan)
        # A number that the version which began the comparison did not have stands at its default.
        before = {f"scale.{f.name}": f.default for f in dataclasses.fields(Scale)} | before
        different = [f"{key} = {before.get(key)}, not {now[key]}" for key in now if before.get(key) != now[key]]
        for name, config in previous["configs"].items():
            ours, theirs = (
                from_dict(RunConfig, values, str(path)) for values in (plan["configs"].setdefault(name, config), config)
            )
            if ours != theirs:  # not as dicts: this version may have settings that the earlier one did not have
                different.append(f"other settings of {name}, from another version of ttt-e2e")
        if different:
            raise UserError(
                f"{out} holds a comparison with {different[0]}; repeat its options (only --systems, --seeds, "
                "--contexts, --workers and --compile may differ), or choose another folder."
            )
        for key, values in previous["comparisons"].get(comparison.name, {}).items():
            chosen[key] = [*values, *(value for value in chosen[key] if value not in values)]
        plan["comparisons"] = previous["comparisons"]
    plan["comparisons"][comparison.name] = chosen
    write_text(path, json.dumps(with_digest(plan), indent=2) + "\n")
    return chosen


def read_plan(out: Path) -> dict[str, Any]:
    """The content of OUT/plan.json. Raises UserError if it is missing, altered, or of another format version."""
    plan = read_json(out / PLAN)
    if plan.get("format") == "ttt-e2e reproduce":  # its name up to version 2
        plan["format"] = FORMAT
    remedy = "finish it with the version of ttt-e2e that began it, or choose another folder"
    check_format(plan, out / PLAN, FORMAT, VERSION, remedy)
    check_digest(plan, out / PLAN)
    del plan["sha256"]
    return plan


def _fixed(plan: dict[str, Any]) -> dict[str, Any]:
    """What all calls in a folder have in common, by name."""
    values = {f"{key}.{name}": value for key in ("scale", "digests") for name, value in plan[key].items()}
    return {"device": plan["device"], **values}
