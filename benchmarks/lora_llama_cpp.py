"""What llama.cpp computes with an adapter of `ttt-e2e export lora`, beside the session that it was made of.

    python benchmarks/lora_llama_cpp.py book.session NEXT.txt --model smollm2 --base plain.gguf --adapter lora.gguf

The text is scored in stretches that fit the model's window, each behind BOS alone, with learning off: by llama.cpp (the
Python package llama-cpp-python, its caches in float32) with the base and with base and adapter, and by the model in
float32 with and without what the session has learned. Mean nats per token, and the largest difference of two logits.
docs/tutorials/convert.md has the commands that write both files.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from llama_cpp import Llama  # type: ignore[import-not-found]
from torch import Tensor

from ttt_e2e.cli.common import model_folder
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.streaming import forward, start_reading


def mean_loss(logits: list[Tensor], texts: list[np.ndarray]) -> float:
    """Nats per token, over all of all texts but their first ones."""
    pairs = zip(logits, texts, strict=True)
    losses = [torch.nn.functional.cross_entropy(some[:-1], torch.tensor(text[1:])) for some, text in pairs]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def main() -> None:
    """Score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("session", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--stretches", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a stretch, BOS among them; at most the window")
    arguments = parser.parse_args()
    model, tokenizer = load_model(model_folder(arguments.model))
    fast = Session.load(arguments.session, model, tokenizer).state().read_state.loop.fast
    ids = np.concatenate([*tokenizer.encode_chunks([arguments.text.read_text()])])
    step = arguments.tokens - 1
    texts = [np.array([tokenizer.bos, *ids[i * step : (i + 1) * step]]) for i in range(arguments.stretches)]
    for name, adapter in (("nothing that was learned", None), ("what was learned", arguments.adapter)):
        ours = []
        for text in texts:
            state = start_reading(model, 1)
            if adapter:
                state = state._replace(loop=state.loop._replace(fast=fast))
            ours.append(forward(model, state, torch.tensor(text)[None])[0][0])
        options = {"n_ctx": arguments.tokens, "n_batch": arguments.tokens, "logits_all": True, "verbose": False}
        other = Llama(arguments.base, lora_path=adapter, type_k=0, type_v=0, flash_attn=False, **options)
        theirs = []
        for text in texts:
            other.reset()
            other.eval(text.tolist())
            theirs.append(torch.tensor(other.scores[: len(text)]))
        apart = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
        losses = f"{mean_loss(ours, texts):.5f}, llama.cpp {mean_loss(theirs, texts):.5f}"
        print(f"{name}: {losses} nats per token; logits differ by {apart:.2g} at most")


if __name__ == "__main__":
    main()
