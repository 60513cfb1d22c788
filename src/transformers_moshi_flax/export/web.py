"""What stands in ``web/``: a module for browsers and Node that holds dialogues with an export."""

from importlib import resources

WEB = resources.files("transformers_moshi_flax") / "web"
