"""The folder of a run: its config.json, and what must fit together before the first step.

A run is config.json (what it is), metrics.jsonl (what it measured), checkpoints/ (where it can continue) and, at the
end, model/ (the result).
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ttt_e2e.config.parse import flatten, from_dict, to_dict
from ttt_e2e.config.schema import RunConfig
from ttt_e2e.data.shards import TokenSet
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.files import lock_beside, read_verified_json, with_digest
from ttt_e2e.model.checkpoint import CONFIG, TOKENIZER, load_config, read_weights, stored_digest
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.training.distributed import DistributedContext

FORMAT = "ttt-e2e run"
VERSION = 3
MODEL = "model"

# May change when a run is resumed: settings of what is written and by whom it is computed, not of what is learned.
_MAY_CHANGE_ON_RESUME = {
    *("train.log_every", "train.eval_every", "train.eval_tokens", "train.checkpoint_every", "train.keep_checkpoints"),
    *("train.data_parallel_replicate_degree", "train.data_parallel_shard_degree", "train.timeout_seconds"),
}
# May change when a trained model is trained further: settings of neither a weight's shape nor of what a token sees.
_MAY_CHANGE_ON_START = {
    *("mini_batch_size", "inner_loop.lr", "inner_loop.max_grad_norm", "rms_norm_eps", "initializer_range"),
    *("memory.lr", "mamba2.kernels", "gated_deltanet.kernels", "rope_theta"),
    *("rope_scaling.rope_type", "rope_scaling.factor", "rope_scaling.original_max_position_embeddings"),
    *("rope_scaling.low_freq_factor", "rope_scaling.high_freq_factor", "rope_scaling.attention_factor"),
}


def check_run(
    config: RunConfig, tokens: TokenSet, out: Path, resume: bool, start_from: Path | None, dist: DistributedContext
) -> dict[str, Any]:
    """Check that `out` can take a new run, or holds the run to resume; returns the content of its config.json.

    Only rank 0 checks a new folder `out`: for the other processes, it may be writing there already.
    """
    record = {
        "format": FORMAT,
        "version": VERSION,
        **to_dict(config),
        "data": tokens.where,
        "data_digest": tokens.digest,
        "start_from": None if start_from is None else str(Path(start_from).resolve()),
        "start_digest": None if start_from is None else stored_digest(start_from),
    }
    found = out / CONFIG
    if not (resume and found.exists()):
        if config.train.trainable != "all" and start_from is None:
            raise UserError(f"trainable={config.train.trainable} trains a model further; name the model with --from.")
        if dist.is_rank0 and out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file; choose a folder with --out.")
        if dist.is_rank0 and out.exists() and any(not f.name.startswith(".") for f in out.iterdir()):
            what = "already holds a run; continue it with --resume" if found.exists() else "is not empty"
            raise UserError(f"{out} {what}, or choose another folder with --out.")
        return with_digest(record)
    previous = read_verified_json(found, FORMAT, VERSION, "finish the run with the version that wrote it")
    settings = {section: previous.get(section, {}) for section in ("model", "train")}
    before, now = flatten(from_dict(RunConfig, settings, str(found))), flatten(config)
    for name in before:
        if before[name] != now[name] and name not in _MAY_CHANGE_ON_RESUME:
            raise UserError(
                f"The run in {out} has {name} = {before[name]}, not {now[name]}; resume it with the same "
                "configuration, or start another run in another folder."
            )
    if previous.get("data_digest") != record["data_digest"]:
        raise UserError(
            f"{record['data']} is not the data of the run in {out} ({previous.get('data')}); give the same data."
        )
    start, start_before = record["start_from"], previous.get("start_from")
    moved = record["start_digest"] is not None and record["start_digest"] == previous.get("start_digest")
    if start not in (None, start_before) and not moved:
        raise UserError(f"The run in {out} started from {start_before}, not from {start}.")
    return with_digest(record | {name: record[name] or previous.get(name) for name in ("start_from", "start_digest")})


def lock_run(out: Path, dist: DistributedContext) -> AbstractContextManager[object]:
    """Keep other trainings from the run in the block. Raises UserError if one has it already."""
    in_use = f"The run in {out} is being trained by another process; wait until it has ended."
    return lock_beside(out, in_use) if dist.is_rank0 else nullcontext()


def load_start_weights(model: Transformer, folder: Path, tokenizer_digest: str) -> None:
    """Fill `model` from the model in `folder`, which need not have learned rates even if `model` has them.

    Raises UserError if its shape or its tokenizer is another one.
    """
    theirs, ours = flatten(load_config(folder)), flatten(model.config)
    starts_rates = ours["inner_loop.learned_lr"] and not theirs["inner_loop.learned_lr"]
    may_change = _MAY_CHANGE_ON_START | ({"inner_loop.learned_lr"} if starts_rates else set())
    for name, value in ours.items():
        if theirs[name] != value and name not in may_change:
            raise UserError(
                f"The model in {folder} has {name} = {theirs[name]}, not {value}; "
                f"set model.{name}={theirs[name]} to train it further."
            )
    path = folder / TOKENIZER
    if path.is_file() and Tokenizer.load(path).digest != tokenizer_digest:
        raise UserError(
            f"The model in {folder} has another tokenizer than the data; prepare the data with --tokenizer {folder}."
        )
    rates = {name for name, _ in model.named_parameters() if name.endswith(".log_lr_scale")}
    read_weights(model, folder, absent=rates if starts_rates else ())
