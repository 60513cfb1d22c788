"""Exported models without JAX: dialogues on onnxruntime.

It imports NumPy, onnxruntime, tokenizers and soundfile, and nothing of this package that needs more.
"""

from ..lazy_names import lazy_names

_PUBLIC = {
    "manifest": ["BadExport"],
    "onnx_moshi": ["OnnxMoshi", "OnnxMoshiFrame", "OnnxMoshiStream"],
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _PUBLIC)
