"""Files <-> parameter trees: layouts, tables, atomic writing."""

from .rules import Rule, read_params, to_pt_state

__all__ = ["Rule", "read_params", "to_pt_state"]
