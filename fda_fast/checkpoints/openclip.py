"""open_clip's image encoders from pickled modules: their blocks as live modules, without open_clip.

A pickled encoder says everything its blocks compute but not how; the how of one class is written
here. Sizes, heads, eps and activation are the record's; a block with any part that this class does
not have is refused rather than taken for one without it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from fda_fast.checkpoints.pickles import PickledTensor, Record
from fda_fast.checkpoints.pickles.values import Malformed
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.errors import InputError

_BLOCKS = "ResidualAttentionBlock"
_LAYERS = "transformer.resblocks"
_IDENTITY = "torch.nn.modules.linear.Identity"
# Parts that are an Identity, or missing, unless the encoder was built with unusual options.
_OPTIONAL = (("ln_attn",), ("ls_1",), ("ls_2",), ("ln_1_kv",), ("mlp", "ln"))
_PARTS = {"ln_1", "attn", "ln_2", "mlp"} | {name[0] for name in _OPTIONAL}
_MAX_WIDTH = 1 << 20
# (tokens of an image, width, blocks)
_PUBLISHED = {
    (50, 768, 12): "vit-b-32",
    (197, 768, 12): "vit-b-16",
    (257, 1024, 24): "vit-l-14",
}


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        """[*s] -> [*s]."""
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """A CLIP block, with open_clip's names and order of parameters.

    Args:
        width: d.
        hidden: width inside the MLP.
        heads: of attention; must divide ``width``.
        activation: of the MLP.
        eps: of both norms.
        batch_first: whether it takes [n, T, d] rather than [T, n, d].
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        heads: int,
        activation: nn.Module,
        eps: tuple[float, float] = (1e-5, 1e-5),
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=eps[0])
        self.attn = nn.MultiheadAttention(width, heads, batch_first=batch_first)
        self.ln_2 = nn.LayerNorm(width, eps=eps[1])
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, hidden), gelu=activation, c_proj=nn.Linear(hidden, width)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """[T, n, d], or [n, T, d] with ``batch_first`` -> the same."""
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        hidden: Tensor = self.mlp(self.ln_2(x))
        return x + hidden


class ImageEncoder(nn.Module):
    """A module of the structure and names of a record: live image blocks, and inert rest.

    Tensors are on the meta device. Only its blocks can be called.
    """


def image_encoder(checkpoint: Checkpoint) -> ImageEncoder:
    """The skeleton of a pickled open_clip image encoder, from the module that has ``visual``.

    Args:
        checkpoint: one with a pickled module: an ``ImageEncoder`` or ``ImageClassifier`` of Task
            Arithmetic's code, or a CLIP of open_clip itself.

    Raises:
        InputError: another module, or blocks with parts not known here.

    Cost: no weights are read.
    """
    root = next(iter(checkpoint.modules.values()), None)
    if root is None:
        raise InputError(
            f"the {checkpoint.role} {checkpoint.path} is a state dict of an open_clip encoder",
            expected="the pickled encoder itself (zeroshot.pt) as base model",
            fix="Heads and activation are not in a state dict; experts may be state dicts",
        )
    clip = _with_visual(root)
    if clip is None:
        raise InputError(
            f"the {checkpoint.role} {checkpoint.path} is a pickled {root.name}",
            expected="an open_clip image encoder, or a model of transformers",
            got="no module named visual with transformer.resblocks",
            fix="Its class was not imported, so what its layers compute is not known: save it "
            "with model.save_pretrained(directory), or merge it in memory with fda_fast.merge",
        )
    try:
        return _Builder(clip).encoder()
    except (_Unknown, Malformed, KeyError, TypeError, RuntimeError) as error:
        # torch refuses names and sizes that no module can have in one of the last three.
        raise InputError(
            f"the pickled {root.name} of the {checkpoint.role} {checkpoint.path}",
            expected="plain CLIP blocks: ln_1, attn, ln_2, mlp",
            got=str(error)[:200],
        ) from error


def is_image_encoder(checkpoint: Checkpoint) -> bool:
    """Whether to look for ``image_encoder`` here: a pickled module, or open_clip's names."""
    return bool(checkpoint.modules) or any(f"visual.{_LAYERS}." in n for n in checkpoint.names)


def published_preset(model: nn.Module) -> str | None:
    """The preset of a published encoder (ViT-B/32, B/16, L/14) by its sizes; None for others."""
    positions = model.state_dict().get("visual.positional_embedding")
    if not isinstance(model, ImageEncoder) or positions is None:
        return None
    blocks = model.get_submodule(f"visual.{_LAYERS}")
    return _PUBLISHED.get((*positions.shape, len(list(blocks.children()))))


class _Unknown(Exception):
    """A block that is not what ``ResidualAttentionBlock`` computes."""


def _with_visual(root: Record) -> Record | None:
    """The outermost module with an image transformer under ``visual``."""
    level = [root]
    for _ in range(4):
        for module in level:
            if module.submodule(f"visual.{_LAYERS}") is not None:
                return module
        level = [child for module in level for child in module.children().values()]
    return None


class _Builder:
    """Makes the skeleton of one CLIP record."""

    def __init__(self, clip: Record) -> None:
        self._clip = clip
        layers = clip.submodule(f"visual.{_LAYERS}")
        assert layers is not None
        self._layers = layers

    def encoder(self) -> ImageEncoder:
        """The skeleton."""
        model = ImageEncoder()
        with torch.device("meta"):
            for path, record in self._clip.named_modules():
                if record is self._layers:
                    blocks = [_block(name, r) for name, r in record.children().items()]
                    _owner(model, path).add_module(_leaf(path), nn.ModuleList(blocks))
                elif not path.startswith(f"visual.{_LAYERS}."):
                    module = nn.Module() if path else model
                    _add_tensors(module, record)
                    if path:
                        _owner(model, path).add_module(_leaf(path), module)
        return model.eval()


def _owner(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _add_tensors(module: nn.Module, record: Record) -> None:
    """Meta tensors for the record's own parameters and persistent buffers."""
    for name, tensor in record.tensors().items():
        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
        if tensor.is_parameter:
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        else:
            module.register_buffer(name, empty)


def _block(name: str, record: Record) -> ResidualAttentionBlock:
    """A live block of the record's sizes, on the meta device."""
    if record.kind != _BLOCKS:
        raise _Unknown(f"a {record.name}")
    extra = sorted(record.children().keys() - _PARTS)
    for path in _OPTIONAL:
        part = record.submodule(".".join(path))
        if part is not None and part.name != _IDENTITY:
            extra.append(".".join(path))
    if extra:
        raise _Unknown(f"{', '.join(extra)} as well in block {name}")
    attention, mlp = _child(record, "attn"), _child(record, "mlp")
    heads = attention.get("num_heads")
    width, hidden = _sizes(mlp)
    if type(heads) is not int or heads < 1 or width % heads:
        raise _Unknown(f"{heads!r:.40} heads of attention over a width of {width}")
    if attention.kind != "MultiheadAttention" or attention.get("add_zero_attn"):
        raise _Unknown(f"attention of class {attention.name} in block {name}")
    eps = tuple(_number(_child(record, norm).get("eps", 1e-5)) for norm in ("ln_1", "ln_2"))
    block = ResidualAttentionBlock(
        width,
        hidden,
        heads,
        _activation(_child(mlp, "gelu")),
        (eps[0], eps[1]),
        batch_first=attention.get("batch_first", False) is True,
    )
    expected = {key: tuple(tensor.shape) for key, tensor in block.state_dict().items()}
    got = {key: tensor.shape for key, tensor in record.state_dict().items()}
    if expected != got:
        key = next(k for k in (*expected, *got) if expected.get(k) != got.get(k))
        raise _Unknown(f"{key} of shape {got.get(key)}, not {expected.get(key)}, in block {name}")
    return block


def _child(record: Record, name: str) -> Record:
    found = record.children().get(name)
    if found is None:
        raise _Unknown(f"a {record.kind} without {name}")
    return found


def _sizes(mlp: Record) -> tuple[int, int]:
    weight = _child(mlp, "c_fc").get("weight")
    if not isinstance(weight, PickledTensor) or len(weight.shape) != 2:
        raise _Unknown("an mlp.c_fc without a weight")
    hidden, width = weight.shape
    if not 0 < width < _MAX_WIDTH or not 0 < hidden < _MAX_WIDTH:
        raise _Unknown(f"an MLP of widths {width} and {hidden}")
    return width, hidden


def _activation(record: Record) -> nn.Module:
    if record.kind == "QuickGELU":
        return QuickGELU()
    approximate = record.get("approximate", "none")
    if record.name == "torch.nn.modules.activation.GELU" and approximate in ("none", "tanh"):
        return nn.GELU(approximate)
    raise _Unknown(f"an activation of class {record.name}")


def _number(value: Any) -> float:
    if not isinstance(value, float) or not 0 < value < 1:
        raise _Unknown(f"an eps of {value!r:.40}")
    return value
