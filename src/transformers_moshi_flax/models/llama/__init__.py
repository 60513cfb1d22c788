"""Language models: Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, Helium."""

from .modeling_flax_llama import FlaxLlamaForCausalLM, FlaxLlamaModel, FlaxLlamaPreTrainedModel, LlamaTextDecoder
from .modules_flax_llama import FlaxLlamaForCausalLMModule, FlaxLlamaModule

__all__ = [
    "FlaxLlamaForCausalLM",
    "FlaxLlamaForCausalLMModule",
    "FlaxLlamaModel",
    "FlaxLlamaModule",
    "FlaxLlamaPreTrainedModel",
    "LlamaTextDecoder",
]
