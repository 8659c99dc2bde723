"""Our models in the transformers library: written there, and generating and trained there as they are here."""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_model

pytest.importorskip("transformers", reason="the transformers library is not installed")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

import ttt_e2e.hf
from ttt_e2e.cli import convert as command
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.hf.cache import CACHE_NAME
from ttt_e2e.hf.export import convert_to_hf, wrap_model
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.streaming import forward, read_mini_batch, start_reading
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.checkpoint import save_model
from ttt_e2e.model.transformer import Transformer

LENGTHS = (3, 17, 33, 6, 33)  # of mini-batches of 5 tokens, and a window of 12
TEXT = "The street was still wet; the rain had stopped. A bird sang in the tree, and another answered. " * 4


def reader(**changes: Any) -> Transformer:
    return small_model(**{"inner_loop.lr": 0.3, **changes}).eval().requires_grad_(False)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(1, 50, length) for length in lengths]


def padded(rows: list[np.ndarray], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length in one batch, padded on the left, and its mask."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.from_numpy(row), 1
    return ids, mask


def written(model: Transformer, prompt: np.ndarray, count: int, learn: bool = True, **options: Any) -> list[int]:
    return list(Session(model, learn=learn).generate_tokens(prompt, max_tokens=count, temperature=0, **options))


# -- generating --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_from_writing", [False, True])
@pytest.mark.parametrize("chunk", [None, 7])
def test_greedy_in_a_batch_is_what_every_row_writes_alone(learn_from_writing: bool, chunk: int | None) -> None:
    model = reader()
    wrapped, rows = wrap_model(model), prompts()
    wrapped.config.learn_from_writing = learn_from_writing
    ids, mask = padded(rows)
    out = wrapped.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0, prefill_chunk_size=chunk
    )
    expected = [written(model, row, 20, learn_from_writing=learn_from_writing) for row in rows]
    assert out[:, ids.shape[1] :].tolist() == expected
    assert expected != [written(model, row, 20, learn=False) for row in rows]  # learning shows


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": ("full",)},
        {"suffix_layers": 0, "pattern": ("full", "window"), "mini_batch_size": None},
        {"pattern": ("mamba2", "gated-deltanet", "window", "window"), "mamba2.state_size": 8, "mamba2.n_groups": 2},
        {"pattern": ("ttt-kvb", "titans", "window", "window"), "sliding_window": 10, "memory.lr": 0.1},
        {"suffix_layers": 4},
        {"fast_rank": 2},
    ],
)
@pytest.mark.parametrize("learn", [True, False])
def test_greedy_of_other_models(changes: dict[str, Any], learn: bool) -> None:
    model = reader(**changes)
    wrapped, rows = wrap_model(model), prompts()
    wrapped.config.learn_while_reading = learn
    ids, mask = padded(rows)
    out = wrapped.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert out[:, ids.shape[1] :].tolist() == [written(model, row, 12, learn) for row in rows]


def test_going_on_with_the_cache_is_going_on_with_the_session() -> None:
    """A second prompt after the first one's answer: both have become part of the text, and are learned from."""
    model = reader()
    wrapped, rows = wrap_model(model), prompts()
    ids, mask = padded(rows)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    first = wrapped.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    more = torch.tensor(np.stack(prompts((9,) * len(rows), seed=1)))
    ids = torch.cat((first.sequences, more), 1)
    mask = torch.cat((mask, torch.ones(len(rows), 8 + 9, dtype=mask.dtype)), 1)
    kept = copy.copy(first[CACHE_NAME])
    second = wrapped.generate(ids, attention_mask=mask, **{CACHE_NAME: first[CACHE_NAME]}, **options)
    for i, row in enumerate(rows):
        session = Session(model)
        session.read(row)
        session.read([*session.generate_tokens(max_tokens=8, temperature=0), *more[i].tolist()])
        assert second[i, ids.shape[1] :].tolist() == list(session.generate_tokens(max_tokens=8, temperature=0))
    again = wrapped.generate(ids, attention_mask=mask, **{CACHE_NAME: kept}, **options)  # the copy stayed as it was
    assert torch.equal(again, second)


@pytest.mark.parametrize("learn", [True, False])
def test_what_a_row_wrote_after_its_end_is_forgotten_where_it_is_masked(learn: bool) -> None:
    model = reader()
    wrapped, rows = wrap_model(model), prompts((7, 12))
    wrapped.config.learn_while_reading = learn
    ids, mask = padded(rows)
    cache = wrapped(ids, attention_mask=mask)[CACHE_NAME]
    wrote = torch.tensor([[3, 0, 0], [4, 5, 6]])  # the first row has ended after one token
    for column in wrote.split(1, 1):
        cache = wrapped(column, cache=cache, generated=True)[CACHE_NAME]
    mask = torch.cat((mask, torch.tensor([[1, 0, 0], [1, 1, 1]]), torch.ones(2, 2, dtype=mask.dtype)), 1)
    more = torch.tensor([[8, 9], [8, 9]])
    logits = wrapped(more, attention_mask=mask, cache=cache).logits[:, -1]
    for i, text in enumerate(([*rows[0], 3, 8, 9], [*rows[1], 4, 5, 6, 8, 9])):
        torch.testing.assert_close(logits[i], last_logits(model, np.array(text), learn), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"suffix_layers": 0, "pattern": ("full", "window"), "mini_batch_size": None}])
def test_a_row_that_is_left_of_a_batch_at_different_positions(changes: dict[str, Any]) -> None:
    model = reader(**changes)
    wrapped, rows = wrap_model(model), prompts((3, 4, 5, 6, 7))
    wrapped.config.learn_while_reading = False
    ids, mask = padded(rows)
    cache = wrapped(ids, attention_mask=mask)[CACHE_NAME]
    cache = wrapped(torch.full((5, 1), 3), cache=cache)[CACHE_NAME]
    cache.batch_select_indices(torch.tensor([0]))
    for token in (4, 5, 6):  # where it wrote, and what it wrote is masked later
        cache = wrapped(torch.tensor([[token]]), cache=cache, generated=True)[CACHE_NAME]
    mask = torch.cat((mask[:1], torch.tensor([[1, 1, 0, 0, 1, 1]])), 1)
    logits = wrapped(torch.tensor([[8, 9]]), attention_mask=mask, cache=cache).logits[0, -1]
    expected = last_logits(model, np.array([*rows[0], 3, 4, 8, 9]), learn=False)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_learning_may_begin_where_it_was_off_before() -> None:
    model = reader(suffix_layers=3)
    wrapped, rows = wrap_model(model), prompts((7, 12))
    wrapped.config.learn_while_reading = False
    ids, mask = padded(rows)
    cache = wrapped(ids, attention_mask=mask)[CACHE_NAME]
    cache = wrapped(torch.tensor([[3], [4]]), cache=cache)[CACHE_NAME]  # rows at different positions, read together
    wrapped.config.learn_while_reading = True
    more = torch.tensor(np.stack(prompts((30, 30), seed=2)))
    logits = wrapped(more, cache=cache).logits[:, -1]
    b = model.config.mini_batch_size
    assert b is not None
    for i, row in enumerate(rows):
        read = torch.tensor(np.concatenate((row, [3 + i])))[None]
        _, state = forward(model, start_reading(model, 1), read)
        left = more[i : i + 1]
        while left.shape[1] > b:
            state, _, _ = read_mini_batch(model, state, left[:, :b], left[:, 1 : b + 1])
            left = left[:, b:]
        torch.testing.assert_close(logits[i], forward(model, state, left)[0][0, -1], atol=1e-5, rtol=1e-5)


def last_logits(model: Transformer, text: np.ndarray, learn: bool = True) -> torch.Tensor:
    """The logits after `text`, as a session has them that has read it."""
    session = Session(model, learn=learn)
    session.read(text)
    state, _, pending = session.state()
    return forward(model, state, torch.from_numpy(pending)[None])[0][0, -1]


def test_beams_are_those_of_a_plain_search() -> None:
    """The same search, with every beam's logits made anew from its whole text."""
    model, beams, count = reader(), 3, 9
    wrapped, rows = wrap_model(model), prompts((8, 23))
    wrapped.config.learn_from_writing = True  # so that a beam's state depends on what it wrote itself
    ids, mask = padded(rows)
    out = wrapped.generate(
        ids, attention_mask=mask, max_new_tokens=count, num_beams=beams, do_sample=False, pad_token_id=0
    )
    for i, row in enumerate(rows):
        running: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(count):
            grown = []
            for score, tokens in running:
                p = last_logits(model, np.array([*row, *tokens])).log_softmax(-1)
                grown += [(score + float(p[token]), [*tokens, token]) for token in range(len(p))]
            running = sorted(grown, reverse=True)[:beams]
        assert out[i, ids.shape[1] :].tolist() == running[0][1]
    assert out[:, ids.shape[1] :].tolist() != [written(model, row, count, learn_from_writing=True) for row in rows]


def test_a_row_that_stays_behind_does_not_hold_the_memory_of_the_others() -> None:
    wrapped = wrap_model(reader())
    ids, mask = padded(prompts((6, 31, 31, 31)))
    texts = wrapped(ids, attention_mask=mask)[CACHE_NAME]._texts
    assert [text.border.position for text in texts] == [5, 30, 30, 30]
    assert [len(text.border.batch.state.tensors()[0]) for text in texts] == [1, 3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_those_of_the_losses(dtype: torch.dtype) -> None:
    """After every token of a text, in one call and in several of any size, masked columns left out."""
    model = reader().to(dtype)
    wrapped, rows = wrap_model(model), prompts()
    wrapped.compute_dtype = dtype
    ids, mask = padded(rows)
    whole = wrapped(ids, attention_mask=mask).logits
    cache, pieces = None, []
    for first, stop in ((0, 1), (1, 4), (4, 20), (20, 26), (26, 33)):
        out = wrapped(ids[:, first:stop], attention_mask=mask[:, :stop], cache=cache)
        cache, pieces = out[CACHE_NAME], [*pieces, out.logits]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)
    last = wrapped(ids, attention_mask=mask, logits_to_keep=3).logits
    torch.testing.assert_close(last, whole[:, -3:], atol=1e-4, rtol=1e-4)
    assert not whole[mask == 0].any()
    for i, row in enumerate(rows):
        session = Session(model, dtype=dtype)
        losses = np.concatenate((session.read(row), session.score_pending()))
        p = whole[i, mask[i] == 1].log_softmax(-1)[:-1]
        found = -p[torch.arange(len(row) - 1), torch.from_numpy(row[1:])]
        np.testing.assert_allclose(found.numpy(), losses, atol=1e-4)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of ours, with a tokenizer."""
    where = tmp_path_factory.mktemp("ours")
    tokenizer = Tokenizer.train([TEXT], 300)
    tokenizer.save(where / "tokenizer.json")
    model = small_model(vocab_size=tokenizer.vocab_size, inner_loop__lr=0.3)
    save_model(model, where / "model", where / "tokenizer.json")
    return where / "model"


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("theirs") / "model"
    convert_to_hf(folder, out)
    return out


def test_loaded_and_saved_again_it_is_the_same(converted: Path, folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert isinstance(model, ttt_e2e.hf.TTTE2EForCausalLM) and not model.training
    expected = wrap_model(load(folder)).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    names = sorted(path.name for path in converted.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in set(names) - {"tokenizer_config.json"}:
        assert (tmp_path / name).read_bytes() == (converted / name).read_bytes(), name
    before, after = (json.loads((place / "tokenizer_config.json").read_text()) for place in (converted, tmp_path))
    assert {key: after[key] for key in before} == before  # the library adds where it was loaded from
    assert len({path.stat().st_mode for path in converted.iterdir()}) == 1
    config = AutoConfig.from_pretrained(converted)
    assert (config.vocab_size, config.hidden_size) == (load(folder).config.vocab_size, 16)


def load(folder: Path) -> Transformer:
    return load_model(folder)[0]


def test_the_tokenizer_is_ours_with_bos_in_front(converted: Path, folder: Path) -> None:
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(converted)
    assert theirs(TEXT)["input_ids"] == [ours.bos, *ours.encode(TEXT)]
    assert theirs.decode(theirs(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
    batch = theirs(["A bird", TEXT], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist())  # on the left
    assert Tokenizer.load(converted).bos == ours.bos == theirs.eos_token_id == theirs.pad_token_id


def test_the_pipeline_writes_what_a_session_writes(converted: Path, folder: Path) -> None:
    model, tokenizer = load(folder), Tokenizer.load(folder)
    write = pipeline("text-generation", str(converted), device="cpu")
    texts = [TEXT[:90], TEXT[40:250]]
    found = write(texts, max_new_tokens=10, do_sample=False, return_full_text=False, batch_size=2)
    for text, (answer,) in zip(texts, found, strict=True):
        expected = "".join(Session(model, tokenizer).generate(text, max_tokens=10, temperature=0))
        assert answer["generated_text"].startswith(expected)  # which waits for the last character's bytes


def test_bfloat16_is_for_products_and_not_for_weights(converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.compute_dtype == torch.bfloat16
    ids = torch.arange(1, 40)[None]
    logits = model(ids).logits
    exact = AutoModelForCausalLM.from_pretrained(converted)(ids).logits
    assert logits.dtype == torch.bfloat16 and not torch.equal(logits.float(), exact)
    torch.testing.assert_close(logits.float(), exact, atol=0.3, rtol=0.1)


def test_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args(["to-hf", str(folder), str(tmp_path / "out")])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ttt_e2e.hf.export", None)  # as if its import had failed
        with pytest.raises(UserError, match=r'needs that library: pip install "ttt-e2e\[hf\]"'):
            command.run(arguments)
    assert command.run(arguments) == 0
    count = sum(weight.numel() for weight in load(folder).parameters())
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: {count:,} parameters, for transformers\n"
    assert AutoConfig.from_pretrained(tmp_path / "out").model == load(folder).config


def test_refused(folder: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        convert_to_hf(folder, converted)
    with pytest.raises(UserError, match="is not a model folder"):
        convert_to_hf(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config = json.loads((converted / "config.json").read_text())
    with pytest.raises(UserError, match="field settings of config"):
        len(ttt_e2e.hf.TTTE2EConfig(**{**config, "settings": {"hidden_size": "wide"}}).model.mixers)
    wrapped = wrap_model(reader())
    ids = torch.arange(1, 9)[None]
    with pytest.raises(UserError, match="use_cache=True"):
        wrapped.generate(ids, use_cache=False, max_new_tokens=2)
    with pytest.raises(UserError, match="cache of its own"):
        wrapped.generate(ids, cache_implementation="static", max_new_tokens=2)
    for name in ("cache", "past_key_values"):  # under the library's older name, too
        with pytest.raises(UserError, match="give a ReadingCache"):
            wrapped(ids, **{name: DynamicCache()})
    with pytest.raises(UserError, match="cache is of 1 texts, the input of 2"):
        wrapped(ids.repeat(2, 1), cache=wrapped(ids)[CACHE_NAME])
    with pytest.raises(UserError, match=r"mask has shape \[1, 3\]; give one of \[1, 8\], or of \[1, 8\]"):
        wrapped(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(UserError, match="whole numbers from 0 to 49"):
        wrapped(ids + 45)
    with pytest.raises(UserError, match="cannot be removed"):
        wrapped(ids)[CACHE_NAME].crop(-1)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        wrapped.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=2)


def test_divergence_is_said_and_leaves_the_cache_alone() -> None:
    wrapped = wrap_model(reader(inner_loop__lr=1e30))
    cache = wrapped(torch.arange(1, 4)[None])[CACHE_NAME]
    with pytest.raises(UserError, match=r"Learning diverged in row 0 of the batch: the loss at tokens 5 to 10 is"):
        wrapped(torch.arange(4, 30)[None], cache=cache)
    assert cache.get_seq_length() == 3
    wrapped.config.learn_while_reading = False
    assert wrapped(torch.arange(4, 30)[None], cache=cache).logits.isfinite().all()


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_one_that_training_minimises() -> None:
    model, bos = small_model(), 1
    wrapped = wrap_model(model, bos).train()
    ids = torch.tensor(np.stack(prompts((31, 31))))
    ids[:, 0] = ids[0, 12] = bos
    out = wrapped(ids, attention_mask=torch.ones_like(ids), labels=ids.masked_fill(ids == bos, -100))
    expected = sequence_loss(model, ids, bos=bos)
    assert out.loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    ours = torch.autograd.grad(out.loss, list(wrapped.parameters()))
    theirs = torch.autograd.grad(expected.loss, list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    wrapped.config.learn_while_reading = False
    frozen = wrapped(ids, labels=ids).loss
    assert frozen.item() == pytest.approx(sequence_loss(model, ids, bos=bos, learn=False).loss.item(), abs=1e-6)


def test_padding_at_the_end_is_no_target() -> None:
    model, bos = small_model(), 1
    wrapped = wrap_model(model, bos)
    ids = torch.tensor(np.stack(prompts((31, 31)))).clamp(min=2)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    with_padding = ids.masked_fill(mask == 0, bos)
    found = wrapped(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert found.item() == pytest.approx(sequence_loss(model, with_padding, bos=bos).loss.item(), abs=1e-6)
    with pytest.raises(UserError, match="padding_side='right'"):
        wrapped(ids, attention_mask=mask.flip(1), labels=ids)
    for labels in (ids + 1, ids.masked_fill(torch.arange(31) < 5, -100)):
        with pytest.raises(UserError, match="labels are the input ids"):
            wrapped(ids, labels=labels)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_trainer_lowers_the_loss(converted: Path, tmp_path: Path, bf16: bool) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    model, tokenizer = AutoModelForCausalLM.from_pretrained(converted), AutoTokenizer.from_pretrained(converted)
    tokenizer.padding_side = "right"
    data = [tokenizer(TEXT[i : i + 150]) for i in range(0, 120, 10)]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=bf16,
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, collator, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3 and logged[0] == pytest.approx(before, abs=0.3)  # a mean, however it is accumulated
    trainer.save_model(str(tmp_path / "out"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
