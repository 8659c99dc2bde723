"""A model in the transformers library: it generates there, and is trained there, as it is here.

`forward` reads, as a `Session` does: it learns from every mini-batch that is whole, and the cache that it returns is
the text so far. With labels it gives the loss that training minimises, differentiable through the inner updates.

Shapes: B texts, T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ttt_e2e.errors import UserError
from ttt_e2e.hf.cache import NAME, ReadingCache
from ttt_e2e.hf.configuration import TTTE2EConfig
from ttt_e2e.inner_loop.step import sequence_loss
from ttt_e2e.model.transformer import Transformer

_LEFT_OUT = -100  # the library's mark in labels


class TTTE2EForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Transformer` with the interface of the transformers library; it is the attribute `model`.

    The weights are float32 always. The dtype that `from_pretrained` is given, or config.json, is that of the matrix
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

    @property
    def learns(self) -> bool:
        """Whether it learns while it reads."""
        return self.config.learn_while_reading and self.model.config.can_learn

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: ReadingCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        writing: bool = False,
        past_key_values: ReadingCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Read `input_ids` [B, T], going on from `cache`, or score them with `labels`.

        attention_mask: 0 where a token is none of the text, which begins with its first real one; of the input, or of
        all input so far. The logits [B, T, V] are those after each token (zeros where it is masked), before anything is
        learned of its mini-batch; logits_to_keep: only after the last so many columns; 0: all. They carry no gradient.
        writing: whether the model wrote these tokens itself; `generate` says so. The cache is changed in place; a
        `copy.copy` of it stays. past_key_values: what the library's older versions call the cache, here and in what is
        returned.

        labels: the input ids, with -100 where a token is no target: BOS, and padding at the end. The loss is that of
        `inner_loop.sequence_loss`, and there are neither logits nor a cache. Raises UserError for other labels, for
        another kind of cache, and as `ReadingCache.read` does.
        """
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise UserError("A model that learns from tokens reads tokens: give input_ids, not inputs_embeds.")
        # What is mixed in precision here is decided here: autocast would leave no gradient of a gradient.
        device = input_ids.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.compute_dtype
        if labels is not None:
            with torch.autocast(device, enabled=False):
                return CausalLMOutputWithPast(loss=self._loss(input_ids, attention_mask, labels, dtype))
        if cache is None:
            cache = ReadingCache() if past_key_values is None else past_key_values
        if not isinstance(cache, ReadingCache):
            raise UserError(f"The cache is a {type(cache).__name__}; give a ReadingCache that this model returned.")
        with torch.autocast(device, enabled=False):
            logits_BTV = cache.read(
                self.model,
                input_ids,
                attention_mask,
                min(logits_to_keep or input_ids.shape[1], input_ids.shape[1]),
                learn=self.learns and (self.config.learn_from_writing or not writing),
                later=self.learns or writing,
                dtype=dtype,
            )
        left_behind: dict[str, Any] = {} if use_cache is False else {NAME: cache}
        return CausalLMOutputWithPast(logits=logits_BTV, **left_behind)

    def _loss(self, ids_BT: Tensor, mask_BT: Tensor | None, labels_BT: Tensor, dtype: torch.dtype) -> Tensor:
        bos = self.config.bos_token_id
        tokens_BT = ids_BT
        if mask_BT is not None and not (mask_BT != 0).all():
            padding_BT = mask_BT == 0
            if bos is None or (padding_BT[:, :-1] & ~padding_BT[:, 1:]).any():
                raise UserError("In training texts are padded at their end only, with BOS; set padding_side='right'.")
            tokens_BT = ids_BT.masked_fill(padding_BT, bos)
        left_out_BT = labels_BT == _LEFT_OUT
        free_BT = left_out_BT if bos is None else left_out_BT & (tokens_BT != bos)
        if (~left_out_BT & (labels_BT != ids_BT)).any() or free_BT[:, 1:].any():
            raise UserError(
                "The model learns from all that it reads: labels are the input ids, with -100 only for BOS and padding."
            )
        return sequence_loss(
            self.model,
            tokens_BT,
            bos=bos,
            learn=self.config.learn_while_reading,
            activation_checkpointing="mini-batch",
            dtype=dtype,
        ).loss

    # -- for `generate` ------------------------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """What `forward` is given: the prompt is read, what comes after it is written."""
        library: Any = super()
        inputs = library.prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        return {**inputs, "writing": not is_first_iteration}

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        if generation_config.use_cache is False:
            raise UserError("Writing goes on from what was read, which is in the cache; leave use_cache=True.")
        if generation_config.cache_implementation is not None:
            raise UserError("This model has a cache of its own; leave cache_implementation out.")
        if model_kwargs.get(NAME) is None:
            model_kwargs[NAME] = ReadingCache()
        else:
            model_kwargs[NAME]._is_user_defined = True  # as the library marks it
