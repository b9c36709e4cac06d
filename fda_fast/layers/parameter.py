"""The parameters of a program: pretrained values, task vectors, and where they come from.

``Parameter`` is one tensor of ``module.named_parameters()``: the unit of the alignment loss (one
cosine each). ``Materials`` hands them to whoever builds the program, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fda_fast.errors import InputError
from fda_fast.layers.factored import Factors, factors_of, square_norm, stack
from fda_fast.layers.precision import Precision


class Parameter:
    """One parameter tensor of a layer: its pretrained value and K differences to it.

    Args:
        name: as in ``named_parameters()``.
        pretrained: the pretrained tensor, any float dtype, laid out as in the module.
        finetuned: the K fine-tuned tensors; or None for an adaptation, whose single difference
            starts at zero, lives in ``master`` [module's shape] and is written by an optimiser.
        transposed: the node uses the transpose of the module's tensor (GPT-2's Conv1D stores
            [in, out]; a ``Linear`` node wants [out, in]). ``shape``, ``value()``, ``delta()`` and
            ``grad_view()`` are in the node's layout, ``master`` and ``grad`` in the module's.
        offset: added to the value (Gemma's RMSNorm multiplies by 1 + weight). Differences and
            gradients are unaffected.
        zero_gradient: G is identically zero by structure (the key bias of softmax attention without
            rotary embedding). Such a tensor contributes the constant 1 to L and is left out of M.
        factors: of each task's difference, where it is known as a product (``layers.factored``),
            laid out as in the module.
        merged: of an adaptation: the program has one set of weights, pretrained + master, and no
            differences (no ``delta``), instead of both apart.
        dtype: of everything handed to nodes; float32 or float64.
        device: where the program runs.
    """

    def __init__(
        self,
        name: str,
        pretrained: Tensor,
        finetuned: Sequence[Tensor] | None,
        *,
        transposed: bool = False,
        offset: float = 0.0,
        zero_gradient: bool = False,
        factors: Sequence[Factors | None] = (),
        merged: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        for k, tensor in enumerate(finetuned or ()):
            if tensor.shape != pretrained.shape:
                raise InputError(
                    f"parameter {name} of fine-tuned layer {k}",
                    expected=f"shape {tuple(pretrained.shape)} as in the pretrained layer",
                    got=tuple(tensor.shape),
                )
        self.name = name
        self.transposed = transposed
        self.offset = offset
        self.zero_gradient = zero_gradient
        self.dtype = dtype
        self.device = torch.device(device) if device is not None else pretrained.device
        self._pretrained = pretrained.detach()
        self._finetuned = None if finetuned is None else [f.detach() for f in finetuned]
        self.shape = torch.Size(reversed(pretrained.shape)) if transposed else pretrained.shape
        self.tasks = 1 if finetuned is None else len(finetuned)
        self.merged = merged
        # Of an adaptation only, both in the module's layout.
        self.master: Any = None
        self.grad: Any = None
        self.adds = False  # whether gradients are added to ``grad``, for a batch in parts
        if finetuned is None:
            self._pretrained = self._pretrained.to(self.device, dtype)
            self.master = torch.zeros_like(self._pretrained, memory_format=torch.contiguous_format)
            self.grad = torch.zeros_like(self.master)
        self._factors = list(factors) if factors else [None] * self.tasks
        self._square: Tensor | None = None
        self._live: Any = None  # pretrained + master, if merged

    def _laid_out(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.device)
        return tensor.t() if self.transposed else tensor

    def value(self) -> Tensor:
        """The weights [*shape] of the first branch; the module's own storage if possible.

        The pretrained tensor, contiguous. If ``merged``, pretrained + master, in a buffer that the
        next call overwrites.
        """
        if self.merged:
            if self._live is None:
                self._live = torch.empty_like(self.master)
            torch.add(self._pretrained, self.master, out=self._live)
            return self._laid_out(self._live.add_(self.offset) if self.offset else self._live)
        value = self._laid_out(self._pretrained).to(self.dtype).contiguous()
        return value + self.offset if self.offset else value

    def delta(self) -> Tensor:
        """The K differences [K, *shape]; of an adaptation the live ``master``.

        Formed in float32, or in float64 where either tensor is, before anything is rounded.
        """
        assert not self.merged, "one set of weights has no differences"
        if self._finetuned is None:
            return self._laid_out(self.master).unsqueeze(0)
        base = self._laid_out(self._pretrained)
        out = torch.empty((self.tasks, *self.shape), dtype=self.dtype, device=self.device)
        for k, finetuned in enumerate(self._finetuned):
            known = self._factors[k]
            if known is not None:
                left, right = (f.to(self.device, self.dtype) for f in known)
                out[k] = self._laid_out(left @ right)
                continue
            tuned = self._laid_out(finetuned)
            wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
            out[k] = tuned.to(wide) - base.to(wide)
        norms = torch.linalg.vector_norm(out.flatten(1), dim=1, dtype=torch.float64)
        self._square = norms.square().to(self.dtype)
        return out

    def factors(self) -> Factors | None:
        """B [K, o, r] and A [K, r, i] of every difference, for a parameter [o, i]; None if unknown.

        ``delta()`` is B A to rounding.
        """
        known = [pair for pair in self._factors if pair is not None]
        if len(known) < self.tasks:
            return None
        left, right = stack(known, self.dtype, self.device)
        return (right.mT, left.mT) if self.transposed else (left, right)

    def tuned(self) -> Tensor:
        """The K fine-tuned values [K, *shape]; the module's own storage where possible."""
        if self.merged:
            return self.value().unsqueeze(0)
        if self._finetuned is None:
            return self.value().unsqueeze(0) + self.delta()
        values = [self._laid_out(f).to(self.dtype).contiguous() for f in self._finetuned]
        stacked = values[0].unsqueeze(0) if self.tasks == 1 else torch.stack(values)
        return stacked + self.offset if self.offset else stacked

    def grad_view(self) -> Tensor:
        """``grad`` in the node's layout [*shape], for ``Node.adjoint`` to write into."""
        return self._laid_out(self.grad)

    def receive(self, grad: Tensor) -> None:
        """Take a gradient in the module's layout into ``grad``."""
        if self.adds:
            self.grad.add_(grad)
        else:
            self.grad.copy_(grad)

    def square(self) -> Tensor:
        """|T|^2 of each task, [K], summed in float64 and given in the program's dtype."""
        if self._square is None:
            factors = self.factors()
            if factors is None:
                self.delta()
            else:
                self._square = square_norm(*factors).to(self.dtype)
        assert self._square is not None, "an adaptation has no task vectors"
        return self._square


class Materials:
    """What a recipe builds a program from: both sides' tensors by name, tokens, precision.

    Args:
        pretrained: the pretrained layer.
        finetuned: the K fine-tuned layers; None builds a program for adaptation.
        tokens: T, tokens per anchor (1 for anchors that are vectors).
        precision: how matrix products are computed.
        merged: see ``Parameter``; for an adaptation only.
        dtype: of the program's values; float32 or float64.
        device: where the program runs; that of the pretrained layer by default.
    """

    def __init__(
        self,
        pretrained: nn.Module,
        finetuned: Sequence[nn.Module] | None,
        *,
        tokens: int,
        precision: Precision,
        merged: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.tokens = tokens
        self.merged = merged
        self.parameters: list[Parameter] = []
        self.precision = precision
        self.dtype = dtype
        self.tasks = 1 if finetuned is None else len(finetuned)
        self.names = [name for name, _ in pretrained.named_parameters()]
        self._pretrained = dict(pretrained.named_parameters())
        self._finetuned = None
        self._layers = [] if finetuned is None else list(finetuned)
        if finetuned is not None:
            self._finetuned = [dict(layer.named_parameters()) for layer in finetuned]
            for k, tensors in enumerate(self._finetuned):
                if tensors.keys() != self._pretrained.keys():
                    raise InputError(
                        f"parameters of fine-tuned layer {k}",
                        expected="the names of the pretrained layer",
                        got=sorted(tensors.keys() ^ self._pretrained.keys()),
                    )
        first = next(iter(self._pretrained.values()))
        self.device = torch.device(device) if device is not None else first.device

    def parameter(
        self,
        name: str,
        *,
        transposed: bool = False,
        offset: float = 0.0,
        zero_gradient: bool = False,
    ) -> Parameter:
        """The parameter of that name in ``named_parameters()``; arguments as in ``Parameter``."""
        tuned = None if self._finetuned is None else [f[name] for f in self._finetuned]
        factors = [factors_of(layer, name) for layer in self._layers]
        parameter = Parameter(
            name,
            self._pretrained[name],
            tuned,
            transposed=transposed,
            offset=offset,
            zero_gradient=zero_gradient,
            factors=factors,
            merged=self.merged,
            dtype=self.dtype,
            device=self.device,
        )
        self.parameters.append(parameter)
        return parameter
