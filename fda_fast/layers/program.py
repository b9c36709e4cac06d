"""A layer as a small program: one node per operation, four sweeps over the nodes.

With theta_0 the pretrained layer, tau the task vector and X the anchors, a construction step needs

    s(X) = mean cos(layer(theta_0, X), layer(theta_0 + tau, X)),   G_p = ds / dtheta_0,p
    L(X) = sum_p (1 - cos(G_p, tau_p)),                            dL/dX

which double backward computes with a graph of the first backward. A program computes the same in
four plain sweeps, none of which records anything:

1. ``forward``   (x, dx) -> (y, dy): the pretrained value, and the *difference* fine-tuned minus
   pretrained. The signal is that difference: it is carried as such and never rounded away.
2. ``backward``  g_y -> g_x: the cotangents of s in the pretrained branch. Every node with
   parameters keeps what its G needs. Then ``terms`` says what <G_p, T_p> and |G_p|^2 are summed
   from. The alignment sums them for all nodes at once, and forms cos_p, L and the coefficients of
   M_p = dL/dG_p = alpha_p T_p + beta_p G_p, handed back through ``set_coefficients``.
3. ``tangent``   t_x -> t_y: the derivative of the pretrained branch along theta_0 + eps M at
   constant input, so that <g_y, t_y> at the output is <M, G> as a function of X.
4. ``reverse``   (S_y, b_y) -> (S_x, b_x): the reverse sweep of <M, G(X)> with M constant. b is the
   cotangent of the fine-tuned branch and S the *sum* of the cotangents of both branches. The two
   nearly cancel, so the sum is what is carried. At the input, dL/dX = S.

For a nonlinear operation y = phi(x) with Jacobian J the four methods are

    forward   y = phi(x),                 dy = phi(x + dx) - phi(x)
    backward  g_x = J(x)^T g_y
    tangent   t_y = J(x) t_x
    reverse   b_x = J(x + dx)^T b_y
              S_x = J(x)^T S_y + (J(x + dx) - J(x))^T b_y + d/dx <g_y, J(x) t_x>

and parameters of phi count among its inputs: their fine-tuned values enter the fine-tuned branch,
their M enters the tangent.

Adaptation (fitting one set of weights to anchors) is first order: ``forward`` as above, or with one
set of weights and no difference at all where float32 products make that exact enough, then

5. ``adjoint``   b_y -> b_x: the cotangent of the fine-tuned branch; parameters receive gradients.

Values are contiguous tensors [K, R, d]: K tasks, R = n * T rows (n anchors of T tokens each), width
d, in the dtype of the program (float32, or float64 for a program that is to be tested).
``None`` stands for a value that is exactly zero where the methods say so.

Anchors meet only in the sums over rows that G_p are. So the rows may come in parts, of which the
nodes hold one at a time: ``forward`` and ``backward`` of every part, ``gather`` adding up the G,
then ``terms`` and ``set_coefficients`` once, and for every part ``forward`` and ``backward`` again,
with ``direction`` handed back, before its ``tangent`` and ``reverse``.

Fan-out is expressed by packing: q, k and v (or gate and up), which share an input, are one
``Linear`` with several segments along the output, consumed by ``Attention`` (or by
``GatedActivation``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from fda_fast.layers.parameter import Parameter
    from fda_fast.ops.alignment import Term


class Node:
    """One operation of a program.

    The sweeps run in the order forward, backward, (terms, set_coefficients), tangent, reverse, once
    each per evaluation. A node keeps the tensors its later sweeps need and drops each at its last
    use; ``release`` drops whatever is left. A node never writes into a tensor it was handed, nor
    into one it has returned: the neighbours keep references to them.

    Everything runs without autograd and without host synchronisation.

    Attributes:
        direction: M in the form that ``tangent`` and ``reverse`` take it, from ``set_coefficients``
            on; it may be put back for further rows. The node does not write into it.
    """

    direction: Any = None

    def forward(self, x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pretrained output y [K, R, d_out] and the difference dy of the fine-tuned one.

        ``dx`` None means exactly zero; ``dy`` None likewise.
        """
        raise NotImplementedError

    def backward(self, g: Tensor, need_input: bool) -> Tensor | None:
        """Cotangent of s at the input of the pretrained branch; None unless ``need_input``."""
        raise NotImplementedError

    def tangent(self, t: Tensor | None) -> Tensor | None:
        """Tangent of the output along M; None means zero, at the input as in the result."""
        raise NotImplementedError

    def reverse(self, S: Tensor, b: Tensor, need_b: bool) -> tuple[Tensor, Tensor | None]:
        """(S, b) at the input from those at the output; b there is None unless ``need_b``."""
        raise NotImplementedError

    def adjoint(self, b: Tensor, need_input: bool) -> Tensor | None:
        """Cotangent of the fine-tuned branch at the input; fills ``Parameter.grad`` on the way."""
        raise NotImplementedError

    def parameters(self) -> list[Parameter]:
        """The parameters of this operation, in a fixed order; none by default."""
        return []

    def gather(self, total: Any) -> Any:
        """The G of the last ``backward`` added to those of earlier parts, None at first.

        The sums are the node's own, for ``dots``; ``total`` may be overwritten.
        """
        raise NotImplementedError

    def terms(self, total: Any = None) -> list[Term]:
        """What <G_p, T_p> and |G_p|^2 are summed from, p counting ``parameters()``.

        Of the rows of the last ``backward``, or of all that ``gather`` put into ``total``, which is
        used up.
        """
        raise NotImplementedError

    def set_coefficients(self, coefficients: Tensor) -> None:
        """Take [2, K, P]: alpha and beta of M_p = alpha T_p + beta G_p, for ``parameters()``.

        Sets ``direction``.
        """
        raise NotImplementedError

    def refresh(self) -> None:
        """Re-read the parameters' differences after the optimiser of an adaptation changed them."""

    def release(self) -> None:
        """Drop everything kept between sweeps, ``direction`` included."""

    def leaves(self) -> Iterator[Node]:
        """The operations in order of execution; combinators yield those inside."""
        yield self
