"""Training with the transformers library."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_model

pytest.importorskip("transformers", reason="the transformers library is not installed")

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers_helpers import TEXT, prompts

from ttt_e2e.errors import UserError
from ttt_e2e.hf.export import wrap_model
from ttt_e2e.inner_loop.meta_loss import sequence_loss


def test_loss_is_that_of_sequence_loss() -> None:
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


def test_padding_at_the_end_is_not_a_target() -> None:
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
def test_trainer_lowers_the_loss(converted: Path, tmp_path: Path, bf16: bool) -> None:
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
