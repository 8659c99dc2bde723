"""Mutated command lines: each succeeds or says in one sentence why not, and nobody's files are changed."""

import random
import shlex
from pathlib import Path
from typing import Any

import pytest
from stress_helpers import TEXT, Figures, complaint, contents, rounds, run_copy

from ttt_e2e.cli.main import COMMANDS

pytestmark = pytest.mark.stress

GOOD = [
    "read text.txt --quiet --no-plot",
    "read text.txt --quiet --plot out.svg --json --no-baseline",
    "read text.txt --quiet --no-plot --session old.session --save out.session --notebook",
    "read - --no-plot --save out.session --save-every 1 --no-learning",
    "generate The --max-tokens 4 --temperature 0.5 --top-p 0.9 --top-k 5 --min-p 0.1 --seed 1",
    "generate The --session old.session --max-tokens 3 --learn --save out.session --stop x",
    "generate The --session old.session --max-tokens 3 --notebook old.session.notebook --passages 2",
    "notebook search old.session.notebook geese lake --count 2",
    "info",
    "presets",
    "cost tiny --context 8K --train --flops 100T",
    "prepare text.txt rows.jsonl --out out --vocab-size 300 --val-share 0.2 --seed 1 --quiet",
    "evaluate text.txt rows.jsonl --max-tokens 200 --batch 2 --quiet",
    "train tiny --data tokens --out out --quiet hidden_size=16 num_attention_heads=2 num_hidden_layers=4 "
    "intermediate_size=24 sliding_window=8 mini_batch_size=4 vocab_size=272 context=16 batch=2 steps=1 eval_tokens=32",
    "convert from-hf checkpoint out --dtype float32",
    "convert from-gguf checkpoint out --window 8",
    "convert to-hf MODEL out",
    "convert from-standard MODEL out",
    "convert from-official . out --step 1",
    "reproduce figure1 --data tokens --out out --dry-run",
    "reproduce latency --out out --systems window --contexts 64 --seconds 0.01",
    "serve --port 0 --data out --keys keys --rate 10 --max-body 1M",
    "mcp --http 0 --sessions out --files folder",
]
VALUES = [
    *("", " ", "-", "--", "-1", "0", "1", "00", "1.5", "-0.0", "nan", "inf", "1e400", "1e-400", "9" * 30, "1_0", "٣"),
    *("1K", "1G", "1TB", "-1K", "none", "null", "True", "[]", "{}", "a=b", "=", "a=", "x=1=2", "\ud800", "\udcff"),
    *("\n", "a\nb", "\x1b[31m", "%s", "{0}", "$HOME", "~", "~nobody", "a" * 300, "/", "/dev/null", "/dev/full", "."),
    *("..", "text.txt", "rows.jsonl", "binary", "old.session", "empty", "folder", "missing/file", "text.txt/x", "keys"),
    *("link", "tokens", "out", "MODEL", "tiny", "125m", "bfloat16", "float16", "cpu", "cuda", "cuda:9", "auto"),
]


def options_of(name: str) -> list[str]:
    """The long options that the help of a command names."""
    import argparse

    parser = argparse.ArgumentParser()
    COMMANDS[name].add_arguments(parser)
    found: list[str] = []
    for action in parser._actions:
        for one in [parser, *(action.choices.values() if isinstance(action, argparse._SubParsersAction) else [])]:
            found += [option for a in one._actions for option in a.option_strings if option.startswith("--")]
    return sorted(set(found) - {"--help"})


OPTIONS = {name: options_of(name) for name in COMMANDS}


def mutated(choices: random.Random, model: Path) -> list[str]:
    words = shlex.split(choices.choice(GOOD))
    for _ in range(choices.choice((1, 1, 1, 2, 3))):
        at = choices.randrange(len(words))
        value = choices.choice(VALUES)
        kind = choices.randrange(7)
        if kind == 0 and len(words) > 1:
            del words[at]
        elif kind == 1:
            words.insert(at, words[at])
        elif kind == 2:
            words[max(at, 1 % len(words))] = value
        elif kind == 3:
            words.insert(at + 1, value)
        elif kind == 4:
            name = choices.choice(OPTIONS.get(words[0]) or ["--model"])
            words += [name] if choices.random() < 0.3 else [name, value]
        elif kind == 5 and "=" in words[at]:
            words[at] = words[at].partition("=")[0] + "=" + value
        else:
            cut = choices.randrange(len(words[at]) + 1)
            words[at] = words[at][:cut] + choices.choice(("", "x", "\xe9", "-", "0")) + words[at][cut + 1 :]
    return [word.replace("MODEL", str(model)).replace("\0", "") for word in words]


def stop_soon() -> None:
    """No service runs for ever, and nothing leaves this machine."""
    import uvicorn

    def run(self: Any, sockets: Any = None) -> None:
        return None

    uvicorn.Server.run = run  # type: ignore[method-assign, assignment]
    import os
    import signal
    import threading

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["XDG_DATA_HOME"] = str(Path.cwd())
    threading.Timer(5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()


def test_mutated_command_lines(shipped: Path, fresh: Any, figures: Figures) -> None:
    folder = fresh.template
    (folder / "binary").write_bytes(bytes(range(256)) * 4)
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "keys").write_text("me 0123456789abcdef0123\n")
    (folder / "link").symlink_to("text.txt")
    saved = ["read", "text.txt", "--save", "old.session", "--notebook", "--no-plot", "--quiet"]
    assert run_copy(saved, folder).code == 0
    before, model_before = contents(folder), contents(shipped)
    for name, choices in rounds():
        here, argv = fresh(), mutated(choices, shipped)
        outcome = run_copy(argv, here, stdin=choices.choice((b"", TEXT.encode(), b"\xff\0")), before=stop_soon)
        assert (wrong := complaint(outcome)) is None, f"{name} {argv}: {wrong}"
        figures.add("command lines")
        figures.add("refused", outcome.code in (1, 2))
        after = contents(here)
        # What an option names as its target may be written; what was there before stays what it was.
        changed = {file for file in before if before[file] != after.get(file)} - {"old.session", "link"}
        changed = {file for file in changed if file not in argv and "notebook" not in file and ".lock" not in file}
        assert not changed, f"{name} {argv} changed {changed}"
        temporary = [file for file in after if file not in before and file.endswith((".part", ".old"))]
        assert not temporary, f"{name} {argv} left {temporary}"
    assert contents(shipped) == model_before
