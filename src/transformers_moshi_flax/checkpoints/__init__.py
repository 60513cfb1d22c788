"""Files <-> parameter trees: layouts, tables, atomic writing."""

from .rules import Rule, read_params

__all__ = ["Rule", "read_params"]
