"""What there is to do: jobs, what each waits for, and what exactly each is told when it starts.

A job is a folder under OUT with job.json (what to do), log.txt (what it printed) and, once it is done, result.json:

    estimate/SYSTEM                      a few steps of random tokens, to say beforehand what the whole will take
    runs/SYSTEM/sweep/lr-0.003           pre-training for a short while at one outer learning rate; some take another's
    runs/SYSTEM/sweep/below, above       the same at half and at twice the best of those
    runs/SYSTEM/seed0/pretrain           at the best of all; for some from another system's, and short
    runs/SYSTEM/seed0/extend-4096        trained on from there for one context
    runs/SYSTEM/seed0/evaluate-4096      the held-out books at that context
    latency-0123abcd                     time per token by context
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ttt_e2e.config.parse import to_dict
from ttt_e2e.config.schema import RunConfig
from ttt_e2e.errors import UserError
from ttt_e2e.files import write_text
from ttt_e2e.model.checkpoint import read_json
from ttt_e2e.reproduce.scales import Scale
from ttt_e2e.reproduce.systems import System, extending, named, pretraining

FORMAT = "ttt-e2e reproduce"
RUN, RESULT = "run", "result.json"
_BESIDE = {"below": 0.5, "above": 2.0}
"""The second round of a sweep, as factors of the best of the first."""


@dataclass(frozen=True)
class Plan:
    """A comparison: `what` is a key of `systems.BASELINE`; data, books: prepared tokens to train first on, and further.

    The held-out books are the "val" documents of `books`. data_digest, books_digest: of the tokens; more_digest: of
    those of `books` to train on. device: "cpu" or "cuda". book_tokens: how many tokens of all books together are
    evaluated. compile: whether to train compiled.
    """

    what: str
    scale: Scale
    systems: tuple[System, ...]
    seeds: tuple[int, ...]
    contexts: tuple[int, ...]
    data: Path
    books: Path
    data_digest: str
    books_digest: str
    more_digest: str
    device: str
    book_tokens: int
    compile: bool = False


@dataclass(frozen=True)
class Job:
    """One piece of work. folder: under OUT. needs: folders of jobs that must have ended before.

    kind: "sweep", "pretrain", "extend", "evaluate", "estimate" or "latency". system None: all. tokens: to read.
    context: of its sequences.
    """

    folder: str
    kind: str
    system: System | None
    seed: int
    context: int
    tokens: int
    needs: tuple[str, ...] = ()


def jobs(plan: Plan) -> list[Job]:
    """All jobs of training and evaluation, in the order in which they can be done."""
    scale = plan.scale
    made: dict[str, Job] = {}
    for system in plan.systems:
        own = trained(system)
        for seed in plan.seeds:
            if own.starts_from is not None:
                _first_stage(plan, named(own.starts_from), seed, made)
            first = _first_stage(plan, own, seed, made)
            for context in plan.contexts:
                model = first
                if context > scale.pretrain_context:
                    config = extending(scale, own, seed, context)
                    name = f"runs/{own.name}/seed{seed}/extend-{context}"
                    model = Job(name, "extend", own, seed, *_size(config), (first.folder,))
                    made[model.folder] = model
                name = f"runs/{system.name}/seed{seed}/evaluate-{context}"
                made[name] = Job(
                    name, "evaluate", system, seed, context, _read_tokens(plan, system, context), (model.folder,)
                )
    return list(made.values())


def _first_stage(plan: Plan, system: System, seed: int, made: dict[str, Job]) -> Job:
    """Add the sweep and the training of a system, which may start from another one's; returns the training."""
    scale, swept = plan.scale, _swept(system)
    size = _size(pretraining(scale, swept, 0, tokens=_sweep_tokens(scale, swept)))
    start = f"runs/{system.starts_from}/seed{{}}/pretrain"
    before = () if system.starts_from is None else (start.format(plan.seeds[0]),)
    first_round = tuple(_first_round(scale, swept))
    sweeps = [Job(folder, "sweep", swept, 0, *size, before) for folder in first_round]
    for name in _BESIDE:
        sweeps.append(Job(f"runs/{swept.name}/sweep/{name}", "sweep", swept, 0, *size, (*before, *first_round)))
    made |= {job.folder: job for job in sweeps}
    needs = tuple(job.folder for job in sweeps)
    if before:
        needs = (start.format(seed), *needs)
    folder = f"runs/{system.name}/seed{seed}/pretrain"
    made[folder] = Job(folder, "pretrain", system, seed, *_size(pretraining(scale, system, seed)), needs)
    return made[folder]


def estimates(plan: Plan) -> list[Job]:
    """The jobs that measure how fast every system is here."""
    systems = {s.name: s for system in plan.systems for s in (*first_stages(plan), trained(system), system)}
    return [Job(f"estimate/{name}", "estimate", system, 0, 0, 0) for name, system in systems.items()]


def timed(plan: Plan) -> bool:
    """Whether the comparison measures time per token."""
    return plan.what == "figure1" and bool(plan.scale.latency_contexts)


def latency(plan: Plan) -> Job:
    """The job that measures time per token; it belongs to these very systems."""
    names = ",".join(system.name for system in plan.systems)
    return Job(f"latency-{hashlib.sha256(names.encode()).hexdigest()[:8]}", "latency", None, 0, 0, 0)


def sweep_rates(scale: Scale, system: System, results: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """The outer learning rates to try, from low to high, by folder: those of the scale, then two beside their best.

    They are those of the system that it has its rate from, if that is another one. Without a result of the first round,
    there is no second.
    """
    system = _swept(system)
    rates = _first_round(scale, system)
    best = _lowest(rates, results)
    if best is not None:
        rates |= {f"runs/{system.name}/sweep/{name}": best * factor for name, factor in _BESIDE.items()}
    return dict(sorted(rates.items(), key=lambda pair: pair[1]))


def best_sweep(scale: Scale, system: System, results: Mapping[str, dict[str, Any]]) -> float | None:
    """The swept learning rate of the lowest loss; one that diverged is never it. None if there is no loss."""
    return _lowest(sweep_rates(scale, system, results), results)


def _swept(system: System) -> System:
    """The system whose sweep finds the learning rate."""
    return system if system.rate_of is None else named(system.rate_of)


def _first_round(scale: Scale, system: System) -> dict[str, float]:
    rates = (pretraining(scale, system, 0).train.lr * factor for factor in scale.sweep)
    return {f"runs/{system.name}/sweep/lr-{lr:g}": lr for lr in rates}


def _lowest(rates: Mapping[str, float], results: Mapping[str, dict[str, Any]]) -> float | None:
    losses = {rates[folder]: results[folder]["loss"] for folder in rates if "loss" in results.get(folder, {})}
    return min(losses, key=lambda lr: losses[lr]) if losses else None


def specification(plan: Plan, job: Job, out: Path, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What job.json says, once everything that the job needs has ended.

    Raises UserError if that gave nothing to go on with.
    """
    scale, system = plan.scale, job.system
    spec: dict[str, Any] = {"kind": job.kind, "device": plan.device, "threads": 1 if plan.device == "cpu" else None}
    if job.kind == "latency":
        shapes = {s.name: to_dict(pretraining(scale, s, 0).model) for s in plan.systems}
        dtype = pretraining(scale, plan.systems[0], 0).train.dtype
        contexts = list(scale.latency_contexts)
        return spec | {"configs": shapes, "contexts": contexts, "seconds": scale.latency_seconds, "dtype": dtype}
    assert system is not None
    if job.kind == "estimate":
        stages = [pretraining(scale, system, 0), extending(scale, system, 0, max(scale.contexts))]
        configs = [to_dict(config) for config in stages]
        return spec | {"configs": configs, "batch_tokens": scale.eval_batch_tokens, "processes": scale.processes}
    for need in job.needs:
        if need not in results:
            raise UserError(f"{need} could not be done.")
        if "/sweep/" not in need and "failed" in results[need]:
            raise UserError(f"{need} failed.")
    if job.kind == "evaluate":
        config = pretraining(scale, system, job.seed)
        return spec | {
            "model": str((out / job.needs[0] / RUN / "model").resolve()),
            "becomes": None if system.trained_as is None else to_dict(config.model),
            "books": str(plan.books.resolve()),
            "context": job.context,
            "longest": max(scale.contexts),
            "book_tokens": scale.eval_tokens,
            "batch_tokens": scale.eval_batch_tokens,
            "inner_lrs": list(_inner_lrs(scale, config)),
            "choose_tokens": scale.choose_tokens,
            "seed": job.seed,
            "dtype": config.train.dtype,
        }
    start_from = None if system.starts_from is None else str((out / job.needs[0] / RUN / "model").resolve())
    if job.kind == "extend":
        config, data = extending(scale, system, job.seed, job.context), plan.books
        start_from = str((out / job.needs[0] / RUN / "model").resolve())
    else:
        data = plan.data
        if job.kind == "sweep":
            lr, tokens = sweep_rates(scale, system, results).get(job.folder), _sweep_tokens(scale, system)
        else:
            lr, tokens = best_sweep(scale, system, results), None
        if lr is None:
            raise UserError("every learning rate of its sweep failed.")
        config = pretraining(scale, system, job.seed, lr, tokens)
    return spec | {
        "config": to_dict(config),
        "data": str(data.resolve()),
        "start_from": start_from,
        "compile": plan.compile,
        "processes": scale.processes,
    }


# -- the plan of a folder ----------------------------------------------------------------------------------------------


def keep(plan: Plan, out: Path) -> dict[str, list]:
    """Write the plan to OUT/plan.json, or check that it fits the one that stands there.

    Several comparisons can stand in one folder and share what they have in common; a later call may name other systems,
    seeds and contexts. Returns all that any call named of this comparison, by "systems", "seeds" and "contexts". Raises
    UserError if anything else differs.
    """
    path = out / "plan.json"
    named: dict[str, list] = {"systems": [s.name for s in plan.systems]}
    named |= {"seeds": list(plan.seeds), "contexts": list(plan.contexts)}
    now: dict[str, Any] = {
        "format": FORMAT,
        "version": 2,
        "scale": asdict(plan.scale),
        "data": {"where": str(plan.data), "digest": plan.data_digest},
        "books": {"where": str(plan.books), "digest": plan.books_digest, "more": plan.more_digest},
        "device": plan.device,
        "configs": {s.name: to_dict(pretraining(plan.scale, s, 0)) for s in plan.systems},
        "comparisons": {plan.what: named},
    }
    now = json.loads(json.dumps(now))
    if path.exists():
        before = read_json(path)
        for key in ("format", "version", "scale", "device"):
            if before.get(key) != now[key]:
                _refuse(out, _difference(key, before.get(key), now[key]))
        for key in ("data", "books"):
            # Plans of before know nothing of "more".
            if any(before[key].get(part, digest) != digest for part, digest in now[key].items() if part != "where"):
                _refuse(out, f"{key} in {before[key]['where']}, not those in {now[key]['where']}")
        for name, config in before["configs"].items():
            if now["configs"].setdefault(name, config) != config:
                _refuse(out, f"other settings of {name} (this version of ttt-e2e has changed them)")
        for key, values in before["comparisons"].get(plan.what, {}).items():
            named[key] = [*values, *(value for value in named[key] if value not in values)]
        now["comparisons"] = before["comparisons"] | {plan.what: named}
    write_text(path, json.dumps(now, indent=2) + "\n")
    return named


def _refuse(out: Path, what: str) -> None:
    raise UserError(
        f"{out} holds a comparison with {what}; give the same choices (only --systems, --seeds, --contexts, "
        "--workers and --compile may differ), or another folder."
    )


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and before.get("name") == now.get("name"):
        key, before, now = next((f"{key}.{k}", before.get(k), v) for k, v in now.items() if before.get(k) != v)
    elif isinstance(before, dict):
        before, now = before.get("name"), now.get("name")
    return f"{key} = {before}, not {now}"


def trained(system: System) -> System:
    """The system whose training is this one's: itself, unless it is another one that was changed at test time."""
    return system if system.trained_as is None else named(system.trained_as)


def first_stages(plan: Plan) -> list[System]:
    """The systems that others of the plan start from."""
    names = {trained(system).starts_from for system in plan.systems}
    return [named(name) for name in sorted(name for name in names if name is not None)]


def _sweep_tokens(scale: Scale, system: System) -> int:
    """For how long a learning rate is tried; a short stage is tried whole."""
    return scale.sweep_tokens if system.starts_from is None else scale.warm_tokens


def _size(config: RunConfig) -> tuple[int, int]:
    """Context and tokens of a stage."""
    return config.train.context, config.train.steps * config.train.batch * config.train.context


def _inner_lrs(scale: Scale, config: RunConfig) -> tuple[float, ...]:
    """What is to be chosen among at test time."""
    return () if config.train.train_mode == "meta" else scale.inner_lrs


def _read_tokens(plan: Plan, system: System, context: int) -> int:
    """How many tokens an evaluation reads: the books, for what learns a second time frozen, and those to choose on."""
    config = pretraining(plan.scale, system, 0)
    choosing = len(_inner_lrs(plan.scale, config)) * max(plan.scale.choose_tokens, context)
    return plan.book_tokens * (2 if config.model.suffix_layers else 1) + choosing
