"""One name for a tensor, whatever prefix, wrapper or generation of library its checkpoint is from.

Canonical names are those of the skeleton's ``state_dict()`` without the base model's prefix:
"encoder.layer.3.output.dense.weight" for "bert.encoder.layer.3.output.dense.weight".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import transformers

from fda_fast.errors import InputError

# Prefixes that DataParallel, torch.compile, trainers, sentence-transformers and Task Arithmetic's
# image classifiers leave behind.
_WRAPPERS = (
    *("module.", "_orig_mod.", "model.", "base_model.", "0.auto_model.", "auto_model."),
    "image_encoder.",
)
_MAX_WRAPPERS = 4
_LEGACY_NORM = re.compile(r"(LayerNorm|layer_norm)\.(gamma|beta)$")


class Names:
    """Canonical names of the tensors of checkpoints of one architecture.

    Args:
        model: the skeleton.

    Attributes:
        keys: the canonical names of everything in the skeleton's state dict.
    """

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        prefix = getattr(model, "base_model_prefix", "")
        self._prefix = f"{prefix}." if prefix else ""
        self._rename, self._fused = _library_renames(model)
        self.keys = {self.strip(key) for key in model.state_dict()}
        self.fused: set[str] = set()

    def strip(self, name: str) -> str:
        """A skeleton name without the base model's prefix."""
        return name.removeprefix(self._prefix)

    def canonical(self, name: str) -> str:
        """The canonical name; for a tensor the skeleton lacks, the name without its wrappers.

        Names of tensors that this transformers version fuses with others or splits on loading are
        also collected in ``fused``.
        """
        if self._fused(name):
            self.fused.add(name)
        plain = plain_name(name)
        for candidate in self._unwrapped(plain):
            renamed = self._rename(candidate)
            for key in (self.strip(renamed), renamed):
                if key in self.keys:
                    return key
        for wrapper in ("module.", "_orig_mod."):
            plain = plain.removeprefix(wrapper)
        return self.strip(plain)

    def table(self, names: Iterable[str], role: str) -> dict[str, str]:
        """{canonical name: checkpoint name}.

        Raises:
            InputError: two tensors of the checkpoint are the same one by name.
        """
        table: dict[str, str] = {}
        for name in names:
            key = self.canonical(name)
            if key in table:
                raise InputError(
                    f"the {role} has the same tensor under two names",
                    got=f"{table[key]!r} and {name!r}",
                )
            table[key] = name
        return table

    def _unwrapped(self, name: str) -> Iterable[str]:
        """The name, then with one wrapper less and so on, and with the base prefix put in front."""
        wrappers = (self._prefix, *_WRAPPERS) if self._prefix else _WRAPPERS
        for _ in range(_MAX_WRAPPERS):
            yield name
            wrapper = next((w for w in wrappers if name.startswith(w)), None)
            if wrapper is None:
                return
            name = name.removeprefix(wrapper)
        yield name


def plain_name(name: str) -> str:
    """The name with the LayerNorm parameters called as they are since 2019."""
    found = _LEGACY_NORM.search(name)
    if found is None:
        return name
    return name[: found.start(2)] + ("weight" if found.group(2) == "gamma" else "bias")


def output_name(name: str) -> str:
    """The name to write a tensor under: what ``from_pretrained`` finds, without wrappers."""
    for _ in range(_MAX_WRAPPERS):
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
    return plain_name(name)


def _library_renames(
    model: transformers.PreTrainedModel,
) -> tuple[Callable[[str], str], Callable[[str], bool]]:
    """What this transformers version renames, and what it fuses or splits, when it loads."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # transformers 4: a table of regular expressions, or nothing
        table = getattr(model, "_checkpoint_conversion_mapping", None) or {}

        def rename(name: str) -> str:
            for pattern, replacement in table.items():
                name = re.sub(pattern, replacement, name)
            return name

        return rename, lambda name: False
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]

    def apply(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def fused(name: str) -> bool:
        renamed = apply(name)
        return any(c.rename_source_key(renamed)[1] is not None for c in converters)

    return apply, fused
