"""Layers that models share: linear, norm, attention and the caches that it reads."""
