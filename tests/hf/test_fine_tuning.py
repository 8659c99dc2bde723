"""What libraries for fine-tuning ask of a model: its embedding, its head, hooks, fewer stored activations, adapters."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

pytest.importorskip("transformers", reason="the transformers library is not installed")

from transformers import AutoModelForCausalLM
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from ttt_e2e.errors import UserError
from ttt_e2e.hf import TTTE2EForCausalLM
from ttt_e2e.hf.export import wrap_model
from ttt_e2e.inner_loop.meta_loss import sequence_loss

IDS = torch.randint(2, 50, (2, 31), generator=torch.Generator().manual_seed(0))


def wrapped(**changes: Any) -> TTTE2EForCausalLM:
    torch.manual_seed(0)
    return wrap_model(small_model(**{"inner_loop.lr": 0.3, **changes}), 1).train()


def loss(model: nn.Module) -> Tensor:
    found: Tensor = model(IDS, labels=IDS).loss
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head(tied: bool) -> None:
    model = wrapped(tie_word_embeddings=tied)
    before, names = loss(model).item(), set(model.state_dict())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is model.model.embedding and head.weight is model.model.head_weight
    assert set(model.state_dict()) == names
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(head(hidden), hidden @ model.model.head_weight.T)
    other = nn.Embedding(*embedding.weight.shape)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings().weight is other.weight and loss(model).item() != before
    assert (model.get_output_embeddings().weight is other.weight) == tied
    if tied:
        with pytest.raises(UserError, match="use set_input_embeddings"):
            model.set_output_embeddings(head)
    else:
        model.set_output_embeddings(nn.Linear(16, 50))
        assert model.get_output_embeddings().weight is model.model.head is not head.weight
    with pytest.raises(UserError, match=r"shape \[50, 16\]; change the vocabulary with resize"):
        model.set_input_embeddings(nn.Embedding(51, 16))
    twin = copy.deepcopy(model)
    assert twin.get_input_embeddings().weight is twin.model.embedding is not model.model.embedding


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mean_resizing", [True, False])
def test_resized_vocabulary(tied: bool, mean_resizing: bool, tmp_path: Path) -> None:
    model = wrapped(tie_word_embeddings=tied).eval()
    old, logits = model.model.embedding.detach().clone(), model(IDS).logits
    assert model.resize_token_embeddings().weight is model.model.embedding  # nothing is asked for
    assert torch.equal(model.resize_token_embeddings(53, 8, mean_resizing).weight[:50], old)
    assert model.config.vocab_size == model.model.config.vocab_size == 56
    assert [len(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())] == [56, 56]
    new = model.model.embedding[50:]
    assert (new - old.mean(0)).abs().max() < 1e-3 if mean_resizing else new.std() > 0.3 * old.std()
    # With other logits beside them the old ones stay, until the model learns.
    b = model.model.config.mini_batch_size
    torch.testing.assert_close(model(IDS).logits[:, :b, :50], logits[:, :b])
    loss(model.train()).backward()
    assert model.model.embedding.grad is not None and model.model.embedding.grad.shape == (56, 16)
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS + 6).logits, model(IDS + 6).logits)
    assert model.resize_token_embeddings(50).weight.shape == (50, 16)
    assert torch.equal(model(IDS).logits, logits)
    with pytest.raises(UserError, match="at least one token"):
        model.resize_token_embeddings(0)


def test_neftune_adds_noise_in_training_only() -> None:
    model = wrapped()
    before = loss(model).item()
    hook = activate_neftune(model, 5.0)
    noisy = loss(model)
    noisy.backward()
    assert noisy.item() != before and loss(model.eval()).item() == before
    deactivate_neftune(model, hook)
    assert loss(model.train()).item() == before


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        model = wrapped()
        assert model.supports_gradient_checkpointing
        if enabled:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == enabled
        loss(model).backward()
        gradients.append([weight.grad for weight in model.parameters()])
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_frozen_model_with_inputs_that_require_gradients() -> None:
    model = wrapped().requires_grad_(False)
    model.enable_input_require_grads()
    loss(model).backward()


def as_other(model: TTTE2EForCausalLM, how: str) -> TTTE2EForCausalLM:
    return model.to(torch.bfloat16) if how == "to" else model.bfloat16()


@pytest.mark.parametrize("how", ["to", "bfloat16"])
def test_half_precision_is_kept_and_weights_are_not_rounded(how: str, tmp_path: Path) -> None:
    model = wrapped().eval()
    weights, exact = [weight.clone() for weight in model.parameters()], model(IDS).logits
    half = as_other(model, how)
    assert half.dtype == torch.bfloat16 and half(IDS).logits.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), weights, strict=True))
    half.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == again.config.dtype == torch.bfloat16 and torch.equal(again(IDS).logits, half(IDS).logits)
    for name in ("dtype", "torch_dtype"):
        for given in (torch.float32, "float32"):
            single = AutoModelForCausalLM.from_pretrained(tmp_path, **{name: given})
            assert single.dtype == torch.float32 and torch.equal(single(IDS).logits, exact)
    assert torch.equal(half.to("cpu").float()(IDS).logits, exact)
    assert {weight.dtype for weight in half.double().parameters()} == {half.dtype} == {torch.float64}


class LowRank(nn.Module):
    """W + B A for a parameter of `base_layer` while that runs, which is what PEFT does with `target_parameters`."""

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer, self.name = base_layer, name
        rows, columns = getattr(base_layer, name).shape
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, columns)), nn.Parameter(0.3 * torch.randn(rows, 2))

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.lora_B @ self.lora_A

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        addition = nn.Module()
        addition.forward = self.merged  # type: ignore[method-assign]
        parametrize.register_parametrization(self.base_layer, self.name, addition)
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            parametrize.remove_parametrizations(self.base_layer, self.name, leave_parametrized=False)


@pytest.mark.parametrize(
    ("changes", "checkpointing"), [({}, True), ({"parallel_mlp": True}, False), ({"fast_rank": 2}, True)]
)
def test_low_rank_additions_are_what_merged_weights_are(changes: dict[str, Any], checkpointing: bool) -> None:
    """In the loss and its gradients through the inner updates, and in generation."""
    model, plain = wrapped(**changes).requires_grad_(False), wrapped(**changes)
    if checkpointing:
        model.gradient_checkpointing_enable()
    targets = [("mixer", "w_qkv"), ("mlp", "w_in"), ("mlp", "w_out"), ("fast", "w_out"), ("mixer", "w_out")]
    adapters = []
    for block, same in zip(model.model.blocks, plain.model.blocks, strict=True):
        for part, name in targets:
            if hasattr(block, part) and not isinstance(getattr(block, part), LowRank):
                adapter = LowRank(getattr(block, part), name)
                setattr(block, part, adapter)
                weight = getattr(getattr(same, part), name)
                with torch.no_grad():
                    weight.copy_(adapter.merged(weight))
                adapters.append((adapter, weight))
    found, expected = loss(model), sequence_loss(plain.model, IDS, bos=1).loss
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    found.backward()
    expected.backward()
    for adapter, weight in adapters:
        torch.testing.assert_close(adapter.lora_B.grad, weight.grad @ adapter.lora_A.T, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(adapter.lora_A.grad, adapter.lora_B.T @ weight.grad, atol=1e-5, rtol=1e-3)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.eval().generate(IDS, **options), plain.eval().generate(IDS, **options))
