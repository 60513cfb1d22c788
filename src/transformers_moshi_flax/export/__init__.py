"""Models out of JAX: their steps as ONNX graphs, in a folder that :mod:`transformers_moshi_flax.runtime` runs.

``walking.py`` walks over the jaxpr of a step, ``primitives.py`` has what each primitive is in ONNX, ``graph.py`` the
graph in the making. ``steps.py`` has the steps of a dialogue, ``folder.py`` what is written of them, ``web.py`` a page
that runs it.
"""

from ..lazy_names import lazy_names

_PUBLIC = {"folder": ["export_onnx"], "primitives": ["NotExportable"], "web": ["export_web"]}
__getattr__, __dir__, __all__ = lazy_names(__name__, _PUBLIC)
