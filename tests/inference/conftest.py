"""Fixtures of the sessions' tests."""

import pytest
from helpers import small_model
from inference_helpers import TEXT

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.model.transformer import Transformer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 280)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Transformer:
    return small_model(vocab_size=tokenizer.vocab_size).eval().requires_grad_(False)
