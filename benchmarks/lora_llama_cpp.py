"""What llama.cpp computes with an adapter of `ttt-e2e export lora`, beside the session that it was made of.

    python benchmarks/lora_llama_cpp.py book.session NEXT.txt --model smollm2 --base plain.gguf --adapter lora.gguf

The text is scored in stretches that fit the model's window, each behind BOS alone, with learning off: by llama.cpp (the
Python package llama-cpp-python, its caches in float32) with the base and with base and adapter, and by the model in
float32 with and without what the session has learned. Mean nats per token, and the largest difference of two logits.
docs/tutorials/convert.md has the commands that write both files.
"""

import numpy as np
import torch
from llama_cpp import Llama  # type: ignore[import-not-found]
from lora_text import open_text
from torch import Tensor


def mean_loss(logits: list[Tensor], texts: list[np.ndarray]) -> float:
    """Nats per token, over all of all texts but their first ones."""
    pairs = zip(logits, texts, strict=True)
    losses = [torch.nn.functional.cross_entropy(some[:-1], torch.tensor(text[1:])) for some, text in pairs]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def main() -> None:
    """Score and print."""
    arguments, texts, logits = open_text(__doc__)
    for name, adapter in (("nothing that was learned", None), ("what was learned", arguments.adapter)):
        ours = [logits(text, learned=adapter is not None) for text in texts]
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
