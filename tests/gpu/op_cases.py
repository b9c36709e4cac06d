"""Every operation at the shapes of real layers: (name, function of a backend module, arguments)."""

from __future__ import annotations

import importlib

import torch

from fda_fast.ops.attention import Heads

EPS = 1e-5
STEMS = ("activation", "gated", "norm", "similarity", "alignment", "attention")


def module(stem, backend):
    package = {
        "torch": "fda_fast.ops.reference",
        "triton": "fda_fast.kernels",
        "cuda": "fda_fast.ops.cuda",
    }[backend]
    return importlib.import_module(f"{package}.{stem}")


def has(stem, backend):
    return backend == "triton" or stem == "alignment"


def attention(m, heads, x, dx, g, t, S, b):
    y, dy, later = m.forward(x, dx, heads)
    return y, dy, later.backward(g), later.tangent(t), *later.reverse(S, b, True)


def cases(stem, draw, real):
    """Pairs (function of the module, arguments); ``draw(*shape)`` gives a tensor."""
    if stem in ("activation", "gated"):
        rows, width = real(8192, 3), real(13824, 70)
        x, dx, t = (draw(1, rows, 2 * width if stem == "gated" else width) for _ in range(3))
        g, S, b = (draw(1, rows, width) for _ in range(3))
        dx = dx * 1e-3
        for kind in ("silu", "gelu"):
            yield lambda m, *a, k=kind: m.forward(k, *a), (x, dx)
            yield lambda m, *a, k=kind: m.backward(k, *a), (x, g)
            yield lambda m, *a, k=kind: m.tangent(k, *a), (x, t)
            yield lambda m, *a, k=kind: m.reverse(k, *a, True), (x, dx, g, t, S, b)
    elif stem == "norm":
        for kind, width in (("layer", real(768, 30)), ("rms", real(5120, 33))):
            rows = real(3200, 3)
            x, dx, g, t, S, b = (draw(2, rows, width) for _ in range(6))
            w, c = draw(width), draw(width)
            tw, tb, mw, mb = (draw(2, width) * 1e-2 for _ in range(4))
            yield lambda m, *a, k=kind: m.forward(k, *a, EPS), (x, dx * 1e-2, w, c, tw, tb)
            yield lambda m, *a, k=kind: m.backward(k, *a, EPS, True, True, True), (x, g, w)
            yield lambda m, *a, k=kind: m.tangent(k, *a, EPS), (x, t, w, mw, mb)
            args = (x, dx * 1e-2, g, t, S, b, w, tw, mw)
            yield lambda m, *a, k=kind: m.reverse(k, *a, EPS, True), args
    elif stem == "similarity":
        for shape in ((1, real(8192, 3), real(5120, 40)), (2, real(64, 2), real(257 * 1024, 90))):
            y, dy, t = draw(*shape), draw(*shape) * 1e-3, draw(*shape)
            yield lambda m, *a: m.forward("cosine", *a, 64.0), (y, dy)
            yield lambda m, *a: m.reverse("cosine", *a, 64.0), (y, dy, t)
    elif stem == "alignment":
        widths = (real(13824, 12), real(13824, 20))
        g, u, v = (draw(1, real(8192, 3), sum(widths)) for _ in range(3))
        alpha, beta = draw(1, 2).float(), draw(1, 2).float()
        yield lambda m, *a: m.dots(*a, widths), (g, u, v)
        yield lambda m, *a: m.mix(*a, widths, None), (alpha, u, beta, v)
    else:
        for tokens, heads in (
            (5, Heads(real(12, 1), real(12, 1), 64, 0.125)),
            (real(50, 7), Heads(real(12, 1), real(12, 1), 64, 0.125)),
            (real(257, 17), Heads(real(16, 1), real(16, 1), 64, 0.125)),
            (real(128, 6), Heads(real(32, 2), real(8, 1), 128, 0.09, causal=True)),
        ):
            n = real(64, 1)
            x, dx, t = (draw(n, tokens, heads.packed) for _ in range(3))
            g, S, b = (draw(n, tokens, heads.query * heads.size) for _ in range(3))
            yield lambda m, *a, h=heads: attention(m, h, *a), (x, dx * 1e-2, g, t, S, b)


def moved_bytes(arguments, outputs):
    """The least that an operation moves through memory: each input read, each output written."""
    tensors = [a for a in (*arguments, *outputs) if isinstance(a, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def convert(value, dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def results(value):
    return value if isinstance(value, tuple) else (value,)
