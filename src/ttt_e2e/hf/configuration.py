"""The configuration of a model in the transformers library: `ModelConfig` in a field of it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ttt_e2e.config.parse import from_dict
from ttt_e2e.config.schema import ModelConfig


class TTTE2EConfig(PreTrainedConfig):
    """The configuration of `TTTE2EForCausalLM`.

    Args:
        settings: the fields of `ttt_e2e.config.schema.ModelConfig`.
        learn_while_reading: whether the model learns from what it reads.
        learn_from_writing: whether `generate` also learns from what it generates, as soon as that fills a mini-batch.
            Otherwise it is learned from only once a later prompt follows it.
        others: fields of the library's, such as bos_token_id, eos_token_id and pad_token_id.
    """

    model_type = "ttt-e2e"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        learn_while_reading: bool = True,
        learn_from_writing: bool = False,
        **others: Any,
    ) -> None:
        self.settings = dict(settings or {})
        self.learn_while_reading, self.learn_from_writing = learn_while_reading, learn_from_writing
        others = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | others
        super().__init__(**others | {"tie_word_embeddings": False})  # a tied head is one weight here, not two

    @property
    def model(self) -> ModelConfig:
        """The settings as a `ModelConfig`. Raises UserError if they are invalid."""
        return from_dict(ModelConfig, self.settings, "the field settings of config.json")

    # What the library asks a configuration for.
    vocab_size = property(lambda self: self.model.vocab_size)
    hidden_size = property(lambda self: self.model.hidden_size)
    num_hidden_layers = property(lambda self: self.model.num_hidden_layers)
    num_attention_heads = property(lambda self: self.model.num_attention_heads)
