"""The alignment problem of K tasks as a four-sweep program."""

from __future__ import annotations

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.layers.alignment import Alignment
from fda_fast.layers.evaluation import Evaluation
from fda_fast.layers.folded import fold_first_norm
from fda_fast.layers.objective import Objective
from fda_fast.layers.parameter import Materials
from fda_fast.layers.program import Node
from fda_fast.layers.similarity import Similarity


class ProgramProblem:
    """Alignment loss, its gradient and the cosines of K tasks of one layer, by four sweeps.

    Args:
        root: the layer's program, built from ``materials``.
        materials: both sides of the layer; gives names, tokens, precision and dtype.
        distance: "cosine", "l2" or "l1".
        fold: fold a norm of the anchors into the Linear that follows it; the same numbers.
        objective: another end of the program than the similarity of the two branches.

    Numerics: products as ``materials.precision`` says, everything else in the program's dtype.
    Cost: 7 products per Linear that reads the anchors (or their norm), 11 per Linear further in, of
    the size of one forward product, fewer in Gram form. The activations of about two forwards.
    """

    def __init__(
        self,
        root: Node,
        materials: Materials,
        *,
        distance: str = "cosine",
        fold: bool = True,
        objective: Objective | None = None,
    ) -> None:
        self.parameter_names = list(materials.names)
        self._root = root = fold_first_norm(root) if fold else root
        self._materials = materials
        self._alignment = Alignment(root, self.parameter_names)
        self._similarity = objective or Similarity(distance, materials.tokens)

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
        root, similarity = self._root, self._similarity
        y, dy = root.forward(x, None)
        g = similarity.forward(y, torch.zeros_like(y) if dy is None else dy)
        del y, dy
        root.backward(g, False)
        del g
        loss, cosines = self._alignment.evaluate(similarity.scale)
        t = root.tangent(None)
        if t is None:
            t = torch.zeros_like(similarity.output)
        S, b = similarity.reverse(t)
        del t
        return loss, cosines, root.reverse(S, b, False)[0]

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
