"""The alignment problem of K tasks as a four-sweep program."""

from __future__ import annotations

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.layers.alignment import Alignment
from fda_fast.layers.evaluation import Evaluation, check_part
from fda_fast.layers.folded import fold_first_norm
from fda_fast.layers.objective import Objective
from fda_fast.layers.parameter import Materials
from fda_fast.layers.program import Node
from fda_fast.layers.similarity import Similarity
from fda_fast.ops import memory


class ProgramProblem:
    """Alignment loss, its gradient and the cosines of K tasks of one layer, by four sweeps.

    Args:
        root: the layer's program, built from ``materials``.
        materials: both sides of the layer; gives names, tokens, precision and dtype.
        distance: "cosine", "l2" or "l1".
        fold: fold a norm of the anchors into the Linear that follows it; the same numbers.
        objective: another end of the program than the similarity of the two branches.
        part: anchors per task that the sweeps hold at once; None for all. The same numbers to
            rounding.

    Numerics: products as ``materials.precision`` says, everything else in the program's dtype.
    Cost: 7 products per Linear that reads the anchors (or their norm), 11 per Linear further in, of
    the size of one forward product, fewer in Gram form. The activations of about two forwards. In
    parts: the activations of one; forward and backward are made twice, for all parts but one, which
    is 3 or 4 products more per Linear, and no Gram form.

    Raises:
        InputError: a program that does not cover the layer; ``part`` with an objective, which need
            not be a sum over anchors.
    """

    def __init__(
        self,
        root: Node,
        materials: Materials,
        *,
        distance: str = "cosine",
        fold: bool = True,
        objective: Objective | None = None,
        part: int | None = None,
    ) -> None:
        check_part(part, objective)
        self.parameter_names = list(materials.names)
        self._root = root = fold_first_norm(root) if fold else root
        self._materials = materials
        self._alignment = Alignment(root, self.parameter_names)
        self._similarity = objective or Similarity(distance, materials.tokens)
        self._part = part

    @torch.no_grad()
    def evaluate(self, anchors: Tensor) -> Evaluation:
        """Loss, gradient and cosines at anchors [K, n, T, d] (or [K, n, d] if T is 1).

        Synchronises nothing with the host; the gradient has the anchors' shape and dtype.
        """
        self._check(anchors)
        x = anchors.detach().to(self._materials.dtype).contiguous()
        x = x.view(x.shape[0], -1, x.shape[-1])
        try:
            with self._materials.precision.active():
                loss, cosines, S = self._sweeps(x)
        finally:
            self._root.release()
            self._alignment.forget()
        return Evaluation(loss, S.view(anchors.shape).to(anchors.dtype), cosines)

    @torch.no_grad()
    def outputs(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Pretrained output y and the difference dy at anchors, each [K, n * T, d_out]."""
        self._check(anchors)
        x = anchors.detach().to(self._materials.dtype).contiguous()
        with self._materials.precision.active():
            y, dy = self._root.forward(x.view(x.shape[0], -1, x.shape[-1]), None)
        self._root.release()
        return y, torch.zeros_like(y) if dy is None else dy

    def _sweeps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.shape[1] if self._part is None else self._part * self._materials.tokens
        *earlier, last = x.split(rows, dim=1)
        scale = 0.0
        for part in earlier:
            scale += self._first_order(part)
            self._alignment.gather()
            self._root.release()
        scale += self._first_order(last)
        if not earlier:
            loss, cosines = self._alignment.evaluate(scale)
            return loss, cosines, self._second_order()
        self._alignment.gather()
        loss, cosines = self._alignment.evaluate(scale)
        S = memory.empty(x.shape, x)
        *S_earlier, S_last = S.split(rows, dim=1)
        # The last part is still there; the others are computed again.
        S_last.copy_(self._second_order())
        for part, S_part in zip(earlier, S_earlier, strict=True):
            self._first_order(part)
            self._alignment.resume()
            S_part.copy_(self._second_order())
        return loss, cosines, S

    def _first_order(self, x: Tensor) -> float:
        """Forward and backward of these rows; what the similarity was multiplied by."""
        y, dy = self._root.forward(x.contiguous(), None)
        g = self._similarity.forward(y, torch.zeros_like(y) if dy is None else dy)
        del y, dy
        self._root.backward(g, False)
        return self._similarity.scale

    def _second_order(self) -> Tensor:
        """Tangent and reverse of the rows that went before: their dL/dX [K, R, d]."""
        t = self._root.tangent(None)
        if t is None:
            t = torch.zeros_like(self._similarity.output)
        S, b = self._similarity.reverse(t)
        del t
        return self._root.reverse(S, b, False)[0]

    def _check(self, anchors: Tensor) -> None:
        tokens, tasks = self._materials.tokens, self._materials.tasks
        fits = anchors.dim() == 4 and anchors.shape[2] == tokens
        fits = fits or (anchors.dim() == 3 and tokens == 1)
        if not fits or anchors.shape[0] != tasks:
            raise InputError(
                "anchors",
                expected=f"[{tasks} tasks, n anchors, {tokens} tokens, width]",
                got=list(anchors.shape),
            )
