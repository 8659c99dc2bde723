"""Saving an unfinished reading, so that the same command continues it after any end, `kill -9` included.

The file is a session like any other with more in it, written together: the name of the text and how far it was read,
the baseline (which files call "twin"), and the loss curves. The mark "unfinished" and a digest of the tokens read tell
it from a finished session, and from a reading of another or changed text. An unfinished reading of zero tokens is
started afresh; it exists only because a notebook has to know where the text begins in it (see `recording`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttt_e2e.errors import UserError
from ttt_e2e.files import real_path, remove_stale_parts
from ttt_e2e.inference.session_file import check_session_target, read_session_file, session_facts, write_session_file
from ttt_e2e.reading.loss_curve import LossCurve
from ttt_e2e.reading.reading import Reading


def save_unfinished(path: Path, reading: Reading) -> None:
    """Write an unfinished reading to `path`, complete or not at all. Raises UserError as `Session.save` does."""
    facts, tensors = reading.session.pack()
    curves, baseline_facts = {"curve": reading.curve}, None
    if reading.baseline is not None:
        baseline_facts, baseline_tensors = reading.baseline.pack()
        tensors |= {f"twin.{key}": tensor for key, tensor in baseline_tensors.items()}
        curves["twin.curve"] = reading.baseline_curve
    tensors |= {key: torch.from_numpy(curve.sums) for key, curve in curves.items()}
    facts["unfinished"] = {
        "name": reading.name,
        "size": reading.total_bytes,
        "initial_digest": reading.initial_digest,
        "notebook_start": reading.notebook_start,
        "pending_before": reading.curve.skip,
        "tokens": reading.tokens,
        "bytes": reading.bytes,
        "seconds": reading.seconds,
        "learning_seconds": reading.learning_seconds,
        "token_digest": reading.token_hash.hexdigest(),
        "curves": {key: {"bin_tokens": curve.bin_tokens, "tokens": curve.tokens} for key, curve in curves.items()},
        "twin": baseline_facts,
    }
    write_session_file(path, facts, tensors)


def unfinished_facts(path: Path) -> dict[str, Any]:
    """What the session file `path` says of an unfinished reading; nothing if there is no file or it is finished.

    Raises UserError for a file that is not a session.
    """
    return session_facts(path).get("unfinished", {}) if path.exists() else {}


def resume_reading(path: Path, token_chunks: Iterator[tuple[np.ndarray, float]], reading: Reading) -> bool:
    """Continue the unfinished reading in `path`, if there is one; returns whether there is.

    If so, `reading` becomes what it was when it was saved, and `token_chunks` advances to the same place in the text.
    Otherwise nothing changes. Raises UserError if the reading is of another text, if it was started with other options,
    or if the file is damaged.

    Args:
        path: the session file; it need not exist.
        token_chunks: the text from its beginning, as token ids [n] and the bytes of text that they are.
        reading: has read nothing yet.
    """
    check_session_target(path)
    real = real_path(path)
    remove_stale_parts(real.parent, real.name)
    if not unfinished_facts(path).get("tokens"):
        return False
    facts, tensors = read_session_file(path)
    saved = facts["unfinished"]
    options = {
        "--no-learning": facts["learn"] == reading.session.learn,
        "--dtype": facts["dtype"] == reading.session.info().dtype,
        "--no-baseline": (saved["twin"] is None) == (reading.baseline is None),
        # It began with the same session, or it is itself the session to continue from.
        "--session": reading.initial_digest in (saved["initial_digest"], facts["text_digest"]),
        "--notebook": saved["notebook_start"] == reading.notebook_start,
    }
    if different := ", ".join(option for option, same in options.items() if not same):
        raise UserError(
            f"{path} holds an unfinished reading of {saved['name']} that was started with other options "
            f"({different}); repeat that command to finish it, or save to another file."
        )
    while reading.tokens < saved["tokens"] and (chunk := next(token_chunks, None)):
        reading.add_chunk(*chunk)
    if reading.tokens != saved["tokens"] or reading.token_hash.hexdigest() != saved["token_digest"]:
        raise UserError(
            f"{path} holds an unfinished reading of {saved['name']}, and {reading.name} does not begin with the "
            f"{saved['tokens']:,} tokens that it has read: the text was changed, or is another; save to another file."
        )
    reading.session.unpack(facts, tensors, str(path))
    curves = {
        key: LossCurve(tensors[key].numpy(), curve["bin_tokens"], curve["tokens"])
        for key, curve in saved["curves"].items()
    }
    reading.curve = curves["curve"]
    reading.curve.skip = saved["pending_before"]
    if reading.baseline is not None:
        own = {key.removeprefix("twin."): tensor for key, tensor in tensors.items() if key.startswith("twin.")}
        reading.baseline.unpack(saved["twin"], own, str(path))
        reading.baseline_curve = curves["twin.curve"]
    reading.initial_digest = saved["initial_digest"]
    reading.bytes = saved["bytes"]
    reading.seconds = saved["seconds"]
    reading.learning_seconds = saved["learning_seconds"]
    return True
