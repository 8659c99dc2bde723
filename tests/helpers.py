"""What several tests share: small models and configurations, made-up tokens, altered files."""

import contextlib
import dataclasses
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import random
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from ttt_e2e.cli.main import main
from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.data.prepare import prepare
from ttt_e2e.files import with_digest
from ttt_e2e.model.transformer import Transformer

GEMMA: dict[str, Any] = dict(  # what models of this family have, together
    hidden_act="gelu_pytorch_tanh",
    embedding_multiplier=4.0,
    attn_logit_softcapping=1.5,
    final_logit_softcapping=3.0,
    rope_local_pattern=(True, False, True),
    rope_local_base_freq=30.0,
)
GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def make_config(**values: Any) -> ModelConfig:
    """A configuration from settings by name; one inside a value is written with a dot or with two underscores."""
    inner: dict[str, dict] = {}
    for name in list(values):
        head, _, rest = name.replace("__", ".").partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = values.pop(name)
    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    return ModelConfig(**values, **{head: dataclasses.replace(defaults[head], **some) for head, some in inner.items()})


def small_config(**changes: object) -> ModelConfig:
    """A model of four blocks, two of them suffix, that runs in milliseconds."""
    values: dict = dict(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        suffix_layers=2,
        sliding_window=12,
        mini_batch_size=5,
        initializer_range=0.3,
    )
    return make_config(**{**values, **changes})


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> Transformer:
    """`small_config` as a model: norms off one, sinks and low-rank factors off zero, so that a test sees them."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(small_config(**changes), generator).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or ".fast.up_" in name or name.endswith("sink_value"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


def made_up_tokens(folder: Path, documents: int) -> Path:
    """Little documents of made-up sentences, prepared in `folder`; a tenth of them is held out."""
    choices = random.Random(0)
    words = ["red", "green", "blue", "fish", "bird", "tree", "sings", "swims", "grows"]
    lines = [" ".join(choices.choices(words, k=choices.randint(5, 60))) for _ in range(documents)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    prepare([folder / "texts.jsonl"], folder / "tokens", vocab_size=272, val_share=0.1, progress=False)
    return folder / "tokens"


def with_fact(path: Path, name: str, value: Any) -> None:
    """Alter what a session file says of itself, as somebody who means harm might."""
    with safe_open(path, "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        facts = json.loads(file.metadata()["session"])
    save_file(tensors, path, {"session": json.dumps(with_digest(facts | {name: value}))})


def flipped(content: bytes, bit: int) -> bytes:
    """`content` with one bit flipped."""
    altered = bytearray(content)
    altered[bit // 8] ^= 1 << bit % 8
    return bytes(altered)


def wait_for_other_threads(seconds: float = 10.0) -> None:
    """Wait, for this long at most, until no other thread of this process computes, as some do after their test.

    A copy would inherit the locks that it holds, such as that of MKL's memory, for which it would wait for ever.
    """
    tasks, end = Path("/proc/self/task"), time.monotonic() + seconds

    def computes(task: Path) -> bool:
        with contextlib.suppress(OSError):  # it has just ended
            return (task / "stat").read_text().rpartition(") ")[2].startswith("R")
        return False

    own = str(threading.get_native_id())
    while tasks.is_dir() and time.monotonic() < end:
        if not any(computes(task) for task in tasks.iterdir() if task.name != own):
            break
        time.sleep(0.001)


def start_command(
    argv: list[str], stdin: int, stdout: int, stderr: int, before: Callable[[], object] = lambda: None
) -> int:
    """Run a command line in a copy of this process, with these descriptors as its streams; returns its process id.

    It ends with the command's exit code, or 99 after an exception. before: called in the copy first.
    """
    wait_for_other_threads()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            for number, descriptor in enumerate((stdin, stdout, stderr)):
                os.dup2(descriptor, number)
            sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
            before()
            code = main(argv)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def set_back_clock(set_attribute: Callable[[Any, str, object], object] = setattr) -> None:
    """Let the system's clock, which `time.time` shows, go back by a day whenever somebody looks."""
    looks = itertools.count()
    set_attribute(time, "time", lambda: 2e9 - 86_400.0 * next(looks))
    set_attribute(time, "time_ns", lambda: int(1e9 * time.time()))


def start_copy(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """Call `function` in a copy of this process, which a test can kill; unlike a new one it has imported everything."""
    for late in ("torch._dynamo", "torch.distributed.fsdp"):  # by AdamW and by sharding, and then by every copy anew
        importlib.import_module(late)

    def copy() -> None:
        gc.freeze()  # otherwise every full collection goes through all that was imported, and copies its memory
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=copy, daemon=True)
    wait_for_other_threads()
    process.start()
    return process


def start_group(count: int, function: Callable[..., object], *arguments: object) -> list[BaseProcess]:
    """Call `function` in `count` copies of this process, which find each other as those of torchrun do."""

    def member(rank: int) -> None:
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        function(*arguments)

    with socket.socket() as reserved:  # which the copies keep: nobody else is given its port before rank 0 listens
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("", 0))
        port = reserved.getsockname()[1]
        environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        return [start_copy(member, rank) for rank in range(count)]


def run_group(count: int, function: Callable[..., object], *arguments: object) -> list[int | None]:
    """The same, to the end; returns the exit codes."""
    processes = start_group(count, function, *arguments)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
