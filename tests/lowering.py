"""What a program looks like for a platform that need not be there, read from its lowering."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.export
from jax._src.interpreters.mlir import make_ir_context
from jax.extend.mlir import ir


def lowered(function: Callable[..., Any], platform: str, *args: Any) -> list[Any]:
    """All operations of ``function``, those of inner functions once for each call."""
    text = jax.export.export(jax.jit(function), platforms=[platform])(*args).mlir_module()
    with make_ir_context():
        module = ir.Module.parse(text)
        functions = {op.attributes["sym_name"].value: op for op in module.body.operations}

        def walk(op: Any) -> Iterator[Any]:
            for region in op.regions:
                for block in region.blocks:
                    for inner in block.operations:
                        yield inner.operation
                        if inner.operation.name == "func.call":
                            yield from walk(functions[inner.attributes["callee"].value])
                        yield from walk(inner.operation)

        return [Operation(op) for op in walk(functions["main"])]


class Operation:
    """What is asked of an operation, kept beyond the life of its module."""

    def __init__(self, op: Any):
        self.name = op.name.removeprefix("stablehlo.")
        self.types = [str(value.type) for value in [*op.operands, *op.results]]
        # the choice of a platform is a case with one branch left, whose index is made of constants
        bodies = [
            [inner.operation.name for block in region.blocks for inner in block.operations] for region in op.regions
        ]
        self.branches = len(bodies) > 1 and any(body != ["stablehlo.return"] for body in bodies)

    @property
    def is_branch(self) -> bool:
        """Whether it does one thing or another as the data say."""
        return self.name in ("case", "if") and self.branches

    @property
    def has_complex(self) -> bool:
        return any("complex<" in kind for kind in self.types)


def counted(operations: list[Operation]) -> Counter[str]:
    return Counter(op.name for op in operations)
