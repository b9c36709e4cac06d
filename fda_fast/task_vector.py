"""Task vectors as values: subtract two models, add and scale, apply to a third."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, overload

import torch
from torch import Tensor, nn

from fda_fast.errors import InputError

if TYPE_CHECKING:
    from fda_fast.checkpoints.reader import Checkpoint

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


class TaskVector:
    """Finetuned minus pretrained, by tensor name, in float32 (float64 where the weights are).

        vector = TaskVector(pretrained, a) + 0.5 * TaskVector(pretrained, b)
        merged = vector.apply_to(pretrained, scaling_coef=0.3)

    Supports ``+``, ``-``, unary minus, ``* number``, ``/ number`` and ``sum()``. Tensors that only
    one of two models has (heads) and tensors of integers are left out; of two vectors a sum has
    the names of both.

    Args:
        pretrained: a module, a state dict, or the path of a checkpoint.
        finetuned: the same; also a PEFT model (merged in a copy), or the path of an adapter on a
            ``pretrained`` given as a path.
        vector: the differences themselves, in place of both.

    Attributes:
        vector: mapping of the differences by name. Of paths each is read when it is asked for,
            every time; of modules and state dicts all are computed at once.

    Raises:
        InputError: no common tensors, or one whose shapes differ; checkpoints that
            ``merge`` would refuse.

    Source: Ilharco et al., arXiv 2212.04089.
    """

    def __init__(
        self,
        pretrained: Source | None = None,
        finetuned: Source | None = None,
        *,
        vector: Mapping[str, Tensor] | None = None,
    ) -> None:
        if (vector is None) != (pretrained is not None and finetuned is not None):
            raise InputError(
                "TaskVector", expected="pretrained and finetuned, or vector", got="neither or both"
            )
        self.vector: Mapping[str, Tensor]
        if vector is not None:
            self.vector = vector
        elif _is_path(pretrained) and _is_path(finetuned):
            self.vector = _between_paths(Path(pretrained), Path(finetuned))
        else:
            assert pretrained is not None and finetuned is not None
            self.vector = _between(_tensors(pretrained), _tensors(finetuned))

    def __add__(self, other: TaskVector | int | None) -> TaskVector:
        if not isinstance(other, TaskVector):
            return self if not other else NotImplemented  # sum() begins with 0
        return TaskVector(vector=_combined([(1.0, self.vector), (1.0, other.vector)]))

    __radd__ = __add__

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + (-other)

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __mul__(self, factor: float) -> TaskVector:
        return TaskVector(vector=_combined([(float(factor), self.vector)]))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        return self * (1.0 / divisor)

    @overload
    def apply_to(self, pretrained: nn.Module, scaling_coef: float = 1.0) -> nn.Module: ...
    @overload
    def apply_to(
        self, pretrained: Mapping[str, Tensor] | str | os.PathLike[str], scaling_coef: float = 1.0
    ) -> dict[str, Tensor]: ...
    def apply_to(
        self, pretrained: Source, scaling_coef: float = 1.0
    ) -> nn.Module | dict[str, Tensor]:
        """Pretrained + scaling_coef * vector, in the dtypes of ``pretrained``.

        Args:
            pretrained: a module (a copy is returned), a state dict or a path (a new state dict).
            scaling_coef: lambda.

        Returns:
            A module for a module, else a state dict. Tensors outside the vector are copied.

        Raises:
            InputError: the vector has no tensor of this model, or one of another shape.
        """
        if isinstance(pretrained, nn.Module):
            merged = copy.deepcopy(pretrained)
            self._add_to(merged.state_dict(), scaling_coef)
            return merged
        tensors = {name: tensor.clone() for name, tensor in _tensors(pretrained).items()}
        self._add_to(tensors, scaling_coef)
        return tensors

    @torch.no_grad()
    def _add_to(self, tensors: Mapping[str, Tensor], factor: float) -> None:
        done: set[int] = set()  # tied tensors have two names
        found = 0
        for name, target in tensors.items():
            if name not in self.vector:
                continue
            found += 1
            place = target.data_ptr()
            if place in done and target.numel():
                continue
            done.add(place)
            delta = self.vector[name].to(target.device)
            _check_shape(name, target, delta)
            wide = torch.promote_types(target.dtype, delta.dtype)
            target.copy_(torch.add(target.to(wide), delta.to(wide), alpha=factor))
        if not found:
            raise InputError(
                "apply_to", expected="a model with tensors of the task vector",
                got=f"names such as {', '.join(list(tensors)[:2])}",
            )  # fmt: skip


@dataclass(frozen=True)
class _Lazy(Mapping[str, Tensor]):
    """A mapping whose values are computed when they are asked for."""

    names: Mapping[str, None]
    compute: Callable[[str], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names  # Mapping's own would compute the value

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _combined(terms: list[tuple[float, Mapping[str, Tensor]]]) -> Mapping[str, Tensor]:
    """The sum of factor * vector; lazy as soon as one of them is."""

    def compute(name: str) -> Tensor:
        parts = [factor * vector[name] for factor, vector in terms if name in vector]
        for part in parts[1:]:
            _check_shape(name, parts[0], part)
        return sum(parts[1:], parts[0])

    names = dict.fromkeys(name for _, vector in terms for name in vector)
    if any(isinstance(vector, _Lazy) for _, vector in terms):
        return _Lazy(names, compute)
    return {name: compute(name) for name in names}


def _between(
    pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    common = _common(pretrained, finetuned)
    return {name: _difference(name, pretrained[name], finetuned[name]) for name in common}


def _between_paths(pretrained: Path, finetuned: Path) -> Mapping[str, Tensor]:
    """By the base's names, whatever the expert calls them, where a config.json tells the model."""
    from fda_fast.checkpoints.align import match_expert
    from fda_fast.checkpoints.layout import ModelLayout

    base, expert = _open(pretrained, "base model"), _open(finetuned, "finetuned model")
    if base.config is not None:
        view = match_expert(base, expert, ModelLayout.from_checkpoint(base))
        names = [n for n in view.changed if base.names[n].dtype.is_floating_point]
        return _Lazy(dict.fromkeys(names), lambda name: view.task_vectors([name])[name])
    common = _common(base.names, expert.names)
    floating = [n for n in common if base.names[n].dtype.is_floating_point]
    return _Lazy(
        dict.fromkeys(floating),
        lambda name: _difference(name, base.read([name])[name], expert.read([name])[name]),
    )


def _common(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    def floating(value: object) -> bool:
        return not isinstance(value, Tensor) or value.is_floating_point()

    common = [name for name in ours if name in theirs and floating(ours[name])]
    if not common:
        raise InputError(
            "task vector", expected="models with tensors of the same names",
            got=f"names such as {', '.join([*ours][:1])} and {', '.join([*theirs][:1])}",
        )  # fmt: skip
    return common


def _difference(name: str, pretrained: Tensor, finetuned: Tensor) -> Tensor:
    _check_shape(name, pretrained, finetuned)
    wide = torch.promote_types(pretrained.dtype, finetuned.dtype)
    wide = torch.promote_types(wide, torch.float32)
    theirs = finetuned.detach().to(pretrained.device, wide)
    return theirs - pretrained.detach().to(wide)


def _check_shape(name: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise InputError(
            f"tensor {name!r}", expected=f"one shape, {list(ours.shape)}", got=list(theirs.shape)
        )


def _tensors(source: Source) -> Mapping[str, Tensor]:
    if isinstance(source, nn.Module):
        from fda_fast.checkpoints.memory import plain_state_dict

        return plain_state_dict(source)
    if isinstance(source, str | os.PathLike):
        opened = _open(Path(source), "model")
        return opened.read(opened.names)
    return source


def _open(path: Path, role: str) -> Checkpoint:
    from fda_fast.checkpoints.reader import Checkpoint
    from fda_fast.references import locate

    return Checkpoint.open(locate(os.fspath(path), role), role=role)


def _is_path(source: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(source, str | os.PathLike)
