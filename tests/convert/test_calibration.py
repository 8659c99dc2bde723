"""Sinks of converted models: what transformers computes for the first token, and what a conversion does with it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_helpers import Pretrained, tokens, with_tokenizer

from ttt_e2e.cli.main import main
from ttt_e2e.config.schema import replace
from ttt_e2e.convert.calibration import TEXT, calibrate_sinks, calibration_ids
from ttt_e2e.convert.from_hf import convert_from_hf, describe
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.data.text import read_text
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.checkpoint import load_transformer
from ttt_e2e.model.transformer import Transformer

pytest.importorskip("transformers", reason="transformers, which writes the checkpoints, is missing")

OPTIONS = LearningOptions(sliding_window=12, mini_batch_size=5, fast="split")


@pytest.mark.parametrize("name", ["llama, one key head, sharded", "qwen3, biases, yarn"])
def test_sinks_are_what_the_original_gives_to_the_first_token(
    pretrained: Pretrained, tmp_path: Path, name: str
) -> None:
    """Scores from the queries and keys of transformers; losses from its logits."""
    theirs, folder = pretrained(name)
    convert_from_hf(folder, tmp_path / "out", OPTIONS)
    model, ids = load_transformer(tmp_path / "out"), tokens(60, 1)
    config = replace(model.config, {"attention_sink": True})
    weights = dict(model.named_parameters())
    sinks, losses = calibrate_sinks(config, lambda name: weights[name].detach(), ids[0].numpy(), 128, [None] * 4)

    queries: dict[int, Any] = {}
    for i, layer in enumerate(theirs.model.layers):
        module = getattr(layer.self_attn, "q_norm", layer.self_attn.q_proj)
        module.register_forward_hook(lambda _, __, out, i=i: queries.update({i: out}))
    with torch.no_grad():
        out = theirs(ids[:, :-1], use_cache=True)
        cos, sin = theirs.model.rotary_emb(ids.float(), torch.arange(59)[None])
    for i, cached in enumerate(out.past_key_values.layers):
        q_HTK = queries[i].view(59, config.num_attention_heads, -1).transpose(0, 1)
        a, b = q_HTK.chunk(2, -1)
        q_HTK = q_HTK * cos[0] + torch.cat((-b, a), -1) * sin[0]
        for head in range(config.num_attention_heads):
            group = head * config.num_key_value_heads // config.num_attention_heads
            scores = q_HTK[head, 12:] @ cached.keys[0, group, 0] * config.head_dim**-0.5
            assert sinks[f"blocks.{i}.mixer.sink_logit"][head] == pytest.approx(
                float(scores.exp().mean().log()), abs=1e-4
            )
        torch.testing.assert_close(sinks[f"blocks.{i}.mixer.sink_value"], cached.values[0, :, 0], rtol=1e-4, atol=1e-5)

    assert losses is not None
    full = torch.nn.functional.cross_entropy(out.logits[0, 12:], ids[0, 13:])
    assert losses.full_attention == pytest.approx(float(full), abs=1e-5)
    assert losses.without_sink == pytest.approx(
        float(sequence_loss(model, ids, learn=False).nll_BT[0, 12:].mean()), abs=1e-5
    )
    sunk = Transformer(config)
    sunk.load_state_dict({**weights, **sinks})
    assert losses.with_sink == pytest.approx(
        float(sequence_loss(sunk, ids, learn=False).nll_BT[0, 12:].mean()), abs=1e-5
    )
    assert abs(losses.with_sink - losses.without_sink) > 1e-3


def test_only_the_beginning_of_a_calibration_text_is_encoded(tmp_path: Path) -> None:
    tokenizer, text, path = Tokenizer.train(["geese"], 260), "The geese flew.\n" * 200_000, tmp_path / "text"
    path.write_bytes(text.encode() + b"\xff")  # which is no text: an error if it were looked at
    for window in (1, 5000):
        ids = calibration_ids(tokenizer, path, window)
        assert window + 2048 < len(ids) < 100_000
        np.testing.assert_array_equal(ids, [tokenizer.bos, *tokenizer.encode(text[:100_000])][: len(ids)])
    path.write_text("geese\n")
    np.testing.assert_array_equal(calibration_ids(tokenizer, path, 12), [tokenizer.bos, *tokenizer.encode("geese\n")])


def test_conversion_calibrates_by_itself(pretrained: Pretrained, tmp_path: Path) -> None:
    theirs, folder = pretrained("llama")
    done = convert_from_hf(with_tokenizer(folder), tmp_path / "out", OPTIONS)
    model = load_transformer(tmp_path / "out")
    assert model.config.attention_sink and all(block.mixer.sink_value.abs().max() > 0.01 for block in model.blocks)
    assert done.sink_losses is not None and any(line.startswith("sinks: past the window") for line in describe(done))
    with torch.no_grad():  # inside the window nothing changes
        expected = torch.nn.functional.cross_entropy(theirs(tokens()).logits[0, :12], tokens()[0, 1:13])
    ours = sequence_loss(model, tokens(), learn=False).nll_BT[0, :12].mean()
    assert float(ours) == pytest.approx(float(expected), abs=1e-4)


def test_no_sink_where_none_is_wanted_or_needed(pretrained: Pretrained, tmp_path: Path) -> None:
    folder = with_tokenizer(pretrained("llama")[1])
    convert_from_hf(folder, tmp_path / "none", dataclasses.replace(OPTIONS, sink="none"))
    assert not load_transformer(tmp_path / "none").config.attention_sink
    sliding = with_tokenizer(pretrained("mistral, sliding window")[1])
    for window, has_sink in ((24, False), (12, True)):  # it was trained with a window of 24
        out = tmp_path / str(window)
        convert_from_hf(sliding, out, LearningOptions(sliding_window=window, mini_batch_size=4))
        assert load_transformer(out).config.attention_sink == has_sink


def test_a_window_of_the_whole_context(pretrained: Pretrained, tmp_path: Path) -> None:
    """There is no text past it that the original could read: sinks, but no losses."""
    done = convert_from_hf(
        with_tokenizer(pretrained("llama")[1]), tmp_path / "out", LearningOptions(128, mini_batch_size=4)
    )
    assert done.sink_losses is None
    logits = load_transformer(tmp_path / "out").blocks[0].mixer.sink_logit
    assert logits.isfinite().all() and logits.abs().max() > 1e-3


def test_short_calibration_text_is_refused(
    pretrained: Pretrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_tokenizer(pretrained("llama")[1])
    text = tmp_path / "text.txt"
    text.write_text("Too short.")
    message = "The calibration text has 11 tokens, too few for a window of 12"
    with pytest.raises(UserError, match=message):
        convert_from_hf(folder, tmp_path / "out", OPTIONS, calibration_text=text)
    arguments = ["convert", "from-hf", str(folder), str(tmp_path / "out"), "--window", "12", "--mini-batch", "4"]
    assert main([*arguments, "--calibration-text", str(text)]) != 0 and message in capsys.readouterr().err
    assert main([*arguments, "--calibration-text", str(tmp_path / "no.txt")]) != 0
    assert "no.txt" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_shipped_text_is_long_enough_for_the_default_window() -> None:
    """At no less than four characters a token, as English has them with vocabularies of pretrained models."""
    assert len(read_text(TEXT)) > 4 * (8192 + 2048)
    assert np.mean([letter.isascii() for letter in read_text(TEXT)]) > 0.99
