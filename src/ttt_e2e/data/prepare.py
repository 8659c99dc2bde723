"""From texts to token shards, in two passes over the texts; may be killed at any time and run again.

The first pass checks that everything can be read, counts, and samples the text that the tokenizer is trained on; the
second tokenises. Both stream: of a text file only a chunk is in memory, of JSONL and parquet a row.
"""

import hashlib
import json
import platform
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ttt_e2e.data.shards import FORMAT_VERSION, ShardWriter, token_dtype
from ttt_e2e.data.text import Document, documents, slices, source_files, standard_library
from ttt_e2e.data.tokenizer import Tokenizer, check_vocab_size
from ttt_e2e.errors import UserError
from ttt_e2e.files import check_digest, read_json, remove_stale_parts, with_digest, write_text
from ttt_e2e.progress import ProgressBar

_SAMPLE_CHARS = 1 << 13  # of text that is drawn into the sample at once
_MIN_END_CHARS = 1 << 16  # at the end of a document, if that is a tenth of it: some sequences, not a few words
# Where the end of a document is held out, the beginning of a line is looked for in as much text before it as the end
# has, but in no less and no more than this.
_MIN_LINE_CHARS, _MAX_LINE_CHARS = 1000, 1 << 16

_Texts = Callable[[list[str]], Iterator[tuple[bool, Document]]]


@dataclass(frozen=True)
class Prepared:
    """What a folder of prepared tokens holds."""

    folder: Path
    vocab_size: int
    documents: dict[str, int]
    """Documents per split, "train" and "val"."""
    tokens: dict[str, int]
    """Tokens per split."""
    characters: int
    """Characters of all documents."""
    skipped: list[str]
    """A sentence for each file or row that was left out."""
    divided: str | None
    """The document whose end was held out, if there were too few whole ones for that."""


def prepare(
    sources: list[Path] | None,
    out: Path,
    *,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    text_column: str = "text",
    val: list[Path] | None = None,
    val_share: float = 0.02,
    seed: int = 0,
    sample_chars: int = 32_000_000,
    shard_tokens: int = 1 << 26,
    progress: bool = True,
) -> Prepared:
    """Tokenise texts into a folder that `TokenSet` opens.

    After an interruption the same call continues from the last finished shard; the result is the same, byte for byte.

    Args:
        sources: text files, JSONL, parquet and folders of them; None: Python's standard library.
        out: the folder to write.
        tokenizer: a `tokenizer.json`, a folder with one or a name on Hugging Face. None: one is trained.
        vocab_size: tokens of the tokenizer that is trained.
        text_column: the field or column of JSONL and parquet that holds the text.
        val: sources of the validation documents, which are left out of `sources`. None: documents of `sources` are held
            out, in an order drawn by `seed` each that still fits into `val_share`. If they fill less than half of it,
            as with one text or a few long ones, the end of the longest other document is held out as well, from the
            beginning of a line on: the rest of the share, but at least a tenth of it, or 65,536 characters.
        val_share: part of all characters to hold out if `val` is None.
        seed: of the validation documents and of the tokenizer's sample.
        sample_chars: the tokenizer is trained on a uniform sample of at most this many characters of the training text.
        shard_tokens: a shard ends with the document that brings it to this many tokens.
        progress: show progress bars.

    Raises:
        UserError: for sources that cannot be read or that change, and if `out` holds anything but this preparation.
    """
    out = Path(out)
    if not 0 <= val_share < 1:
        raise UserError(f"val_share must be at least 0 and below 1, not {val_share}.")
    if tokenizer is None:
        check_vocab_size(vocab_size)
    config = {
        "sources": _fingerprint(sources),
        "val": None if val is None else _fingerprint(val),
        "tokenizer": tokenizer,
        "vocab_size": None if tokenizer else vocab_size,
        "text_column": text_column,
        "val_share": val_share if val is None else None,
        "seed": seed,
        "sample_chars": None if tokenizer else sample_chars,
        "shard_tokens": shard_tokens,
    }
    state = _load_state(out, config)
    if "splits" in state:
        return _summary(out, state)

    def texts(skipped: list[str]) -> Iterator[tuple[bool, Document]]:
        val_files = [path for _, path, _ in source_files(val or [])]
        own = standard_library() if sources is None else documents(sources, text_column, skipped, exclude=val_files)
        held_out = documents(val or [], text_column, skipped)
        return chain(((False, document) for document in own), ((True, document) for document in held_out))

    if "plan" not in state:
        _save_state(out, state)
        existing = Tokenizer.load(tokenizer) if tokenizer else None
        plan, sample = _survey(texts, config, progress)
        (existing or Tokenizer.train(sample, vocab_size)).save(out / "tokenizer.json")
        state |= {"plan": plan, "documents": 0, "characters": 0, "rounds": []}
        _save_state(out, state)
    # Loaded even if it has just been trained: the digest must not depend on which run trained it.
    trained = Tokenizer.load(out / "tokenizer.json")
    _tokenise(out, state, texts([]), trained, progress)
    meta = {
        "version": FORMAT_VERSION,
        "vocab_size": trained.vocab_size,
        "bos": trained.bos,
        "dtype": token_dtype(trained.vocab_size).str,
        "tokenizer": trained.digest,
        "splits": {s: [shards[s] for shards in state["rounds"] if s in shards] for s in ("train", "val")},
        "characters": state["plan"]["characters"],
        "skipped": state["plan"]["skipped"],
        "divided": state["plan"]["divided"]["name"] if state["plan"]["divided"] else None,
        "config": config,
    }
    write_text(out / "meta.json", json.dumps(with_digest(meta), indent=1))
    (out / "progress.json").unlink()
    return _summary(out, meta)


def _summary(out: Path, meta: dict[str, Any]) -> Prepared:
    documents, tokens = (
        {split: sum(shard[unit] for shard in shards) for split, shards in meta["splits"].items()}
        for unit in ("documents", "tokens")
    )
    rest = (meta[name] for name in ("characters", "skipped", "divided"))
    return Prepared(out, meta["vocab_size"], documents, tokens, *rest)


def _fingerprint(sources: list[Path] | None) -> str:
    if sources is None:
        return f"the standard library of Python {platform.python_version()}"
    fingerprint = hashlib.sha256()
    for name, path, _ in source_files(sources):
        if not path.is_file():
            raise UserError(f"{path} is a pipe or a device, but texts are read twice; write it to a file first.")
        status = path.stat()
        fingerprint.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    return fingerprint.hexdigest()


def _load_state(out: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The content of meta.json if `out` is finished, of progress.json if it has been begun, else an initial state."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a folder for the tokens.")
    path = next((path for path in (out / "meta.json", out / "progress.json") if path.exists()), None)
    if path is None:
        if out.is_dir() and any(not file.name.endswith(".part") for file in out.iterdir()):
            raise UserError(f"{out} holds other files; choose an empty or a new folder for the tokens.")
        return {"version": FORMAT_VERSION, "config": config}
    state = read_json(path)
    if state.get("version") != FORMAT_VERSION:
        raise UserError(f"{out} was prepared by another version of ttt-e2e; delete it or choose another folder.")
    check_digest(state, path)
    changed = ", ".join(key for key in config if state.get("config", {}).get(key) != config[key])
    if not changed:
        remove_stale_parts(out)
        if path.name == "meta.json":  # it was killed before it had removed this
            (out / "progress.json").unlink(missing_ok=True)
        return state
    if path.name == "meta.json" or "plan" in state:
        raise UserError(f"{out} was prepared with other {changed}; choose another folder or delete this one.")
    return {"version": FORMAT_VERSION, "config": config}


def _save_state(out: Path, state: dict[str, Any]) -> None:
    write_text(out / "progress.json", json.dumps(with_digest(state)))


def _survey(texts: _Texts, config: dict[str, Any], progress: bool) -> tuple[dict[str, Any], list[str]]:
    """Read everything once: counts, what is held out, and a uniform (reservoir) sample of the rest."""
    rng = random.Random(config["seed"])
    capacity = (config["sample_chars"] or 0) // _SAMPLE_CHARS
    reservoir: list[tuple[int, int, str]] = []  # document, position in it, text
    lengths: list[int] = []
    draws: list[bytes] = []
    held_out: list[int] = []
    skipped: list[str] = []
    seen = 0
    with ProgressBar(desc="reading", unit="char", unit_scale=True, disable=not progress) as bar:
        for index, (is_val, document) in enumerate(texts(skipped)):
            lengths.append(0)
            draws.append(hashlib.sha256(f"{config['seed']}/{document.name}".encode()).digest())
            if is_val:
                held_out.append(index)
            for chunk in document.chunks():
                start = lengths[-1]
                for text in slices(chunk, _SAMPLE_CHARS) if capacity else ():
                    seen += 1
                    slot = len(reservoir) if len(reservoir) < capacity else rng.randrange(seen)
                    if slot < capacity:
                        reservoir[slot : slot + 1] = [(index, start, text)]
                    start += len(text)
                lengths[-1] += len(chunk)
                bar.update(len(chunk))
            bar.set_postfix(documents=len(lengths), refresh=False)
    characters = sum(lengths)
    divided = None
    if config["val_share"] and lengths:
        room = target = config["val_share"] * characters
        for index in sorted(range(len(lengths)), key=draws.__getitem__):
            if lengths[index] <= room:
                room -= lengths[index]
                held_out.append(index)
        if room > target / 2:
            longest = max(set(range(len(lengths))) - set(held_out), key=lambda index: (lengths[index], draws[index]))
            chars = max(1, int(room), min(_MIN_END_CHARS, lengths[longest] // 10))
            divided = _divide(texts, longest, lengths[longest], chars)
    if len(lengths) == len(held_out):
        raise UserError("The sources hold no text to train on; give at least one text file that is not empty.")
    if config["val"] and not held_out:
        raise UserError("The validation sources hold no text; give at least one text file that is not empty.")
    held_out.sort()
    ends = dict.fromkeys(held_out, 0) | ({divided["document"]: divided["start"]} if divided else {})
    sample = [text[: max(0, ends.get(index, characters) - start)] for index, start, text in reservoir]
    plan = {"documents": len(lengths), "characters": characters, "held_out": held_out, "divided": divided}
    return plan | {"skipped": skipped}, [text for text in sample if text]


def _divide(texts: _Texts, index: int, length: int, chars: int) -> dict[str, Any]:
    """Where to divide a document of `length` characters to hold out the last `chars`: before them, or before a line."""
    if length <= chars:
        raise UserError("There is too little text to hold out a part of it; give more text, or --val-share 0.")
    start = length - chars
    earliest = max(length // 2, start - min(_MAX_LINE_CHARS, max(_MIN_LINE_CHARS, chars)))
    _, document = next(islice(texts([]), index, None))
    before = "".join(_part(document, earliest, start))
    line = before.rfind("\n" if "\n" in before else " ")
    return {"document": index, "name": document.name, "start": start if line < 0 else earliest + line + 1}


def _part(document: Document, start: int, stop: int | None) -> Iterator[str]:
    """The characters [start, stop) of a document, in chunks; None: to its end."""
    position = 0
    for chunk in document.chunks():
        if part := chunk[max(0, start - position) : None if stop is None else max(0, stop - position)]:
            yield part
        position += len(chunk)
        if stop is not None and position >= stop:
            break


def _tokenise(
    out: Path, state: dict[str, Any], texts: Iterator[tuple[bool, Document]], tokenizer: Tokenizer, progress: bool
) -> None:
    """Write the rounds that `state` lacks; a round is one shard of each split that has documents in it."""
    plan = state["plan"]
    held_out = set(plan["held_out"])
    divided = plan["divided"] or {"document": None}
    dtype = token_dtype(tokenizer.vocab_size)
    remaining = enumerate(islice(texts, state["documents"], None), state["documents"])
    sizes = {"total": plan["characters"], "initial": state["characters"]}
    with ProgressBar(desc="tokenising", unit="char", unit_scale=True, disable=not progress, **sizes) as bar:

        def counted(chunks: Iterator[str]) -> Iterator[str]:
            for chunk in chunks:
                state["characters"] += len(chunk)
                bar.update(len(chunk))
                yield chunk

        while state["documents"] < plan["documents"]:
            with ExitStack() as stack:
                writers: dict[str, ShardWriter] = {}
                size = 0
                for index, (_, document) in remaining:
                    parts = [("val" if index in held_out else "train", document.name, document.chunks())]
                    if index == divided["document"]:
                        end = f"{document.name} (end)"
                        parts = [("train", document.name, _part(document, 0, divided["start"]))]
                        parts += [("val", end, _part(document, divided["start"], None))]
                    for split, name, chunks in parts:
                        if split not in writers:
                            stem = f"{split}-{len(state['rounds']):05d}"
                            writers[split] = ShardWriter(stack, out, stem, dtype, tokenizer.bos)
                        size += writers[split].write(name, tokenizer.encode_chunks(counted(chunks)))
                    state["documents"] = index + 1
                    bar.set_postfix(documents=state["documents"], refresh=False)
                    if size >= state["config"]["shard_tokens"]:
                        break
                if not writers:
                    break
                state["rounds"].append({split: writer.close() for split, writer in writers.items()})
            _save_state(out, state)
    if (state["documents"], state["characters"]) != (plan["documents"], plan["characters"]):
        raise UserError(f"The sources changed while they were read; delete {out} and prepare it again.")
