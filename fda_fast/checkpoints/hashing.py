"""Content hashes of tensors, for the metadata of anchors and for resuming."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and bytes, as 64 hexadecimal digits.

    Args:
        tensor: any shape, dtype, strides and device.

    Cost: one pass, about 1 to 2 GB/s; a copy if not contiguous or not on the CPU.
    """
    digest = hashlib.sha256()
    _update(digest, tensor)
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the sorted names and their tensors; the order of the mapping is no part of it.

    Args:
        tensors: {name: tensor}.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        encoded = name.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        _update(digest, tensors[name])
    return digest.hexdigest()


def _update(digest: hashlib._Hash, tensor: torch.Tensor) -> None:
    head = f"{tensor.dtype}{list(tensor.shape)}".encode()
    digest.update(len(head).to_bytes(8, "little") + head)
    if tensor.numel():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
