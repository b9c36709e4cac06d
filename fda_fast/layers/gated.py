"""Gated activation: y = phi(gate) * up on the packed output [gate | up] of one ``Linear``."""

from __future__ import annotations

from fda_fast.layers.activation import Activation
from fda_fast.ops import gated


class GatedActivation(Activation):
    """SwiGLU ("silu"), GeGLU ("gelu", "gelu_tanh"), ...; kinds as for ``Activation``."""

    op = gated
