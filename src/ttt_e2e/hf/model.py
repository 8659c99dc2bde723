"""A model with the interface of the transformers library.

`forward` reads as a `Session` does: it learns from every full mini-batch, and the cache that it returns is the text so
far. With labels it gives the loss that training minimises, differentiable through the inner updates.

Shapes: B texts, T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ttt_e2e.errors import UserError
from ttt_e2e.hf.cache import CACHE_NAME, ReadingCache
from ttt_e2e.hf.configuration import TTTE2EConfig
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.transformer import Transformer


class TTTE2EForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Transformer`, the attribute `model`, with the interface of the transformers library.

    The weights are always float32. The dtype given to `from_pretrained`, or in config.json, is that of the matrix
    products; under autocast it is autocast's.
    """

    config_class = TTTE2EConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = False  # a loss is the mean over its own batch
    _is_stateful = True  # what was read cannot be taken back, as assisted generation would
    _keep_in_fp32_modules_strict = ["model"]  # noqa: RUF012 - as the library declares it

    def __init__(self, config: TTTE2EConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config.model)
        self.compute_dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the `Transformer` has drawn its own."""

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
        options: dict[str, Any] = {"activation_checkpointing": "mini-batch", "dtype": dtype}
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
