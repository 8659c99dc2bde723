"""A model with the interface of the transformers library.

`forward` reads as a `Session` does: it learns from every full mini-batch, and the cache that it returns is the text so
far. With labels it gives the loss that training minimises, differentiable through the inner updates.

Shapes: B texts, T tokens, V vocabulary.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ttt_e2e.config.parse import to_dict
from ttt_e2e.config.schema import replace
from ttt_e2e.errors import UserError
from ttt_e2e.hf.cache import CACHE_NAME, ReadingCache
from ttt_e2e.hf.configuration import TTTE2EConfig
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.transformer import Transformer


class TTTE2EForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Transformer`, the attribute `model`, with the interface of the transformers library.

    The weights stay float32 in half precision. The dtype given to `from_pretrained` or `to`, or in config.json, is that
    of the matrix products; under autocast it is autocast's. Gradient checkpointing stores less of the inner loop.
    """

    config_class = TTTE2EConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = False  # a loss is the mean over its own batch
    _is_stateful = True  # what was read cannot be taken back, as assisted generation would
    _keep_in_fp32_modules_strict = ["model"]  # noqa: RUF012 - as the library declares it
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _fsdp_plan = {"model.lookup": "keep_full_weight"}  # noqa: RUF012 - without one the library does not shard at all

    def __init__(self, config: TTTE2EConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config.model)
        self.compute_dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the `Transformer` has drawn its own."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products, and so what `save_pretrained` writes down."""
        return self.compute_dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to`, `half`, `cuda` and the like do to every weight: those are never rounded, only the products are."""
        found = {fn(torch.empty(0, dtype=dtype)).dtype for dtype in (torch.float64, torch.float16)}
        if len(found) == 1:  # it is a conversion, not a move
            self.compute_dtype = found.pop()
            if self.compute_dtype in (torch.float16, torch.bfloat16):
                return super()._apply(lambda weight: weight.to(fn(weight).device), recurse)
        return super()._apply(fn, recurse)

    def _resolve_parallel_plans(self, distributed_config: Any) -> Any:
        """What the library shards by itself: every block below the mini-batch loop, and all the rest as one group.

        The loop uses the rest again and again, inside the backward pass too, so it stays gathered for a whole step.
        Raises UserError for what would shard or round it otherwise.
        """
        if distributed_config.fsdp_plan or distributed_config.fsdp_mixed_precision:
            raise UserError(
                "The model knows how it is sharded, and its weights stay float32; leave fsdp_plan and "
                "fsdp_mixed_precision out of the DistributedConfig; for bfloat16 set bf16=True in TrainingArguments."
            )
        # A block returns its mixer's state as well, slices of what it computed. Nothing is ever written into them.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        library: Any = super()
        tp_plan, ep_plan, _ = library._resolve_parallel_plans(distributed_config)
        prefix = [f"model.blocks.{layer}" for layer in range(len(self.model.prefix))]
        return tp_plan, ep_plan, dict.fromkeys(prefix, "free_full_weight")

    # -- the embedding and the head as modules -------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """The module that looks up tokens, for hooks. Its `weight` is the embedding [V, D], which the model owns."""
        lookup = self.model.lookup
        vars(lookup)["weight"] = self.model.embedding
        return lookup

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Take the `weight` [V, D] of `value` as the embedding, and as the head where they are tied."""
        self.model.embedding = _matrix_like(self.model.embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        """The head as a linear layer, which shares its weight [V, D]."""
        head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False, device="meta")
        head.weight = self.model.head_weight
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Take the `weight` [V, D] of `new_embeddings` as the head. Raises UserError if that is the embedding."""
        if self.model.config.tie_word_embeddings:
            raise UserError("The head of this model is its embedding; use set_input_embeddings for both.")
        self.model.head = _matrix_like(self.model.head, new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Change the size of the vocabulary; returns `get_input_embeddings()`.

        Args:
            new_num_tokens: rows of the embedding and of the head; None: as many as now.
            pad_to_multiple_of: the rows are rounded up to a multiple of this.
            mean_resizing: whether new rows are drawn around the mean of the old ones, so that they hardly change the
                probabilities of others; otherwise they are drawn as for a new model.
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        size += -size % (pad_to_multiple_of or 1)
        if size < 1:
            raise UserError(f"A vocabulary has at least one token, not {size}.")
        std = self.model.config.initializer_range
        for name in ("embedding", "head"):
            if (old_VD := getattr(self.model, name, None)) is None:
                continue
            with torch.no_grad():
                added = torch.randn(max(0, size - len(old_VD)), old_VD.shape[1]).to(old_VD)
                # The library's own choice, too: a billionth of their variance.
                added = old_VD.mean(0) + 3e-5 * old_VD.std(0) * added if mean_resizing else std * added
                new = nn.Parameter(torch.cat([old_VD[:size], added]), requires_grad=old_VD.requires_grad)
            setattr(self.model, name, new)
        self.model.config = replace(self.model.config, {"vocab_size": size})
        self.config.settings = to_dict(self.model.config)
        return self.get_input_embeddings()

    # -- reading -------------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: ReadingCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        generated: bool = False,
        past_key_values: ReadingCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Read `input_ids` after what is in `cache`, or score them with `labels`.

        Args:
            input_ids: token ids [B, T].
            attention_mask: 0 where a token is not part of the text, for the input or for all input so far.
            cache: the text so far. It is changed in place; a `copy.copy` of it is not.
            labels: the input ids, with -100 for tokens that are not targets: BOS, and padding at the end.
            use_cache: whether the cache is returned (default: yes).
            logits_to_keep: for how many of the last columns logits are returned; 0: all.
            generated: whether the model generated these tokens itself, as `generate` says.
            past_key_values: what the library's older versions call `cache`, here and in the output.

        Returns:
            The logits [B, T, V] after each token, before the model learns from its mini-batch (zeros where it is
            masked). They carry no gradient. With labels, the loss of `sequence_loss` alone.

        Raises:
            UserError: the labels or the cache are of another kind, or as `ReadingCache.read` does.
        """
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise UserError("A model that learns from tokens reads tokens: give input_ids, not inputs_embeds.")
        # The model decides itself what is computed in which precision: autocast would lose the gradient of a gradient.
        device = input_ids.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.compute_dtype
        learns = self.config.learn_while_reading and self.model.config.can_learn
        with torch.autocast(device, enabled=False):
            if labels is not None:
                return CausalLMOutputWithPast(loss=self._loss(input_ids, attention_mask, labels, dtype))
            if cache is None:
                cache = ReadingCache() if past_key_values is None else past_key_values
            if not isinstance(cache, ReadingCache):
                raise UserError(f"The cache is a {type(cache).__name__}; give a ReadingCache that this model returned.")
            logits_BTV = cache.read(
                self.model,
                input_ids,
                attention_mask,
                min(logits_to_keep or input_ids.shape[1], input_ids.shape[1]),
                learn=learns and (self.config.learn_from_writing or not generated),
                keep_pending=learns or generated,
                dtype=dtype,
            )
        caches: dict[str, Any] = {} if use_cache is False else {CACHE_NAME: cache}
        return CausalLMOutputWithPast(logits=logits_BTV, **caches)

    def _loss(self, ids_BT: Tensor, mask_BT: Tensor | None, labels_BT: Tensor, dtype: torch.dtype) -> Tensor:
        bos, tokens_BT, learn = self.config.bos_token_id, ids_BT, self.config.learn_while_reading
        if mask_BT is not None and not (mask_BT != 0).all():
            padding_BT = mask_BT == 0
            if bos is None or (padding_BT[:, :-1] & ~padding_BT[:, 1:]).any():
                raise UserError("In training texts are padded at their end only, with BOS; set padding_side='right'.")
            tokens_BT = ids_BT.masked_fill(padding_BT, bos)
        ignored_BT = labels_BT == -100
        wrongly_ignored_BT = ignored_BT if bos is None else ignored_BT & (tokens_BT != bos)
        if (~ignored_BT & (labels_BT != ids_BT)).any() or wrongly_ignored_BT[:, 1:].any():
            raise UserError(
                "The model learns from all that it reads: labels are the input ids, with -100 only for BOS and padding."
            )
        kept = "sqrt" if self.gradient_checkpointing else "mini-batch"
        options: dict[str, Any] = {"activation_checkpointing": kept, "dtype": dtype}
        return sequence_loss(self.model, tokens_BT, bos=bos, learn=learn, **options).loss

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of `forward`: the prompt is read, and what comes after it was generated."""
        library: Any = super()
        inputs = library.prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        return {**inputs, "generated": not is_first_iteration}

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any) -> Any:
        if generation_config.use_cache is False:
            raise UserError("Generation continues from the cache; leave use_cache=True.")
        if generation_config.cache_implementation is not None:
            raise UserError("This model has a cache of its own; leave cache_implementation out.")
        if model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = ReadingCache()
        else:
            model_kwargs[CACHE_NAME]._is_user_defined = True  # as the library marks it


def _matrix_like(old: nn.Parameter, module: nn.Module) -> nn.Parameter:
    """The `weight` of `module`, a parameter. Raises UserError unless it has the shape of `old`."""
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.shape != old.shape:
        raise UserError(
            f"The new matrix has to be of shape {list(old.shape)}; change the vocabulary with resize_token_embeddings."
        )
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
