"""Programs out of programs: one after the other, and around a residual connection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fda_fast.layers.program import Node
from fda_fast.ops import memory


class Sequential(Node):
    """Nodes one after the other; a ``Sequential`` among them is taken apart."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes: list[Node] = []
        for node in nodes:
            self.nodes += node.nodes if isinstance(node, Sequential) else [node]
        self._needs: list[bool] = []

    def leaves(self) -> Iterator[Node]:
        """The operations inside, in order."""
        for node in self.nodes:
            yield from node.leaves()

    def forward(self, x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ``Node.forward``."""
        for node in self.nodes:
            x, dx = node.forward(x, dx)
        return x, dx

    def _needs_input(self) -> list[bool]:
        """Whether node i has a parameter somewhere before it in this sequence."""
        if len(self._needs) != len(self.nodes):  # not yet, or nodes were folded together
            found, self._needs = False, []
            for node in self.nodes:
                self._needs.append(found)
                found = found or any(leaf.parameters() for leaf in node.leaves())
        return self._needs

    def backward(self, g: Tensor | None, need_input: bool) -> Tensor | None:
        """See ``Node.backward``."""
        for node, needed in zip(reversed(self.nodes), reversed(self._needs_input()), strict=True):
            if g is None:
                break
            g = node.backward(g, need_input or needed)
        return g

    def tangent(self, t: Tensor | None) -> Tensor | None:
        """See ``Node.tangent``."""
        for node in self.nodes:
            t = node.tangent(t)
        return t

    def reverse(self, S: Tensor, b: Tensor, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """See ``Node.reverse``; every node but the first needs b at its output."""
        b_x: Tensor | None = b
        for i, node in reversed(list(enumerate(self.nodes))):
            assert b_x is not None
            S, b_x = node.reverse(S, b_x, need_b or i > 0)
        return S, b_x

    def adjoint(self, b: Tensor | None, need_input: bool) -> Tensor | None:
        """See ``Node.adjoint``."""
        for node, needed in zip(reversed(self.nodes), reversed(self._needs_input()), strict=True):
            if b is None:
                break
            b = node.adjoint(b, need_input or needed)
        return b

    def refresh(self) -> None:
        """See ``Node.refresh``."""
        for node in self.nodes:
            node.refresh()

    def release(self) -> None:
        """See ``Node.release``."""
        for node in self.nodes:
            node.release()


def _add(a: Tensor, b: Tensor) -> Tensor:
    return torch.add(a, b, out=memory.empty(a.shape, a))


def _add_optional(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return _add(a, b)


class Residual(Node):
    """y = x + node(x). Values, differences, tangents and all cotangents simply add."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def leaves(self) -> Iterator[Node]:
        """The operations inside, in order."""
        yield from self.node.leaves()

    def forward(self, x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ``Node.forward``."""
        y, dy = self.node.forward(x, dx)
        return _add(x, y), _add_optional(dx, dy)

    def backward(self, g: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.backward``."""
        inner = self.node.backward(g, need_input)
        return None if inner is None or not need_input else _add(g, inner)

    def tangent(self, t: Tensor | None) -> Tensor | None:
        """See ``Node.tangent``."""
        return _add_optional(t, self.node.tangent(t))

    def reverse(self, S: Tensor, b: Tensor, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """See ``Node.reverse``."""
        S_inner, b_inner = self.node.reverse(S, b, need_b)
        return _add(S, S_inner), None if b_inner is None or not need_b else _add(b, b_inner)

    def adjoint(self, b: Tensor, need_input: bool) -> Tensor | None:
        """See ``Node.adjoint``."""
        inner = self.node.adjoint(b, need_input)
        return None if inner is None or not need_input else _add(b, inner)

    def refresh(self) -> None:
        """See ``Node.refresh``."""
        self.node.refresh()

    def release(self) -> None:
        """See ``Node.release``."""
        self.node.release()
