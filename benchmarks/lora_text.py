"""What `lora_llama_cpp.py` and `lora_vllm.py` share: their options, the text in stretches, and the model's logits."""

import argparse
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ttt_e2e.convert.named import find_model
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.streaming import forward, start_reading


class Logits(Protocol):
    """The model's logits [tokens, vocabulary] in a text alone, with what the session has learned or without."""

    def __call__(self, text: np.ndarray, *, learned: bool) -> Tensor: ...


def open_text(description: str | None) -> tuple[argparse.Namespace, list[np.ndarray], Logits]:
    """The options on the command line, the stretches of the text as token ids, each behind BOS, and the logits."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("session", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--stretches", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a stretch, BOS among them; at most the window")
    arguments = parser.parse_args()
    model, tokenizer = load_model(find_model(arguments.model))
    fast = Session.load(arguments.session, model, tokenizer).state().read_state.loop.fast
    ids = np.concatenate([*tokenizer.encode_chunks([arguments.text.read_text()])])
    step = arguments.tokens - 1
    texts = [np.array([tokenizer.bos, *ids[i * step : (i + 1) * step]]) for i in range(arguments.stretches)]

    def logits(text: np.ndarray, *, learned: bool) -> Tensor:
        state = start_reading(model, 1)
        if learned:
            state = state._replace(loop=state.loop._replace(fast=fast))
        return forward(model, state, torch.tensor(text)[None])[0][0]

    return arguments, texts, logits
