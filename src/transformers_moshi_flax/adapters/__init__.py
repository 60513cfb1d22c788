"""Adapters of linear layers (LoRA): how they are described, made, put into a model, read and written."""
