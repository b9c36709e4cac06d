"""An expert seen through the base model's names: what it changes, and what it does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from fda_fast.checkpoints import adapters
from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.checkpoints.reader import Checkpoint, some
from fda_fast.errors import InputError, with_path

Vocabulary = Literal["base", "refuse"]

# config.json entries that change what the layers compute. Others (dropout, ids) do not matter.
_STRUCTURE = (
    "model_type",
    "hidden_size",
    "n_embd",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "n_inner",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "patch_size",
)
# Entries that a fine-tune may change on purpose (longer contexts): said, not refused.
_CHANGEABLE = ("rope_theta", "rope_scaling", "layer_norm_eps", "rms_norm_eps", "sliding_window")
_IGNORED_BUFFERS = ("position_ids", "inv_freq", "masked_bias", "token_type_ids", "attn.bias")


class _Source(Protocol):
    """Where an expert's values come from: a checkpoint, or an adapter on the base."""

    def tensors(
        self, names: list[str], pretrained: Mapping[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]: ...

    def task_vectors(
        self, names: list[str], pretrained: Mapping[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class ExpertView:
    """An expert by the base model's tensor names. Use ``match_expert``.

    Attributes:
        base: the base checkpoint.
        expert: the expert's checkpoint (a model or an adapter).
        changed: base names that the expert has its own values for.
        unchanged: base names it has none for (or none that fit): the base's values stand.
        ignored: names in the expert that the base has no use for (task heads, buffers).
        notes: what was found and accepted, one sentence each.
    """

    base: Checkpoint
    expert: Checkpoint
    changed: list[str]
    unchanged: list[str]
    ignored: list[str]
    notes: list[str]
    _source: _Source = field(repr=False)

    @property
    def role(self) -> str:
        """How messages call the expert."""
        return self.expert.role

    def read(
        self,
        names: Iterable[str],
        *,
        dtype: torch.dtype | None = torch.float32,
        pretrained: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The expert's tensors by base names, in the order asked for.

        Args:
            names: base names; those in ``unchanged`` give the base's tensor.
            dtype: to convert floating point tensors to; None keeps what the files hold (an
                adapter's sums are float32).
            pretrained: the base's tensors by name, if at hand, to spare reading them again for
                an adapter or an unchanged tensor.

        Raises:
            InputError: an unknown name, a file that changed, NaN or Inf.
        """
        tensors = self._source.tensors(list(names), pretrained)
        for name, tensor in tensors.items():
            check_finite(name, tensor, self.role)
        return {name: _convert(tensor, dtype) for name, tensor in tensors.items()}

    def task_vectors(
        self, names: Iterable[str], pretrained: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Finetuned minus pretrained in float32, by base name; exactly B A for an adapter.

        Args:
            names: base names of floating point tensors.
            pretrained: the base's tensors by name, if at hand.

        Raises:
            InputError: as ``read``.
        """
        tensors = self._source.task_vectors(list(names), pretrained)
        for name, tensor in tensors.items():
            check_finite(name, tensor, self.role)
        return tensors

    def factors(self, names: Iterable[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Thin factors of the task vectors of matrices, by base name; none but for an adapter.

        Args:
            names: base names.

        Returns:
            {name: (left [m, r], right [r, n])}, float32: their product is the task vector.
        """
        if not isinstance(self._source, adapters.AdapterSource):
            return {}
        return self._source.factors(list(names))


def match_expert(
    base: Checkpoint,
    expert: Checkpoint,
    layout: ModelLayout,
    *,
    vocabulary: Vocabulary = "base",
) -> ExpertView:
    """Find every tensor of the base in an expert, whatever its names, head and dtype.

    Args:
        base: the base model.
        expert: a fine-tune of it (any form ``Checkpoint.open`` takes) or a PEFT adapter for it.
        layout: the base's layers.
        vocabulary: what to do where the expert has more or fewer rows of embeddings: take the
            base's embeddings and say so, or "refuse".

    Raises:
        InputError: another architecture by config.json; a tensor of another shape; a tensor of
            a layer that the expert lacks. The message names it.

    Cost: headers only.
    """
    if expert.adapter is not None:
        source = adapters.AdapterSource(base, expert, layout)
        return ExpertView(
            base,
            expert,
            changed=[name for name in base.names if name in source.changed],
            unchanged=[name for name in base.names if name not in source.changed],
            ignored=[],
            notes=[*expert.notes, *source.notes],
            _source=source,
        )
    notes = [*expert.notes, *_compare_configs(base, expert)]
    theirs = layout.names.table(expert.names, expert.role)
    found: dict[str, str] = {}
    lacking, other_vocabulary = [], []
    for key, name in layout.base_table.items():
        if key not in theirs:
            lacking.append(name)
        elif expert.names[theirs[key]].shape == base.names[name].shape:
            found[name] = theirs[key]
        elif name in layout.outside and _rows_differ(base, expert, name, theirs[key]):
            other_vocabulary.append((name, theirs[key]))
        else:
            raise _shape_mismatch(base, expert, name, theirs[key])
    if other_vocabulary:
        notes.append(_vocabulary_note(base, expert, other_vocabulary, vocabulary))
    notes += _check_lacking(expert, layout, lacking)
    ignored = [name for key, name in theirs.items() if key not in layout.base_table]
    heads = [name for name in ignored if not name.endswith(_IGNORED_BUFFERS)]
    if heads:
        notes.append(f"the {expert.role} has {_count(heads)} of its own, ignored: {some(heads)}")
    notes += _dtype_notes(base, expert, found)
    return ExpertView(
        base,
        expert,
        changed=[name for name in base.names if name in found],
        unchanged=[name for name in base.names if name not in found],
        ignored=ignored,
        notes=notes,
        _source=_CheckpointSource(base, expert, found),
    )


@dataclass(frozen=True)
class _CheckpointSource:
    """A full checkpoint as the source of an expert's tensors."""

    base: Checkpoint
    expert: Checkpoint
    found: dict[str, str]

    def tensors(
        self, names: list[str], pretrained: Mapping[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        own = self.expert.read(self.found[name] for name in names if name in self.found)
        rest = self.base.read([n for n in names if n not in self.found], pretrained)
        return {n: own[self.found[n]] if n in self.found else rest[n] for n in names}

    def task_vectors(
        self, names: list[str], pretrained: Mapping[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        finetuned = self.tensors(names, pretrained)
        theta0 = self.base.read(names, pretrained)
        return {name: finetuned[name].float() - theta0[name].float() for name in names}


def check_finite(name: str, tensor: torch.Tensor, role: str) -> None:
    """Refuse NaN and infinity.

    Args:
        name: the tensor's name, for the message.
        tensor: any shape and dtype.
        role: whose it is: "base model", "expert movie".

    Raises:
        InputError: with the number of such values and the first place.

    Cost: one pass; a second only when something is wrong.
    """
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
        return
    wrong = ~torch.isfinite(tensor)
    count = int(wrong.sum())
    if count == 0:
        return
    first = [int(i) for i in wrong.nonzero()[0]]
    raise InputError(
        f"tensor {name!r} of the {role} has NaN or infinite values ({count})",
        expected="finite weights",
        got=f"{tensor[tuple(first)].item()} at {first}",
        fix="The checkpoint is damaged or its training diverged",
    )


def zero_task_vectors(task_vectors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors the expert left as they were; their term in L is the constant 1."""
    return [name for name, tensor in task_vectors.items() if not bool(tensor.count_nonzero())]


def _convert(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _compare_configs(base: Checkpoint, expert: Checkpoint) -> list[str]:
    if expert.config is None or base.config is None:
        return []
    notes = []
    for part in (None, "text_config", "vision_config"):
        ours, theirs = _part(base.config, part), _part(expert.config, part)
        where = f" ({part})" if part else ""
        for key in _STRUCTURE:
            if key in ours and key in theirs and ours[key] != theirs[key]:
                raise InputError(
                    f"the {with_path(expert.role, expert.path)} is of another architecture than "
                    f"the {base.role}: {key}{where} in config.json",
                    expected=ours[key],
                    got=theirs[key],
                    fix="Only fine-tunes of one base model can be merged",
                )
        notes += [
            f"{key}{where} is {ours[key]} in the {base.role} and {theirs[key]} in the "
            f"{expert.role}: the base's is kept"
            for key in _CHANGEABLE
            if key in ours and key in theirs and ours[key] != theirs[key]
        ]
    return notes


def _part(config: dict[str, Any], part: str | None) -> dict[str, Any]:
    inner = config.get(part) if part else config
    return inner if isinstance(inner, dict) else {}


def _rows_differ(base: Checkpoint, expert: Checkpoint, name: str, theirs: str) -> bool:
    """Whether two tensors differ in their first dimension alone: a vocabulary, or a head."""
    ours, got = base.names[name].shape, expert.names[theirs].shape
    return len(ours) == len(got) > 0 and ours[1:] == got[1:]


def _vocabulary_note(
    base: Checkpoint, expert: Checkpoint, pairs: list[tuple[str, str]], vocabulary: Vocabulary
) -> str:
    name, theirs = pairs[0]
    if vocabulary == "refuse":
        raise _shape_mismatch(base, expert, name, theirs)
    described = (
        f"{ours} ({base.names[ours].shape[0]} rows, not {expert.names[got].shape[0]})"
        for ours, got in pairs
    )
    return (
        f"the {expert.role} has another vocabulary or head: the base's is kept for "
        f"{some(described)}"
    )


def _shape_mismatch(base: Checkpoint, expert: Checkpoint, name: str, theirs: str) -> InputError:
    called = "" if name == theirs else f" ({theirs!r} there)"
    return InputError(
        f"tensor {name!r} of the {with_path(expert.role, expert.path)}{called} has another shape",
        expected=f"{list(base.names[name].shape)} as in the {base.role}",
        got=list(expert.names[theirs].shape),
        fix="Only fine-tunes of one base model can be merged",
    )


def _check_lacking(expert: Checkpoint, layout: ModelLayout, lacking: list[str]) -> list[str]:
    inside = {name for spec in layout.layers for name in spec.parameters.values()}
    missing = [name for name in lacking if name in inside]
    if missing:
        raise InputError(
            f"the {with_path(expert.role, expert.path)} lacks {_count(missing)} of the layers to "
            "merge",
            expected=some(missing),
            got=f"names such as {some(list(expert.names)[:2])}",
            fix="It must be a complete fine-tune of the base model, or a PEFT adapter",
        )
    named = [n for n in lacking if n not in layout.tied and not n.endswith(_IGNORED_BUFFERS)]
    return [f"not in the {expert.role}, taken as unchanged: {some(named)}"] if named else []


def _dtype_notes(base: Checkpoint, expert: Checkpoint, found: dict[str, str]) -> list[str]:
    """One sentence per pair of dtypes: a coarser expert carries rounding in its task vector."""
    pairs = {
        (base.names[ours].dtype, expert.names[theirs].dtype)
        for ours, theirs in found.items()
        if base.names[ours].dtype != expert.names[theirs].dtype
    }
    return [
        f"the {expert.role} is stored in {str(got)[6:]}, the {base.role} in {str(ours)[6:]}: task "
        "vectors include the rounding"
        for ours, got in sorted(pairs, key=str)
    ]


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
