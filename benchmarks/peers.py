"""What fda_fast's construction step is measured against, and fda_fast itself, behind one shape.

An engine is made once for (pretrained, [fine-tuned], anchors) and then offers

    gradient(anchors) -> dL/dX [K, n, (T,) d]       for the fidelity column
    step()                                          one whole construction step: loss, gradient,
                                                    AdamW, best anchors kept

``published`` is the published loop's arithmetic written out from the paper and the description of
its code, with its waste: gradients of weights accumulated and never used, the norm diagnostic of
the vision code, task vectors recomputed, two host reads a step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fda_fast import layers
from fda_fast.layers.call import call_keywords, call_layer
from fda_fast.layers.graph import AnchorOptimiser, step_runner
from fda_fast.ops import adamw

# Anchor elements of one task under which the compiled peer runs as a CUDA graph on a card. Beyond,
# its launches are long, and a graph would only reserve its memory a second time.
GRAPHED_BELOW = 8 << 20
PARTS = 4


class Published:
    """The published loop: one task after the other, double backward, float32."""

    def __init__(
        self, pretrained: nn.Module, finetuned: list[nn.Module], anchors: Tensor, both: bool
    ) -> None:
        self.pretrained, self.finetuned, self.both = pretrained, finetuned, both
        pretrained.requires_grad_(True)
        for layer in finetuned:
            layer.requires_grad_(both)
        self.anchors = [x.clone().requires_grad_() for x in anchors]
        self.optimizers = [torch.optim.AdamW([x], lr=1e-2) for x in self.anchors]
        self.best = [math.inf] * len(finetuned)
        self.best_anchors: list[Tensor | None] = [None] * len(finetuned)
        self.keywords = call_keywords(pretrained, anchors[0])

    def _loss(self, layer: nn.Module, x: Tensor) -> Tensor:
        own, theirs = list(self.pretrained.parameters()), list(layer.parameters())
        y = call_layer(self.pretrained, x, None, self.keywords).flatten(1)
        target = call_layer(layer, x, None, self.keywords).flatten(1)
        similarity = F.cosine_similarity(y, target, dim=1).mean()
        grads = torch.autograd.grad(similarity, own, create_graph=True)
        loss = norms = torch.zeros((), device=x.device)
        for g, p, f in zip(grads, own, theirs, strict=True):
            vector = f - p
            loss = loss + 1 - F.cosine_similarity(g.flatten(), vector.flatten(), dim=0)
            if self.both:  # the vision code's diagnostic
                norms = norms + (g.norm() - vector.norm()).square()
        self.shown = norms
        return loss

    def gradient(self, anchors: Tensor) -> Tensor:
        result = []
        for layer, start in zip(self.finetuned, anchors, strict=True):
            x = start.clone().requires_grad_()
            self._loss(layer, x).backward()
            assert x.grad is not None
            result.append(x.grad)
        return torch.stack(result)

    def step(self) -> None:
        for k, layer in enumerate(self.finetuned):
            x, optimizer = self.anchors[k], self.optimizers[k]
            optimizer.zero_grad()
            loss = self._loss(layer, x)
            loss.backward()
            if loss.item() < self.best[k]:
                self.best[k] = loss.item()
                self.best_anchors[k] = x.detach().clone()
            optimizer.step()
            self.shown.item()

    plain_step = step


class _Updated:
    """AdamW and the best snapshot around anything that gives a loss and a gradient."""

    def __init__(self, anchors: Tensor) -> None:
        self.anchors = anchors.clone()
        self.state = [torch.zeros_like(anchors), torch.zeros_like(anchors)]
        self.best = anchors.new_full((len(anchors),), math.inf)
        self.best_anchors = anchors.clone()
        self.count = 0

    def evaluate(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [K] and dL/dX."""
        raise NotImplementedError

    def gradient(self, anchors: Tensor) -> Tensor:
        return self.evaluate(anchors)[1]

    def step(self) -> None:
        self.count += 1
        loss, grad = self.evaluate(self.anchors)
        adamw.step_(
            self.anchors,
            grad,
            *self.state,
            self.count,
            loss,
            self.best,
            self.best_anchors,
            lr=1e-2,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.01,
        )

    plain_step = step


class Compiled(_Updated):
    """Functional gradients of gradients in one torch.compile graph: the strongest peer.

    Second backward restricted to X, task vectors and norms constant, tasks under vmap on a card.
    """

    def __init__(
        self,
        pretrained: nn.Module,
        finetuned: list[nn.Module],
        anchors: Tensor,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(anchors)
        own = {n: p.detach() for n, p in pretrained.named_parameters()}
        theirs = [{n: p.detach() for n, p in f.named_parameters()} for f in finetuned]
        units = [
            {n: (f[n] - own[n]) / (f[n] - own[n]).norm().clamp_min(1e-8) for n in own}
            for f in theirs
        ]
        keywords = call_keywords(pretrained, anchors[0])

        def run(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            out = torch.func.functional_call(pretrained, parameters, (x,), keywords)
            return (out if isinstance(out, Tensor) else out[0]).flatten(1).float()

        def similarity(parameters: dict[str, Tensor], f: dict[str, Tensor], x: Tensor) -> Tensor:
            return F.cosine_similarity(run(parameters, x), run(f, x), dim=1).mean()

        def loss(x: Tensor, f: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
            grads = torch.func.grad(similarity)(own, f, x)
            total = x.new_zeros(())
            for name, g in grads.items():
                total = total + 1 - (g / g.norm().clamp_min(1e-8) * unit[name]).sum()
            return total

        def one_by_one(x: Tensor) -> tuple[Tensor, Tensor]:
            parts = [
                torch.func.grad_and_value(loss)(x[k], theirs[k], units[k]) for k in range(len(x))
            ]
            return torch.stack([p[1] for p in parts]), torch.stack([p[0] for p in parts])

        both = one_by_one
        if anchors.is_cuda and len(finetuned) > 1:
            # One batch, as a card wants it; on a processor it is slower, and takes more memory.
            stacked = [
                {n: torch.stack([d[n] for d in side]) for n in own} for side in (theirs, units)
            ]
            theirs, units = [], []

            def both(x: Tensor) -> tuple[Tensor, Tensor]:
                grads, values = torch.func.vmap(torch.func.grad_and_value(loss))(x, *stacked)
                return values, grads

        self._eager = both
        # On a card small layers are bound by launches: CUDA graphs, as ours has them.
        small = anchors.is_cuda and anchors[0].numel() < GRAPHED_BELOW
        mode = "reduce-overhead" if small else None
        self._both = torch.compile(both, fullgraph=True, mode=mode)
        self._autocast = autocast

    def evaluate(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        cast: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self._autocast is not None:
            cast = torch.autocast(anchors.device.type, self._autocast)
        with sdpa_kernel(SDPBackend.MATH), cast:
            return self._both(anchors)


class Ours:
    """fda_fast as construct() runs it: "program" (four sweeps) or "autograd" (double backward
    restricted to X); on a card one CUDA graph is replayed per step.
    """

    def __init__(
        self,
        pretrained: nn.Module,
        finetuned: list[nn.Module],
        anchors: Tensor,
        engine: str,
        precision: str,
        part: int | None = None,
    ) -> None:
        self._problem = layers.bind(
            pretrained,
            finetuned,
            shape=tuple(anchors.shape[1:]),
            engine=engine,
            precision=precision,
            part=part,
        )
        optimiser = AnchorOptimiser(self._problem, anchors, steps=1, lr=1e-2)
        # One launch after the other, which profilers and memory counters can see into.
        self.plain_step = optimiser.step
        self.step = step_runner(optimiser.step, anchors.device)

    def gradient(self, anchors: Tensor) -> Tensor:
        return self._problem.evaluate(anchors).grad


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products on CUDA may run as TF32, for peers."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


ENGINES: dict[str, Callable[..., Published | Compiled | Ours]] = {
    "published": lambda p, f, x, case, precision: Published(
        p, f, x, case.published_grads == "both"
    ),
    "compiled": lambda p, f, x, case, precision: Compiled(
        p, f, x, torch.bfloat16 if precision == "bf16" else None
    ),
    "autograd": lambda p, f, x, case, precision: Ours(p, f, x, "autograd", "fp32"),
    "fda_fast": lambda p, f, x, case, precision: Ours(p, f, x, "program", precision),
    # A quarter of the anchors at a time: less memory, and a quarter more products.
    "fda_fast_parts": lambda p, f, x, case, precision: Ours(
        p, f, x, "program", precision, part=max(1, x.shape[1] // PARTS)
    ),
}
# Peers of the card compute float32 as the global switch says; fda_fast says it itself.
PEER_TF32 = ("published", "compiled", "autograd")
