"""Real activations as extra anchors: collecting a few, keeping them, giving them to adaptation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fda_fast.anchors import Anchors
from fda_fast.checkpoints.hashing import hash_tensors
from fda_fast.errors import InputError
from fda_fast.work import file_name

if TYPE_CHECKING:
    from fda_fast.layerwork import LayerInput


def collect_activations(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    *,
    layers: Sequence[str] | None = None,
    scope: Literal["auto", "block", "mlp"] = "auto",
    tokens: int | None = None,
    count: int = 64,
) -> dict[str, Tensor]:
    """What the layers of a model take in while it reads some inputs.

    Args:
        model: a transformers model (with a PEFT adapter on it, if any): an expert, run on inputs
            of its task, or the pretrained model. Not modified.
        batches: the inputs: keyword arguments of the model, or its first argument. Without padding,
            because a padded position is no input of the layer. Read until there are enough.
        layers: names of the layers as reports give them ("encoder.layer.3", "layers.7.mlp");
            default: all that a merge with this ``scope`` works on.
        scope: "auto", "block" or "mlp", as in a merge.
        tokens: T of whole blocks: an activation is the first T tokens of a sequence, which is what
            a block sees in a left-to-right model; others see the whole sequence, so theirs must
            have exactly T tokens. Default: what the first batch has. Unused for MLPs, which take
            single vectors.
        count: activations per layer: sequences for blocks, vectors for MLPs.

    Returns:
        {layer: float32 on the CPU, [n, T, d] for blocks, [n, d] for MLPs}, n at most ``count``.

    Raises:
        InputError: an unknown layer, no inputs, padding, too few tokens, a mixture-of-experts
            model with scope "mlp" (its experts see what its router sends them).

    Cost: forward passes in the model's own dtype; memory for what is kept.
    """
    # Not at the top: they load transformers, which `import fda_fast` should not wait for.
    from fda_fast.checkpoints.places import layer_paths
    from fda_fast.checkpoints.repeated import repeated_layers
    from fda_fast.checkpoints.skeleton import is_decoder

    inner: Any = model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if scope not in ("auto", "block", "mlp"):
        raise InputError("scope", expected="auto, block or mlp", got=repr(scope))
    decoder = is_decoder(inner)
    paths, _ = layer_paths(inner, repeated_layers(inner), scope, decoder)
    for path, kind in paths:
        if kind == "experts":
            raise InputError(
                f"layer {path} is a mixture of experts, which see what their router sends them",
                fix="Collect activations from dense models only.",
            )
    prefix = f"{inner.base_model_prefix}." if inner.base_model_prefix else ""
    known = {path.removeprefix(prefix): (path, kind) for path, kind in paths}
    wanted = list(known) if layers is None else list(layers)
    for name in wanted:
        if name not in known:
            raise InputError(f"layer {name!r}", expected=", ".join(list(known)[:4]) + ", ...")
    gatherers = {
        name: _Gatherer(name, known[name][1] == "mlp", tokens, count, decoder) for name in wanted
    }
    hooks = [
        inner.get_submodule(known[name][0]).register_forward_pre_hook(gatherer, with_kwargs=True)
        for name, gatherer in gatherers.items()
    ]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for batch in batches:
            _check_padding(batch)
            with torch.no_grad():
                model(**batch) if isinstance(batch, Mapping) else model(batch)
            if all(gatherer.full for gatherer in gatherers.values()):
                break
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return {name: gatherer.result() for name, gatherer in gatherers.items()}


class _Gatherer:
    """A forward pre-hook that keeps what comes in."""

    def __init__(
        self, name: str, vectors: bool, tokens: int | None, count: int, causal: bool
    ) -> None:
        self._name, self._vectors, self._causal = name, vectors, causal
        self._tokens, self._left = tokens, count
        self._kept: list[Tensor] = []

    @property
    def full(self) -> bool:
        return self._left == 0

    def __call__(self, _: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = args[0] if args else keywords["hidden_states"]
        if self.full:
            return
        if self._vectors:
            x = x.reshape(-1, x.shape[-1])
        else:
            self._tokens = self._tokens or x.shape[1]
            there = x.shape[1]
            if there < self._tokens or (there > self._tokens and not self._causal):
                raise InputError(
                    f"a sequence of {there} tokens at layer {self._name}",
                    expected=f"{'at least' if self._causal else 'exactly'} {self._tokens}",
                )
            x = x[:, : self._tokens]
        x = x[: self._left].detach().to("cpu", torch.float32, copy=True)
        self._left -= len(x)
        self._kept.append(x)

    def result(self) -> Tensor:
        if not self._kept:
            raise InputError(f"activations of layer {self._name}", got="no inputs reached it")
        return torch.cat(self._kept).contiguous()


def _check_padding(batch: Mapping[str, Tensor] | Tensor) -> None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and not bool(mask.all()):
        raise InputError(
            "a batch with padding", expected="sequences of one length", fix="Cut them, or sort."
        )


def save_activations(
    folder: str | os.PathLike[str], expert: str, activations: Mapping[str, Tensor]
) -> None:
    """Write activations where a merge finds them through ``extra_anchors``.

    Args:
        folder: files go to ``folder/<expert>/<layer>.safetensors``, in the format of anchors.
        expert: the expert's name in the merge.
        activations: from ``collect_activations``.

    Raises:
        InputError: a tensor that is not float32 [n, T, d] or [n, d].
        OSError: as the operating system says.
    """
    target = Path(folder) / file_name(expert)
    target.mkdir(parents=True, exist_ok=True)
    for layer, tensor in activations.items():
        settings = {"source": "activations", "sha256": hash_tensors({"activations": tensor})}
        anchors = Anchors(tensor, layer, expert, settings)
        anchors.save(target / f"{file_name(layer)}.safetensors")


def check_extra_anchors(folder: Path, experts: Iterable[str], layers: Iterable[str]) -> None:
    """Refuse a folder of extra anchors that has nothing for this merge.

    Raises:
        InputError: no such folder, or no file for any expert and layer.
    """
    if not folder.is_dir():
        raise InputError(f"extra_anchors {folder}", expected="a folder")
    names = [file_name(layer) for layer in layers]
    for expert in experts:
        if any((folder / file_name(expert) / f"{name}.safetensors").is_file() for name in names):
            return
    raise InputError(
        f"extra_anchors {folder} has nothing for this merge",
        expected="files <expert>/<layer>.safetensors",
        got=", ".join(sorted(path.name for path in folder.iterdir())[:4]) or "an empty folder",
    )


def extra_anchors(
    folder: Path, inputs: LayerInput, anchors: Mapping[str, Anchors]
) -> dict[str, Tensor]:
    """The extra anchors of a layer by expert; experts without a file are left out.

    Args:
        folder: with files <expert>/<layer>.safetensors.
        inputs: the layer.
        anchors: the constructed ones, whose shape behind n decides. For single vectors, sequences
            are taken apart.

    Raises:
        InputError: a file of another layer, width or number of tokens, or not finite.
    """
    found = {}
    for task in inputs.finetuned:
        path = folder / file_name(task) / f"{file_name(inputs.name)}.safetensors"
        if not path.is_file():
            continue
        extra = Anchors.load(path)
        tensor, shape = extra.tensor, anchors[task].tensor.shape[1:]
        if len(shape) == 1:
            tensor = tensor.reshape(-1, tensor.shape[-1])
        if extra.layer != inputs.name or tensor.shape[1:] != shape:
            raise InputError(
                f"extra anchors file {path}",
                expected=f"layer {inputs.name}, [n, {', '.join(map(str, shape))}]",
                got=f"layer {extra.layer}, {list(extra.tensor.shape)}",
                fix="Collect them with the number of tokens of this merge's anchors.",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"extra anchors file {path}", got="NaN or infinite values")
        found[task] = tensor
    return found
