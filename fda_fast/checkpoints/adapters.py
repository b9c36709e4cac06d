"""PEFT LoRA adapters as experts: task vector = scaling * B A, read without loading any model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.checkpoints.reader import Checkpoint, some
from fda_fast.errors import InputError, with_path

# Options that change what an adapter computes beyond scaling * B A.
_REFUSED = (
    "use_dora",
    "use_qalora",
    "layer_replication",
    "megatron_config",
    "alora_invocation_tokens",
    "arrow_config",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "use_bdlora",
)
_PREFIX = "base_model.model."
_SIMPLE_PATTERN = re.compile(r"[\w.\\^$*|-]+$")
_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<part>embedding_)?(?P<side>[AB])(\.weight)?$")


@dataclass(frozen=True)
class _LowRank:
    """A and B of one target: tensor names in the adapter, and how they combine."""

    a: str
    b: str
    scaling: float
    transposed: bool  # the base stores [in, out]: GPT-2's Conv1D, and embeddings


class AdapterSource:
    """The tensors of base + adapter, and of the adapter's task vector, by base name.

    Args:
        base: the base model.
        expert: a checkpoint with ``adapter`` set.
        layout: the base's layers (for names).

    Attributes:
        changed: base names the adapter changes.
        notes: what was found and accepted.

    Raises:
        InputError: another kind than LoRA, an option that changes its arithmetic (DoRA, ...), a
            target the base lacks, shapes that do not fit, an adapter that changes nothing.
    """

    def __init__(self, base: Checkpoint, expert: Checkpoint, layout: ModelLayout) -> None:
        assert expert.adapter is not None
        self._base, self._expert = base, expert
        self.notes: list[str] = []
        _check_config(expert, expert.adapter)
        self._low_rank, self._replaced = self._match(expert.adapter, layout)
        self.changed = self._low_rank.keys() | self._replaced.keys()
        if not self.changed:
            raise InputError(f"the adapter {expert.path} of the {expert.role} changes no tensor")
        inside = {name for spec in layout.layers for name in spec.parameters.values()}
        beyond = sorted(self.changed - inside)
        if beyond:
            self.notes.append(
                f"the {expert.role} also changes tensors outside the merged layers: {some(beyond)}"
            )

    def tensors(
        self, names: list[str], pretrained: Mapping[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """Base + adapter; float32 where the adapter adds to the base."""
        values = self._base.read([n for n in names if n not in self._replaced], pretrained)
        values |= self._read_replaced(names)
        # A target that is also given whole (embeddings): the copy is what B A adds to.
        for name, delta in self._deltas(names).items():
            values[name] = values[name].float() + delta
        return {name: values[name] for name in names}

    def task_vectors(
        self, names: list[str], pretrained: Mapping[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """scaling * B A in float32, never through the sum with the base; zeros if unchanged."""
        own = self._read_replaced(names)
        theta0 = self._base.read(own, pretrained)
        vectors = {name: own[name].float() - theta0[name].float() for name in own}
        for name, delta in self._deltas(names).items():
            vectors[name] = vectors[name] + delta if name in vectors else delta
        unchanged = (name for name in names if name not in vectors)
        vectors |= {name: torch.zeros(self._base.names[name].shape) for name in unchanged}
        return {name: vectors[name] for name in names}

    def factors(self, names: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """(left [m, r], right [r, n]) of every matrix's task vector; r is 0 for an unchanged one.

        Float32, laid out as the base's tensors. Without those that the adapter gives whole.
        """
        wanted = [
            n for n in names if n not in self._replaced and len(self._base.names[n].shape) == 2
        ]
        parts = self._read_parts(wanted)
        found = {}
        for name in wanted:
            if name not in self._low_rank:
                m, n = self._base.names[name].shape
                found[name] = torch.zeros(m, 0), torch.zeros(0, n)
                continue
            target = self._low_rank[name]
            a, b = parts[target.a].float(), parts[target.b].float() * target.scaling
            found[name] = (a.T, b.T) if target.transposed else (b, a)
        return found

    def _read_parts(self, names: list[str]) -> dict[str, torch.Tensor]:
        """A and B of the targets among these, by their names in the adapter."""
        targets = [self._low_rank[name] for name in names if name in self._low_rank]
        return self._expert.read(part for target in targets for part in (target.a, target.b))

    def _deltas(self, names: list[str]) -> dict[str, torch.Tensor]:
        names = [name for name in names if name in self._low_rank]
        parts = self._read_parts(names)
        deltas = {}
        for name in names:
            target = self._low_rank[name]
            delta = (parts[target.b].float() @ parts[target.a].float()) * target.scaling
            deltas[name] = (delta.T if target.transposed else delta).contiguous()
        return deltas

    def _read_replaced(self, names: list[str]) -> dict[str, torch.Tensor]:
        own = self._expert.read(self._replaced[name] for name in names if name in self._replaced)
        return {name: own[self._replaced[name]] for name in names if name in self._replaced}

    def _match(
        self, config: dict[str, Any], layout: ModelLayout
    ) -> tuple[dict[str, _LowRank], dict[str, str]]:
        """Adapter tensors to base tensors: low-rank pairs, and tensors given whole."""
        pairs: dict[tuple[str, bool], dict[str, str]] = {}
        replaced, ignored = {}, []
        for name in self._expert.names:
            found = _KEY.match(name)
            if found:
                pairs.setdefault((found["module"], bool(found["part"])), {})[found["side"]] = name
                continue
            # Trained biases, and copies of whole modules under modules_to_save.
            key = layout.names.canonical(
                name.removeprefix(_PREFIX)
                .replace(".modules_to_save.", ".")
                .replace(".base_layer.", ".")
            )
            if key not in layout.base_table:
                ignored.append(name)
                continue
            target = layout.base_table[key]
            self._check_shape(target, name, self._expert.names[name].shape)
            replaced[target] = name
        if ignored:
            self.notes.append(
                f"the {self._expert.role} has tensors the base has no use for: {some(ignored)}"
            )
        low_rank = {}
        for (module, embedding), sides in pairs.items():
            path = module.removeprefix(_PREFIX)
            target = layout.base_table.get(layout.names.canonical(f"{path}.weight"), "")
            if not target or sides.keys() != {"A", "B"}:
                raise InputError(
                    f"{module!r} of the adapter {self._expert.path} of the {self._expert.role}",
                    expected="lora_A and lora_B for a module of the base model",
                    got=f"no {path}.weight in the {self._base.role}" if not target else list(sides),
                    fix="The adapter was trained on another model, or its file is incomplete",
                )
            low_rank[target] = self._pair(config, path, target, sides, embedding)
        return low_rank, replaced

    def _pair(
        self,
        config: dict[str, Any],
        path: str,
        target: str,
        sides: dict[str, str],
        embedding: bool,
    ) -> _LowRank:
        a, b = (self._expert.names[sides[side]].shape for side in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise InputError(
                f"lora_A and lora_B of {path!r} of the {self._expert.role}",
                expected="[rank, in] and [out, rank]",
                got=f"{list(a)} and {list(b)}",
                fix="Adapters on convolutions are not supported",
            )
        transposed = embedding or bool(config.get("fan_in_fan_out"))
        shape = (b[0], a[1])
        self._check_shape(target, sides["B"], shape[::-1] if transposed else shape)
        rank = _pattern(config.get("rank_pattern"), path, config.get("r", a[0]), self._expert.role)
        if rank != a[0]:
            raise InputError(
                f"rank of {path!r} of the {self._expert.role}",
                expected=f"{rank} by adapter_config.json",
                got=a[0],
            )
        alpha = _pattern(
            config.get("alpha_pattern"), path, config.get("lora_alpha", 8), self._expert.role
        )
        scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        return _LowRank(sides["A"], sides["B"], scaling, transposed)

    def _check_shape(self, target: str, name: str, shape: tuple[int, ...]) -> None:
        if shape != self._base.names[target].shape:
            raise InputError(
                f"tensor {name!r} of the {self._expert.role} does not fit {target!r}",
                expected=list(self._base.names[target].shape),
                got=list(shape),
                fix="The adapter was trained on another model",
            )


def _check_config(expert: Checkpoint, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"adapter kind (peft_type) of the {with_path(expert.role, expert.path)}",
            expected="LORA",
            got=repr(kind),
            fix="Merge it into its model with peft first and give the result as the expert",
        )
    used = [option for option in _REFUSED if config.get(option)]
    if used:
        raise InputError(
            f"the adapter {expert.path} of the {expert.role} uses {', '.join(used)}",
            expected="plain LoRA",
            fix="Merge it into its model with peft first and give the result as the expert",
        )


def _pattern(patterns: Any, path: str, default: Any, role: str) -> float:
    """The value of the first pattern that matches a module path, as peft matches them.

    The patterns are regular expressions out of an untrusted file: only simple ones are tried,
    which cannot keep the matcher busy for long.
    """
    value = default
    for pattern, candidate in patterns.items() if isinstance(patterns, dict) else ():
        if not _SIMPLE_PATTERN.match(pattern) or pattern.count("*") > 3:
            raise InputError(
                f"rank_pattern or alpha_pattern of the {role}",
                expected="module names, with at most three '*'",
                got=repr(pattern)[:80],
            )
        try:
            found = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error as error:
            raise InputError(
                f"rank_pattern or alpha_pattern of the {role}", got=repr(pattern)[:80]
            ) from error
        if found:
            value = candidate
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise InputError(
            f"rank or alpha of {path!r} of the {role}",
            expected="a positive number",
            got=repr(value),
        )
    return value
