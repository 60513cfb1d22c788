"""HuBERT, an encoder of audio."""

from .modeling_flax_hubert import FlaxHubertModel, FlaxHubertPreTrainedModel

__all__ = ["FlaxHubertModel", "FlaxHubertPreTrainedModel"]
