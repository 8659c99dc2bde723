"""Models of this package in the transformers library: importing this registers them with its Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from ttt_e2e.hf.cache import ReadingCache
from ttt_e2e.hf.configuration import TTTE2EConfig
from ttt_e2e.hf.model import TTTE2EForCausalLM

AutoConfig.register(TTTE2EConfig.model_type, TTTE2EConfig, exist_ok=True)
AutoModelForCausalLM.register(TTTE2EConfig, TTTE2EForCausalLM, exist_ok=True)

__all__ = ["ReadingCache", "TTTE2EConfig", "TTTE2EForCausalLM"]
