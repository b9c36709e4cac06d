"""The random numbers of the published scripts, in their order.

What they draw on the CPU is reproduced bit for bit on any machine; Gaussian anchors of Vision and
NLU are drawn on the device that computes, and equal theirs where that is the CPU or the same card.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fda_fast.anchors import Layout, Scheme, init_anchors


class Stream:
    """torch's global generators after ``torch.manual_seed(seed)``, without touching them.

    Args:
        seed: as given to the script.
        device: where Gaussian anchors are drawn.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self._cpu = torch.Generator().manual_seed(seed)
        device = torch.device(device)
        self._device = self._cpu
        if device.type != "cpu":
            self._device = torch.Generator(device).manual_seed(seed)

    def anchors(
        self,
        layer: nn.Module,
        shape: Sequence[int],
        scheme: Scheme,
        scale: float,
        *,
        layout: Layout = "anchor_first",
        reseed: int | None = None,
    ) -> Tensor:
        """First anchors of one (layer, task), as ``init_anchors`` gives them.

        Args:
            layer: the fine-tuned layer.
            shape: [n, T, d] or [n, d].
            scheme: "gaussian" or "weights".
            scale: sigma of "gaussian".
            layout: see ``init_anchors``; "token_first" for Vision.
            reseed: seed that Gaussian anchors are drawn from afresh: 0 in Vision.
        """
        generator = self._cpu
        if scheme == "gaussian":
            generator = self._device
            if reseed is not None:
                generator = torch.Generator(generator.device).manual_seed(reseed)
        return init_anchors(layer, shape, scheme, scale, generator, layout=layout)

    def classifier(self, width: int, labels: int) -> None:
        """Draw what loading a RoBERTa without a classifier draws: its two random matrices.

        Args:
            width: of the model.
            labels: rows of the last matrix, 2 unless config.json says otherwise.

        Source: transformers 4.44.1, which initialises what a checkpoint lacks, and only that.
        """
        for rows in (width, labels):
            torch.empty(rows, width).normal_(generator=self._cpu)

    def shuffling(self, size: int) -> Callable[[int], Tensor]:
        """The order of ``size`` items in each epoch of ``DataLoader(..., shuffle=True)``."""

        def order(epoch: int) -> Tensor:
            # An iterator draws a seed for its workers, there or not, then the sampler one for
            # a generator of its own.
            self._draw()
            return torch.randperm(size, generator=torch.Generator().manual_seed(self._draw()))

        return order

    def _draw(self) -> int:
        return int(torch.empty((), dtype=torch.int64).random_(generator=self._cpu).item())
