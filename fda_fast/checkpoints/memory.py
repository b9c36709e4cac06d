"""Modules and state dicts as checkpoints: what a merge in memory reads instead of files."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from fda_fast.checkpoints.layout import ModelLayout, Scope
from fda_fast.checkpoints.names import Names
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.checkpoints.skeleton import is_decoder
from fda_fast.checkpoints.tensorfile import TensorInfo, check_readable
from fda_fast.errors import InputError


class MemoryCheckpoint(Checkpoint):
    """Tensors at hand, seen as ``Checkpoint`` shows those of files.

    Args:
        tensors: {name: tensor}; used as they are, never written to.
        role: "base model", "expert movie": how messages call it.
        source: what it was made of, for messages: "BertModel".
        config: config.json's content, if there is one.
        adapter: adapter_config.json's content, if the tensors are an adapter's.

    Raises:
        InputError: no tensors; one without values (on the meta device); quantised weights.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        role: str,
        *,
        source: str,
        config: dict[str, Any] | None = None,
        adapter: dict[str, Any] | None = None,
    ) -> None:
        # Not the constructor above: it opens files.
        self.path, self.directory, self.role = Path(source), None, role
        self.config, self.adapter = config, adapter
        self.notes = []
        if not tensors:
            raise InputError(f"the {role} {source} is empty", expected="tensors", got="none")
        self._loaded = {name: tensor.detach() for name, tensor in tensors.items()}
        self._files, self.modules = {}, {}
        self.names = MappingProxyType(
            {name: _info(name, tensor, role) for name, tensor in self._loaded.items()}
        )
        self.aliases = self._find_aliases()

    def read(
        self, names: Iterable[str], at_hand: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Tensors by name on the CPU, contiguous; the caller's own storage where it is so already.

        Arguments and errors as ``Checkpoint.read``.
        """
        found = {}
        for name in names:
            if name not in self._loaded:
                raise InputError(f"the {self.role} {self.path} has no tensor {name!r}")
            given = at_hand.get(name) if at_hand else None
            found[name] = self._loaded[name].cpu().contiguous() if given is None else given
        return found

    def close(self) -> None:
        """Let go of the tensors."""
        self._loaded = {}


class ModuleNames(Names):
    """Names in a module that exists: its own keys first, then as in any checkpoint.

    Args:
        model: any module; transformers' renamings apply to those of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        if isinstance(model, transformers.PreTrainedModel):
            super().__init__(model)
            return
        self._prefix, self._rename, self._fused = "", str, lambda name: False
        self.keys = set(model.state_dict())
        self.fused = set()

    def canonical(self, name: str) -> str:
        """The canonical name, see ``Names.canonical``."""
        key = self.strip(name)
        return key if key in self.keys else super().canonical(name)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(
            module, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def config_of(module: nn.Module) -> dict[str, Any] | None:
    """What config.json would hold, for a model of transformers; None for any other."""
    config = getattr(module, "config", None)
    return config.to_dict() if isinstance(config, transformers.PretrainedConfig) else None


def base_checkpoint(
    pretrained: nn.Module | Mapping[str, Tensor], structure: nn.Module
) -> MemoryCheckpoint:
    """The pretrained side of a merge in memory.

    Args:
        pretrained: an unwrapped module, or a state dict.
        structure: the module itself, or the one that the state dict belongs to.

    Raises:
        InputError: it carries adapter layers, or as ``MemoryCheckpoint``.
    """
    if _tuner_layers(structure):
        raise InputError(
            f"the pretrained {type(structure).__name__} has PEFT adapter layers inside",
            expected="the model without adapters",
            fix="PeftModel.from_pretrained puts its layers into the model it is given: load the "
            "pretrained model once more, or pass peft_model.unload()",
        )
    tensors = pretrained.state_dict() if isinstance(pretrained, nn.Module) else pretrained
    return MemoryCheckpoint(
        tensors, "base model", source=type(structure).__name__, config=config_of(structure)
    )


def expert_checkpoint(
    expert: nn.Module | Mapping[str, Tensor], base: Checkpoint, names: Names, role: str
) -> MemoryCheckpoint:
    """A fine-tuned module, PEFT model or state dict as an expert; it is not modified.

    A LoRA model on exactly the base's weights is taken as its adapter, so that its task vector
    is scaling * B A itself, as that of an adapter on disk. Any other PEFT model is merged in a
    copy.

    Args:
        expert: the expert.
        base: the pretrained side.
        names: of the base.
        role: "expert movie".

    Raises:
        InputError: adapter layers outside a PeftModel, or as ``MemoryCheckpoint``.

    Cost: none for modules and state dicts; one comparison with the base for a LoRA model; a copy
    of the model for other PEFT models.
    """
    if not isinstance(expert, nn.Module):
        return MemoryCheckpoint(dict(expert), role, source="state dict")
    module = unwrapped(expert)
    if not _tuner_layers(module):
        return MemoryCheckpoint(
            module.state_dict(), role, source=type(module).__name__, config=config_of(module)
        )
    return _adapter(module, base, names, role) or MemoryCheckpoint(
        plain_state_dict(module, role), role, source=type(module).__name__
    )


def plain_state_dict(module: nn.Module, role: str = "model") -> dict[str, Tensor]:
    """The state dict of a module without its wrappers, and with PEFT adapters merged in a copy.

    Raises:
        InputError: adapter layers outside a PeftModel.
    """
    module = unwrapped(module)
    if not _tuner_layers(module):
        return dict(module.state_dict())
    import peft

    if not isinstance(module, peft.PeftModel):
        raise InputError(
            f"the {role} is a {type(module).__name__} with PEFT adapter layers inside",
            expected="the PeftModel that they belong to, or a model without them",
            fix="Give the PeftModel, or peft_model.merge_and_unload()",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that adapters are merged already, for instance
        return dict(cast(Any, copy.deepcopy(module)).merge_and_unload().state_dict())


def module_layout(
    base: Checkpoint, model: nn.Module, names: Names, scope: Scope = "auto"
) -> ModelLayout:
    """The layers of a module, as ``ModelLayout.from_checkpoint`` finds those of a directory.

    Args:
        base: its weights.
        model: the module; only its structure is used, its tensors may be on any device.
        names: of the module.
        scope: as for ``from_checkpoint``.

    Raises:
        InputError: as ``from_checkpoint``.

    Cost: a copy of the module without its parameters.
    """
    transformer = isinstance(model, transformers.PreTrainedModel)
    shell = cast(transformers.PreTrainedModel, without_parameters(model))
    layout = ModelLayout.from_model(
        base, shell, names, scope, decoder=transformer and is_decoder(shell)
    )
    for spec in layout.layers:
        layer = layout._modules[spec.name]
        stored = layer.state_dict().keys()
        computed = {name: b for name, b in layer.named_buffers() if name not in stored}
        # Those of a meta model of transformers are made by running the layer's constructor.
        if not any(buffer.is_meta for buffer in computed.values()):
            layout._buffers[spec.name] = {name: b.cpu() for name, b in computed.items()}
        elif not transformer:
            raise InputError(
                f"buffer {next(iter(computed))!r} of layer {spec.name} has no values",
                expected="a module whose buffers are not on the meta device",
            )
    layout.notes.extend(_masks(model))
    return layout


def _masks(model: nn.Module) -> Iterator[str]:
    """Notes on attention masks that a model hands to its layers, as open_clip's text model does."""
    for path, module in model.named_modules():
        if isinstance(getattr(module, "attn_mask", None), Tensor):
            yield (
                f"{path or type(model).__name__} passes its layers an attn_mask, which anchors "
                "know nothing of: layers that an expert changes there are fitted without it"
            )


def without_parameters(model: nn.Module) -> nn.Module:
    """A copy of a module whose parameters and stored buffers are on the meta device."""
    owned = [*model.parameters(), *_stored_buffers(model)]
    memo: dict[int, Any] = {id(tensor): _emptied(tensor) for tensor in owned}
    return copy.deepcopy(model, memo).eval()


def _emptied(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _stored_buffers(model: nn.Module) -> list[Tensor]:
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return [buffers[name] for name in model.state_dict() if name in buffers]


def _info(name: str, tensor: Tensor, role: str) -> TensorInfo:
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name!r} of the {role}", expected="a tensor", got=type(tensor).__name__)
    check_readable(name, tensor.dtype, str(tensor.dtype), role)
    if tensor.is_meta:
        raise InputError(
            f"tensor {name!r} of the {role} is on the meta device",
            expected="weights",
            fix="Load the model without offloading its weights",
        )
    nbytes = tensor.numel() * tensor.element_size()
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    # The address takes the place of the offset in a file: tied tensors have the same one.
    return TensorInfo(tuple(tensor.shape), tensor.dtype, Path(), nbytes, tensor.data_ptr(), stride)


def _tuner_layers(module: nn.Module) -> bool:
    """Whether PEFT has put layers of its own in; without peft loaded none can have been."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(inner, BaseTunerLayer) for inner in module.modules())


def _adapter(module: Any, base: Checkpoint, names: Names, role: str) -> MemoryCheckpoint | None:
    """The LoRA adapter of a PEFT model whose other weights are the base's; None if it is not so."""
    import peft

    if not isinstance(module, peft.PeftModel) or len(module.active_adapters) != 1:
        return None
    name = module.active_adapters[0]
    config = module.peft_config[name]
    plain = config.peft_type == peft.PeftType.LORA and not getattr(config, "use_dora", False)
    if not plain or not _on_base(module, base, names):
        return None
    tensors = peft.get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
    content = {**config.to_dict(), "peft_type": "LORA"}
    return MemoryCheckpoint(tensors, role, source=type(module).__name__, adapter=content)


def _on_base(module: Any, base: Checkpoint, names: Names) -> bool:
    """Whether the weights below a PEFT model's adapters are the base's, bit for bit."""
    table = names.table(base.names, base.role)
    compared = 0
    for key, tensor in module.get_base_model().state_dict().items():
        plain = key.replace(".base_layer.", ".").replace(".original_module.", ".")
        theirs = table.get(names.canonical(plain))
        if theirs is None:
            continue  # the adapter's own, or a head
        ours = base.read([theirs])[theirs]
        if ours.shape != tensor.shape or not torch.equal(ours, tensor.cpu()):
            return False
        compared += 1
    return compared > 0
