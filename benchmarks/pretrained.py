"""A pretrained model that learns while it reads, against the same model in `transformers`: tokens a second.

    python benchmarks/pretrained.py                            # SmolLM2-135M, 8,192 tokens of Python's own library
    python benchmarks/pretrained.py --context 32768
    python benchmarks/pretrained.py --tiny                     # a small random model, in seconds

Readers of one text take turns, a piece of 512 tokens each, so that other work on the machine disturbs all alike: ours
with learning in mini-batches of 128 and of 32, ours without learning, ours with full attention in place of the window,
and the original in `transformers`, which keeps all keys and values in its own cache. Both full attentions make the
logits of every token, as scoring a text takes. Then ours and `generate` continue the text greedily, by turns, after a
prompt of one piece. All have the same dtype; the two full attentions have random weights of the same shape, which are
as fast. (Given the GGUF file, `transformers` keeps the weights packed, and multiplies in float32.)

Seconds are CPU seconds of the process, which other processes disturb less; with one thread they are what a machine of
one's own would take. llama.cpp is timed too, on the GGUF file, where its Python package `llama_cpp` is installed.
"""

import argparse
import copy
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttt_e2e.config.schema import ModelConfig, replace
from ttt_e2e.convert.smollm2 import installed_base, smollm2_folder
from ttt_e2e.data.text import standard_library
from ttt_e2e.hardware import keep_freed_memory, machine
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.streaming import forward, read_mini_batch, start_reading
from ttt_e2e.model.precision import hold_in, product_matrices
from ttt_e2e.model.transformer import Transformer, parameter_shapes

TINY = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
LEARNING = ("learning, b 128", "learning, b 32")
OURS_FULL, THEIRS = "full attention", "transformers"
Reader = Iterator[None]  # each step reads one more piece


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192, help="tokens that are read (default: 8192)")
    parser.add_argument("--without-full", action="store_true", help="leave our full attention out")
    parser.add_argument("--written", type=int, default=64, help="tokens that are written (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="of writing (default: 3)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a small random model and text, to try the benchmark")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.context, arguments.written = min(arguments.context, 512), min(arguments.written, 8)
    return arguments


def our_model(tiny: bool, dtype: torch.dtype, count: int) -> tuple[Transformer, torch.Tensor]:
    """The model, and `count` + 1 tokens to read."""
    if tiny:
        config = ModelConfig(
            **TINY,
            num_hidden_layers=4,
            suffix_layers=2,
            sliding_window=128,
            mini_batch_size=32,
            parallel_mlp=True,
            fast_intermediate_size=16,
            suffix_intermediate_size=48,
            attention_sink=True,
            qk_norm=False,
            post_norm=False,
        )
        model = random_model(config, dtype)
        return model, torch.randint(config.vocab_size, (1, count + 1))
    model, tokenizer = load_model(smollm2_folder(), "cpu", dtype)
    ids = [np.array([tokenizer.bos])]
    texts = (chunk for document in standard_library() for chunk in document.chunks())
    for tokens in tokenizer.encode_chunks(texts):
        ids.append(tokens)
        if sum(map(len, ids)) > count:
            break
    return model, torch.from_numpy(np.concatenate(ids)[: count + 1].astype(np.int64))[None]


def random_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """A model with random weights, held as `load_model` holds them. Its speed is that of any other weights."""
    model = Transformer(config, torch.Generator().manual_seed(0)).eval().requires_grad_(False)
    matrices = product_matrices(config, parameter_shapes(config))
    hold_in(dtype, (weight for name, weight in model.named_parameters() if name in matrices))
    return model


def full_attention(config: ModelConfig) -> ModelConfig:
    """The configuration of the original, from that of the converted model."""
    width = config.intermediate_size
    return replace(config, dict(pattern=("full",), suffix_layers=0, attention_sink=False, intermediate_size=width))


def their_model(config: ModelConfig, dtype: torch.dtype) -> Any:
    """The original's shape in `transformers`, with random weights."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import LlamaConfig, LlamaForCausalLM

    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    shape = {name: getattr(config, name) for name in names.split()}
    theirs = LlamaConfig(**shape, tie_word_embeddings=config.tie_word_embeddings, max_position_embeddings=1 << 20)
    return LlamaForCausalLM(theirs).to(dtype).eval()


@torch.inference_mode()
def read_theirs(model: Any, ids: torch.Tensor, piece: int) -> Reader:
    from transformers import DynamicCache

    cache = DynamicCache()
    for start in range(0, ids.shape[1] - 1, piece):
        model(input_ids=ids[:, start : start + piece], past_key_values=cache, use_cache=True)
        yield


def read_ours(model: Transformer, ids: torch.Tensor, piece: int, b: int | None, dtype: torch.dtype) -> Reader:
    """b: tokens of a mini-batch; None reads pieces without learning."""
    if b is not None:
        session = Session(model, dtype=dtype)
        session.read(ids[0, :1].numpy())  # scored are the tokens after it
        for start in range(1, ids.shape[1], piece):
            assert len(session.read(ids[0, start : start + piece].numpy())) == piece
            yield
        return
    state = start_reading(model, 1, dtype)
    for start in range(0, ids.shape[1] - 1, piece):
        tokens, targets = ids[:, start : start + piece], ids[:, start + 1 : start + piece + 1]
        state, losses, _ = read_mini_batch(model, state, tokens, targets, learn=False, dtype=dtype)
        assert losses.isfinite().all()
        yield


def read_full(model: Transformer, ids: torch.Tensor, piece: int, dtype: torch.dtype) -> Reader:
    state = start_reading(model, 1, dtype)
    for start in range(0, ids.shape[1] - 1, piece):
        _, state = forward(model, state, ids[:, start : start + piece], dtype)
        yield


def time_reading(readers: dict[str, Reader]) -> dict[str, float]:
    """CPU seconds of every reader, which take turns until all have read the text."""
    seconds = dict.fromkeys(readers, 0.0)
    left = dict(readers)
    while left:
        for name, reader in list(left.items()):
            before = time.process_time()
            if next(reader, "end") == "end":
                del left[name]
            else:
                seconds[name] += time.process_time() - before
    return seconds


def write_ours(session: Session, count: int) -> float:
    """CPU seconds from the first token to the last of `count`."""
    times = []
    for _ in session.generate_tokens(max_tokens=count, temperature=0):
        times.append(time.process_time())
    return (times[-1] - times[0]) / (len(times) - 1)


def write_theirs(model: Any, prompt: torch.Tensor, count: int) -> float:
    from transformers import StoppingCriteriaList

    times = []

    def note(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        times.append(time.process_time())
        return torch.zeros(len(ids), dtype=torch.bool)

    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count}
    mask, stop = torch.ones_like(prompt), StoppingCriteriaList([note])
    model.generate(prompt, attention_mask=mask, stopping_criteria=stop, pad_token_id=0, **options)
    return (times[-1] - times[0]) / (len(times) - 1)


def llama_cpp(ids: torch.Tensor, piece: int, written: int, threads: int) -> dict[str, float] | None:
    """Seconds per token of llama.cpp, reading and writing; None where it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    from llama_cpp import Llama  # type: ignore[import-not-found]

    model = Llama(str(installed_base()), n_ctx=ids.shape[1], n_threads=threads, n_threads_batch=threads, verbose=False)
    before = time.process_time()
    model.eval(ids[0, :-1].tolist())
    reading = (time.process_time() - before) / (ids.shape[1] - 1)
    model.reset()
    times = []
    for _, _ in zip(range(written), model.generate(ids[0, :piece].tolist(), temp=0.0), strict=False):
        times.append(time.process_time())
    return {"reading": reading, "writing": (times[-1] - times[0]) / (len(times) - 1)}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    dtype, tiny = getattr(torch, arguments.dtype), arguments.tiny
    piece = 128 if tiny else 512
    context = arguments.context // piece * piece
    model, ids = our_model(tiny, dtype, context)
    theirs = their_model(model.config, dtype)
    with_b = {}
    for b in (128, 32):
        with_b[b] = copy.copy(model)  # the same weights
        with_b[b].config = replace(model.config, {"mini_batch_size": b})
    readers = {name: read_ours(with_b[b], ids, piece, b, dtype) for name, b in zip(LEARNING, with_b, strict=True)}
    readers["no learning"] = read_ours(model, ids, piece, None, dtype)
    if not arguments.without_full:
        full = random_model(full_attention(model.config), dtype)
        readers[OURS_FULL] = read_full(full, ids, piece, dtype)
    readers[THEIRS] = read_theirs(theirs, ids, piece)
    next(read_ours(with_b[32], ids, piece, 32, dtype))  # loading libraries is not counted
    next(read_theirs(theirs, ids, piece))
    reading = time_reading(readers)

    session = Session(model, dtype=dtype)
    session.read(ids[0, :piece].numpy())
    writing: dict[str, list[float]] = {"ours": [], THEIRS: []}
    for _ in range(arguments.rounds):
        writing["ours"].append(write_ours(session, arguments.written))
        writing[THEIRS].append(write_theirs(theirs, ids[:, :piece], arguments.written))
    per_token = {name: statistics.median(found) for name, found in writing.items()}
    result: dict[str, Any] = {
        "context": context,
        "reading_tokens_per_second": {name: context / seconds for name, seconds in reading.items()},
        "writing_tokens_per_second": {name: 1 / seconds for name, seconds in per_token.items()},
        "ratios": ratios(reading, per_token),
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "tiny": tiny,
        "machine": machine(),
    }
    others = None
    if not tiny:
        with suppress(ImportError):
            others = llama_cpp(ids, piece, arguments.written, arguments.threads)
    if others is not None:
        result["llama_cpp_tokens_per_second"] = {what: 1 / seconds for what, seconds in others.items()}
    show(result)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def ratios(reading: dict[str, float], writing: dict[str, float]) -> list[dict[str, Any]]:
    """What is asked of the figures, and what it is; more tokens a second are a larger ratio, but for the last."""
    b128, b32 = (reading[name] for name in LEARNING)
    found = [
        ("reading and learning, b 128 / transformers, pieces with a cache", reading[THEIRS] / b128, ">= 0.74"),
        ("reading without learning / transformers", reading[THEIRS] / reading["no learning"], "-"),
    ]
    if OURS_FULL in reading:
        target = ">= 2.5 at 8K, 8 at 32K"
        found.append(("reading and learning, b 128 / our full attention", reading[OURS_FULL] / b128, target))
    found += [
        ("writing / transformers' generate", writing[THEIRS] / writing["ours"], ">= 1"),
        ("time of b 32 / time of b 128", b32 / b128, "<= 1.3"),
    ]
    return [{"what": what, "ratio": ratio, "target": target} for what, ratio, target in found]


def show(result: dict[str, Any]) -> None:
    print(f"| {result['context']:,} tokens, {result['dtype']} | tokens/s |\n|---|---|")
    for name, speed in result["reading_tokens_per_second"].items():
        print(f"| reading: {name} | {speed:.0f} |")
    for name, speed in result["writing_tokens_per_second"].items():
        print(f"| writing: {name} | {speed:.1f} |")
    for what, speed in result.get("llama_cpp_tokens_per_second", {}).items():
        print(f"| llama.cpp, {what} | {speed:.1f} |")
    print("\n| | ratio | target |\n|---|---|---|")
    for row in result["ratios"]:
        print(f"| {row['what']} | {row['ratio']:.2f} | {row['target']} |")
    if "llama_cpp_tokens_per_second" not in result:
        print("\nllama.cpp was not timed: its package, llama_cpp, is not installed, or the model is random.")


if __name__ == "__main__":
    main()
