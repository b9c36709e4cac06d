"""Write big synthetic checkpoints: a base model of any config, and fine-tunes of it.

    python benchmarks/synthetic.py FOLDER --model llama-1b --experts 2
    python benchmarks/synthetic.py FOLDER --model path/to/config.json --layers 4 --dtype float32

FOLDER receives base/, expert-1/, ... in sharded safetensors. A task vector is of low rank plus
noise, as fine-tuning leaves them, and ``--ratio`` of the weights' norm. Tensors are drawn one at a
time from seeds of their own names and written at once: memory is that of the largest tensor.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fda_fast.checkpoints.described import DescribedCheckpoint
from fda_fast.checkpoints.headers import DTYPES
from fda_fast.checkpoints.tensorfile import TensorInfo
from fda_fast.checkpoints.writer import parse_size, shard_names

_LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"],
                          "torch_dtype": "bfloat16", "tie_word_embeddings": False}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-tiny": _LLAMA
    | {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "vocab_size": 320}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "llama-1b": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    | {"vocab_size": 32000, "num_attention_heads": 32, "num_key_value_heads": 4},
    "llama-8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8},
    "roberta-large": {"model_type": "roberta", "architectures": ["RobertaModel"]}
    | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    | {"vocab_size": 50265, "num_attention_heads": 16, "max_position_embeddings": 514},
}
_STD = 0.02
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Recipe:
    """How weights are drawn.

    Attributes:
        seed: of everything.
        ratio: |task vector| / |pretrained| of every tensor.
        rank: of the low-rank part.
        noise: share of the task vector's norm that is noise of full rank.
    """

    seed: int = 0
    ratio: float = 0.01
    rank: int = 16
    noise: float = 0.3


def pretrained(name: str, info: TensorInfo, recipe: Recipe) -> Tensor:
    """The base's tensor, float32: normal, or near one for the gains of norms."""
    if not info.dtype.is_floating_point:
        return torch.zeros(info.shape, dtype=info.dtype)
    drawn = torch.randn(info.shape, generator=_generator(recipe.seed, "base", name)).mul_(_STD)
    gain = len(info.shape) == 1 and name.endswith("weight")
    return drawn.add_(1) if gain else drawn


def finetuned(name: str, info: TensorInfo, expert: str, recipe: Recipe) -> Tensor:
    """The expert's tensor, float32: the base's plus a task vector of its own."""
    tensor = pretrained(name, info, recipe)
    if not info.dtype.is_floating_point:
        return tensor
    draw = _generator(recipe.seed, expert, name)
    vector = torch.randn(info.shape, generator=draw)
    wanted = recipe.ratio * tensor.norm()
    if len(info.shape) != 2:
        return tensor.add_(vector.mul_(wanted / vector.norm()))
    rank = min(recipe.rank, *info.shape)
    a = torch.randn(info.shape[0], rank, generator=draw)
    b = torch.randn(rank, info.shape[1], generator=draw)
    vector.mul_(recipe.noise * wanted / vector.norm())
    # |AB|^2 = <A^T A, B B^T>: the product itself is only ever added.
    norm = ((a.T @ a) * (b @ b.T)).sum().sqrt()
    vector.addmm_(a, b, alpha=float((1 - recipe.noise**2) ** 0.5 * wanted / norm))
    return tensor.add_(vector)


def write(
    folder: Path, described: DescribedCheckpoint, expert: str | None, recipe: Recipe, shard: int
) -> None:
    """One checkpoint: config.json, shards and their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(described.config, indent=2) + "\n")
    shards = shard_names({name: info.nbytes for name, info in described.names.items()}, shard)
    for file, names in shards.items():
        infos = {name: described.names[name] for name in names}
        with open(folder / file, "wb") as stream:
            stream.write(_header(infos))
            for tensor in _draw(infos, expert, recipe):
                stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": described.nbytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _draw(infos: dict[str, TensorInfo], expert: str | None, recipe: Recipe) -> Iterator[Tensor]:
    for name, info in infos.items():
        tensor = (
            pretrained(name, info, recipe)
            if expert is None
            else finetuned(name, info, expert, recipe)
        )
        yield tensor.to(info.dtype).contiguous()


def _header(infos: dict[str, TensorInfo]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in infos.items():
        offsets = [position, position + info.nbytes]
        entries[name] = {"dtype": _CODES[info.dtype], "shape": info.shape, "data_offsets": offsets}
        position += info.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _generator(*parts: object) -> torch.Generator:
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def make(
    folder: Path,
    model: str,
    *,
    experts: int = 2,
    layers: int | None = None,
    dtype: str | None = None,
    shard_size: int | str = "1GB",
    recipe: Recipe | None = None,
) -> list[Path]:
    """Write a base and its experts.

    Args:
        folder: to write base/, expert-1/, ... into.
        model: a name in ``CONFIGS``, a config.json, or a folder with one.
        experts: how many.
        layers: instead of the config's number.
        dtype: of the weights; default: the config's.
        shard_size: most bytes per shard.
        recipe: how weights are drawn.

    Returns:
        The folders written, the base first.
    """
    if model in CONFIGS:
        config = dict(CONFIGS[model])
    else:
        path = Path(model)
        config = json.loads((path / "config.json" if path.is_dir() else path).read_text())
    if layers is not None:
        key = next(k for k in ("num_hidden_layers", "n_layer", "num_layers") if k in config)
        config[key] = layers
    if dtype is not None:
        config.pop("dtype", None)
        config["torch_dtype"] = dtype
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "config.json"
    source.write_text(json.dumps(config))
    described = DescribedCheckpoint(source)
    source.unlink()
    names = [None, *(f"expert-{i}" for i in range(1, experts + 1))]
    for name in names:
        write(
            folder / (name or "base"), described, name, recipe or Recipe(), parse_size(shard_size)
        )
    return [folder / (name or "base") for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-1b", help=f"{', '.join(CONFIGS)} or a config")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--shard-size", default="1GB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--rank", type=int, default=16)
    given = parser.parse_args()
    begun = time.monotonic()
    written = make(
        given.folder,
        given.model,
        experts=given.experts,
        layers=given.layers,
        dtype=given.dtype,
        shard_size=given.shard_size,
        recipe=Recipe(given.seed, given.ratio, given.rank),
    )
    total = sum(f.stat().st_size for path in written for f in path.iterdir())
    print(f"{len(written)} checkpoints, {total / 1e9:.2f} GB, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
