"""The configuration of a model in the transformers library: ours, in a field of it, and how it reads and writes."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ttt_e2e.config.parse import from_dict
from ttt_e2e.config.schema import ModelConfig


class TTTE2EConfig(PreTrainedConfig):
    """What `TTTE2EForCausalLM` is made of.

    settings: the fields of `ttt_e2e.config.schema.ModelConfig`. learn_while_reading: whether the model learns from what it
    reads. learn_from_writing: whether it also learns from what it writes as soon as that fills a mini-batch; otherwise
    `generate` leaves the weights alone after the prompt, and what was written is learned from when a later prompt goes
    on after it.
    """

    model_type = "ttt-e2e"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        learn_while_reading: bool = True,
        learn_from_writing: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **others: Any,
    ) -> None:
        self.settings = dict(settings or {})
        self.learn_while_reading = learn_while_reading
        self.learn_from_writing = learn_from_writing
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.tie_word_embeddings = False  # a tied head is one weight here, not two
        others.pop("tie_word_embeddings", None)
        super().__init__(**others)

    @property
    def model(self) -> ModelConfig:
        """The settings as our configuration. Raises UserError if they are none."""
        return from_dict(ModelConfig, self.settings, "the field settings of config.json")

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary."""
        return self.model.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.model.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return self.model.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Query heads of a block."""
        return self.model.num_attention_heads
