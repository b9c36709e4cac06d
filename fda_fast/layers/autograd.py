"""The published arithmetic by autograd: any module, any dtype; slow; the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fda_fast.errors import InputError
from fda_fast.layers.call import call_keywords, call_layer
from fda_fast.layers.evaluation import Evaluation, check_part
from fda_fast.layers.recognise import zero_gradient_names

# cosine_similarity's floor of each norm; part of the published arithmetic.
EPS = 1e-8


def _cosine(y: Tensor, target: Tensor) -> Tensor:
    """[A, D], [A, D] -> [A]."""
    return F.cosine_similarity(y, target, dim=1)


# Feature similarity s of construction: mean over anchors, as published.
_SIMILARITY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda y, target: _cosine(y, target).mean(),
    "l2": lambda y, target: -F.mse_loss(y, target),
    "l1": lambda y, target: -F.l1_loss(y, target),
}

# Loss of adaptation: sum over anchors, as published.
_DISTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda y, target: -_cosine(y, target).sum(),
    "l2": lambda y, target: F.mse_loss(y, target, reduction="sum"),
    "l1": lambda y, target: F.l1_loss(y, target, reduction="sum"),
}


class AutogradProblem:
    """Alignment of K tasks of one layer through a differentiable double backward.

        s_k   = similarity(layer(theta_0, X_k), layer(theta_k, X_k)), both branches functions of X
        L_k   = sum_p (1 - cos(d s_k / d theta_0,p, theta_k,p - theta_0,p))

    The second backward goes to the anchors only; task vectors and their norms are formed once.
    A term of L is the constant 1 (cosine 0, gradient 0) for tensors whose task vector is zero,
    whose gradient is identically zero, or which the layer does not use.

    Args:
        pretrained: the layer at theta_0; never written to, its mode and flags left alone. Layers
            in less than float32 are copied to it.
        finetuned: K layers with the same parameter names and shapes.
        distance: "cosine" (mean over anchors), "l2" or "l1" (mean over elements).
        zero_gradient: names of tensors whose gradient is zero by mathematics, such as the key
            bias of softmax attention. Default: those known for layers of this structure.
        directions: of each task {parameter name: tensor} to align with in place of the task
            vector; a term whose name is missing is the constant 1.
        objective: scalar function of the pretrained output [n, (T,) d_out] in place of s.
        part: anchors of a task whose graph exists at once; None for all. The same numbers to
            rounding, for a layer that treats every anchor by itself.

    Raises:
        InputError: unknown distance, no fine-tuned layer, names or shapes that differ; ``part``
            with an objective, which need not be a sum over anchors.

    Cost: per task and step about nine matrix products for each one of a forward, plus the graph;
    in parts three more.
    Source: FDA, arXiv 2510.21223v1, Eq. 1, in the form of the official construct_fda.py.
    """

    def __init__(
        self,
        pretrained: nn.Module,
        finetuned: Sequence[nn.Module],
        *,
        distance: str = "cosine",
        zero_gradient: Collection[str] | None = None,
        directions: Sequence[Mapping[str, Tensor]] | None = None,
        objective: Callable[[Tensor], Tensor] | None = None,
        part: int | None = None,
    ) -> None:
        check_part(part, objective)
        if zero_gradient is None:
            zero_gradient = zero_gradient_names(pretrained)
        self._similarity = _choose(_SIMILARITY, distance)
        check_same_parameters(pretrained, finetuned)
        self._dtype = working_dtype(pretrained, *finetuned)
        self._pretrained = pretrained = in_dtype(pretrained, self._dtype)
        self._finetuned = [in_dtype(layer, self._dtype) for layer in finetuned]
        self.parameter_names = [name for name, _ in pretrained.named_parameters()]
        # Leaves of our own share the storage; the caller's requires_grad flags stay as they are.
        self._parameters = {
            name: tensor.detach().requires_grad_() for name, tensor in pretrained.named_parameters()
        }
        self._objective = objective
        self._part = part
        given: Sequence[Mapping[str, Tensor] | None] = directions or [None] * len(finetuned)
        self._tasks = [
            _Task(self._parameters, layer, frozenset(zero_gradient), towards)
            for layer, towards in zip(self._finetuned, given, strict=True)
        ]
        self._keywords: dict[Any, list[dict[str, Any]]] = {}

    def evaluate(self, anchors: Tensor) -> Evaluation:
        """Loss, gradient and cosines at anchors [K, n, T, d] or [K, n, d].

        The gradient has the anchors' dtype, the rest the layers' (float32 or float64).
        """
        if anchors.shape[0] != len(self._tasks):
            raise InputError(
                "first dimension of anchors",
                expected=f"{len(self._tasks)} tasks",
                got=anchors.shape[0],
            )
        losses, grads, cosines = [], [], []
        for k, x in enumerate(anchors.detach().to(self._dtype)):
            loss, grad, cosine = self._evaluate_one(k, x)
            losses.append(loss)
            grads.append(grad)
            cosines.append(cosine)
        return Evaluation(
            torch.stack(losses), torch.stack(grads).to(anchors.dtype), torch.stack(cosines)
        )

    def _evaluate_one(self, k: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        task = self._tasks[k]
        cosines = x.new_zeros(len(self.parameter_names))
        # new_full, not new_tensor: a copy from the host cannot be recorded in a CUDA graph.
        loss = x.new_full((), float(len(self.parameter_names)))
        if not task.names:
            return loss, torch.zeros_like(x), cosines
        parts = x.split(self._part or len(x))
        if len(parts) == 1:
            x = x.clone().requires_grad_()
            gradients = self._gradients(k, x, 1.0, create_graph=True)
            terms, aligned = task.align(gradients)
            grad = _gradient(aligned, x)
        else:
            terms, aligned, grad = self._evaluate_parts(k, parts)
        for index, name in enumerate(self.parameter_names):
            if name in terms:
                cosines[index] = terms[name].detach()
        constants = len(self.parameter_names) - len(terms)
        aligned = aligned.detach() if isinstance(aligned, Tensor) else x.new_zeros(())
        return aligned + constants, grad, cosines

    def _gradients(
        self, k: int, x: Tensor, share: float, *, create_graph: bool
    ) -> dict[str, Tensor]:
        """G of anchors that are this share of all, by name; without what the layer leaves out."""
        names = self._tasks[k].names
        with torch.enable_grad():
            similarity = self._layer_similarity(k, x)
            found = torch.autograd.grad(
                similarity if share == 1 else share * similarity,
                [self._parameters[name] for name in names],
                create_graph=create_graph,
                allow_unused=True,
            )
        return {name: G for name, G in zip(names, found, strict=True) if G is not None}

    def _evaluate_parts(
        self, k: int, parts: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], Tensor | int, Tensor]:
        """Cosines, their sum in L and its gradient; the parts meet in G and M = dL/dG alone."""
        count = sum(len(part) for part in parts)
        total: dict[str, Tensor] = {}
        for part in parts:
            of_part = self._gradients(k, part, len(part) / count, create_graph=False)
            for name, G in of_part.items():
                total[name] = total[name].add_(G) if name in total else G
        leaves = {name: G.requires_grad_() for name, G in total.items()}
        terms, aligned = self._tasks[k].align(leaves)
        M: Sequence[Tensor] = ()
        if isinstance(aligned, Tensor):
            M = torch.autograd.grad(aligned, list(leaves.values()))
        grads = []
        for part in parts:
            x = part.clone().requires_grad_()
            of_part = self._gradients(k, x, len(part) / count, create_graph=True)
            with torch.enable_grad():
                pairs = zip(M, of_part.values(), strict=True)
                along = sum((M_p * G).sum() for M_p, G in pairs)
            grads.append(_gradient(along, x))
        return terms, aligned, torch.cat(grads)

    def _layer_similarity(self, k: int, x: Tensor) -> Tensor:
        key = (tuple(x.shape), x.dtype, x.device)
        if key not in self._keywords:
            layers = [self._pretrained, *self._finetuned]
            self._keywords[key] = [call_keywords(layer, x.detach()) for layer in layers]
        keywords = self._keywords[key]
        y = call_layer(self._pretrained, x, self._parameters, keywords[0])
        if self._objective is not None:
            return self._objective(y)
        y_f = call_layer(self._finetuned[k], x, self._tasks[k].parameters, keywords[k + 1])
        return self._similarity(y.flatten(1), y_f.flatten(1))


class _Task:
    """Constants of one task: frozen fine-tuned parameters and unit directions."""

    def __init__(
        self,
        pretrained: dict[str, Tensor],
        layer: nn.Module,
        zero_gradient: frozenset[str],
        given: Mapping[str, Tensor] | None,
    ) -> None:
        self.parameters = {name: p.detach() for name, p in layer.named_parameters()}
        self.names: list[str] = []
        self.directions: list[Tensor] = []
        for name, finetuned in self.parameters.items():
            if given is None:
                direction = finetuned - pretrained[name].detach()
            elif name in given:
                direction = given[name].to(finetuned)
            else:
                continue
            if name in zero_gradient or not bool(direction.any()):
                continue
            norm = torch.linalg.vector_norm(direction)
            self.names.append(name)
            self.directions.append(direction / norm.clamp_min(EPS))

    def align(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | int]:
        """Cosines by name, and the sum of 1 - cosine."""
        with torch.enable_grad():
            terms = {
                name: _gradient_cosine(gradients[name], direction)
                for name, direction in zip(self.names, self.directions, strict=True)
                if name in gradients
            }
            return terms, sum(1 - cosine for cosine in terms.values())


class AutogradAdaptation:
    """First-order problem of adaptation: fit one layer to K fine-tuned ones on their anchors.

        loss = sum over the chosen anchors of Dist(layer(theta_0 + delta, x), layer(theta_k, x))

    with Dist = minus cosine, squared error or absolute error, summed as published. Targets are
    computed once, in eval mode.

    Args:
        pretrained: the layer at theta_0. Layers in less than float32 are copied to it.
        tasks: (anchors [n_k, (T,) d], fine-tuned layer) per task; n_k may differ.
        distance: "cosine", "l2" or "l1".
        part: anchors whose graph exists at once; None for a whole batch. The same numbers to
            rounding.

    Attributes:
        parameter_names: in the order of ``named_parameters()``.
        deltas: name -> theta - theta_0, float32 (float64 for a float64 layer); zeros at first.
            The optimiser writes into them in place.
        gradients: name -> d loss / d theta at the last evaluation; the same tensors every time.
        size: total number of anchors; indices run over the tasks in order.
    """

    def __init__(
        self,
        pretrained: nn.Module,
        tasks: Sequence[tuple[Tensor, nn.Module]],
        *,
        distance: str = "cosine",
        part: int | None = None,
    ) -> None:
        check_part(part)
        self._part = part
        self._distance = _choose(_DISTANCE, distance)
        check_same_parameters(pretrained, [layer for _, layer in tasks])
        check_same_anchor_shapes([anchors for anchors, _ in tasks])
        dtype = working_dtype(pretrained, *(layer for _, layer in tasks))
        tasks = [(anchors.detach().to(dtype), in_dtype(layer, dtype)) for anchors, layer in tasks]
        self._layer = pretrained = in_dtype(pretrained, dtype)
        self._base = {name: p.detach() for name, p in pretrained.named_parameters()}
        self.parameter_names = list(self._base)
        self.deltas = {name: torch.zeros_like(p) for name, p in self._base.items()}
        self.gradients = {name: torch.zeros_like(p) for name, p in self._base.items()}
        self._anchors = torch.cat([anchors for anchors, _ in tasks])
        with torch.no_grad():
            self._targets = torch.cat(
                [call_layer(layer, x) for anchors, layer in tasks for x in self._split(anchors)]
            )
        self.size = self._anchors.shape[0]

    def _split(self, anchors: Tensor) -> tuple[Tensor, ...]:
        return anchors.split(self._part or max(1, len(anchors)))

    def refresh(self) -> None:
        """Nothing here depends on the deltas between evaluations."""

    def evaluate(self, index: Tensor) -> Tensor:
        """Loss (scalar, no host sync) of the anchors ``index`` [B]; fills ``gradients``."""
        parameters = {
            name: (base + self.deltas[name]).requires_grad_() for name, base in self._base.items()
        }
        first, *others = self._split(index)
        loss = self._evaluate_part(first, parameters, add=False)
        for part in others:
            loss = loss + self._evaluate_part(part, parameters, add=True)
        return loss

    def _evaluate_part(self, index: Tensor, parameters: dict[str, Tensor], *, add: bool) -> Tensor:
        with torch.enable_grad():
            y = call_layer(self._layer, self._anchors[index], parameters)
            loss = self._distance(y.flatten(1), self._targets[index].flatten(1))
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(self.parameter_names, gradients, strict=True):
            if add and gradient is not None:
                self.gradients[name].add_(gradient)
            elif gradient is not None:
                self.gradients[name].copy_(gradient)
            elif not add:
                self.gradients[name].zero_()
        return loss.detach()


def working_dtype(*layers: nn.Module) -> torch.dtype:
    """What layers are computed in: float64 if any parameter is, float32 otherwise."""
    wide = any(p.dtype == torch.float64 for layer in layers for p in layer.parameters())
    return torch.float64 if wide else torch.float32


def in_dtype(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The layer if all its parameters are of this dtype, a converted copy otherwise."""
    if all(p.dtype == dtype for p in layer.parameters()):
        return layer
    return copy.deepcopy(layer).to(dtype)


def check_same_parameters(pretrained: nn.Module, finetuned: Sequence[nn.Module]) -> None:
    """Refuse fine-tuned layers whose parameters are not the pretrained layer's.

    Raises:
        InputError: none given, or a name or shape differs; says which.
    """
    if not finetuned:
        raise InputError("fine-tuned layers", expected="at least one", got="none")
    base = dict(pretrained.named_parameters())
    for k, layer in enumerate(finetuned):
        theirs = dict(layer.named_parameters())
        if theirs.keys() != base.keys():
            different = sorted(theirs.keys() ^ base.keys())
            raise InputError(
                f"parameters of fine-tuned layer {k}",
                expected="the pretrained layer's names",
                got=f"a difference in {', '.join(different[:4])}",
            )
        for name, tensor in theirs.items():
            if tensor.shape != base[name].shape:
                raise InputError(
                    f"parameter {name} of fine-tuned layer {k}",
                    expected=f"shape {tuple(base[name].shape)} as in the pretrained layer",
                    got=tuple(tensor.shape),
                )


def check_same_anchor_shapes(anchors: Sequence[Tensor]) -> None:
    """Refuse tasks whose anchors [n_k, (T,) d] differ in T or d."""
    for k, x in enumerate(anchors):
        if x.shape[1:] != anchors[0].shape[1:]:
            raise InputError(
                f"anchors of task {k}",
                expected=f"[n, {', '.join(str(size) for size in anchors[0].shape[1:])}]",
                got=list(x.shape),
            )


def _gradient(value: Tensor | int, at: Tensor) -> Tensor:
    """The gradient of a scalar, zero where it does not depend on ``at``."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return torch.zeros_like(at)
    (found,) = torch.autograd.grad(value, at, allow_unused=True)
    return torch.zeros_like(at) if found is None else found


def _gradient_cosine(gradient: Tensor, direction: Tensor) -> Tensor:
    """cos(G, tau) as F.cosine_similarity has it, for tau already divided by its norm.

    Its floor of 1e-8 under |G| applies to the value only: the derivative is that of |G|.
    """
    norm = torch.linalg.vector_norm(gradient)
    floored = norm + (norm.detach().clamp_min(EPS) - norm.detach())
    # Divided last: a quotient of every element would be kept for the backward.
    return (gradient * direction).sum() / floored


def _choose(table: dict[str, Any], distance: str) -> Any:
    if distance not in table:
        raise InputError("distance", expected=" | ".join(table), got=repr(distance))
    return table[distance]
