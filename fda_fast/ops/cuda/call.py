"""Handing tensors to the CUDA launchers: addresses after checks, the current stream, the device.

Device and stream are read here, in the body of a call and never while torch.compile traces: a
traced stream handle would be a constant of another stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fda_fast import _native
from fda_fast.errors import InputError

# csrc/common.cuh, enum Dtype.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def address(
    name: str,
    tensor: Tensor | None,
    shape: Sequence[int],
    like: Tensor,
    dtype: torch.dtype | None = None,
) -> int:
    """Where the elements of a tensor start; 0 for None.

    Args:
        name: used in the message.
        tensor: contiguous, of ``shape``, on the device of ``like``.
        shape: what is expected.
        like: gives the device, and the dtype unless one is named.
        dtype: what is expected. Default: that of ``like``.

    Raises:
        InputError: it is not such a tensor.
    """
    if tensor is None:
        return 0
    dtype = like.dtype if dtype is None else dtype
    fits = tensor.dtype == dtype and tensor.device == like.device and tensor.is_contiguous()
    if not fits or tensor.shape != torch.Size(shape):
        raise InputError(
            name,
            expected=f"contiguous {dtype} of shape {[*shape]} on {like.device}",
            got=f"{tensor.dtype} of shape {[*tensor.shape]}, strides {tensor.stride()}, "
            f"on {tensor.device}",
        )
    return tensor.data_ptr()


def rows_of(
    name: str, tensor: Tensor | None, shape: Sequence[int], like: Tensor
) -> tuple[int | None, int]:
    """Address and stride between tasks of [K, R, o], each task without gaps; None of None.

    Raises:
        InputError: it is not such a tensor in the dtype and on the device of ``like``.
    """
    if tensor is None:
        return None, 0
    fits = tensor.dtype == like.dtype and tensor.device == like.device
    if not fits or tensor.shape != torch.Size(shape) or not tensor[:1].is_contiguous():
        raise InputError(
            name,
            expected=f"{like.dtype} of shape {[*shape]} on {like.device}, each task contiguous",
            got=f"{tensor.dtype} of shape {[*tensor.shape]}, strides {tensor.stride()}, "
            f"on {tensor.device}",
        )
    return tensor.data_ptr(), tensor.stride(0)


def strided(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> tuple[int, int, int]:
    """Address and strides of a float32 matrix of coefficients; any strides.

    Raises:
        InputError: it is not a float32 matrix of ``shape`` on the device of ``like``.
    """
    if (
        tensor.dtype != torch.float32
        or tensor.device != like.device
        or tensor.shape != torch.Size(shape)
    ):
        raise InputError(
            name,
            expected=f"torch.float32 of shape {[*shape]} on {like.device}",
            got=f"{tensor.dtype} of shape {[*tensor.shape]} on {tensor.device}",
        )
    return tensor.data_ptr(), *tensor.stride()


def launch(name: str, like: Tensor, *arguments: object) -> None:
    """Call the launcher ``cuda_<name>`` on the current stream of the device of ``like``.

    Raises:
        RuntimeError: the launch failed; the message names the kernel and CUDA's error.
    """
    function = getattr(_native.load(), f"cuda_{name}")
    with torch.cuda.device(like.device):
        function(*arguments, torch.cuda.current_stream().cuda_stream)


def adam(
    step: int | Tensor, lr: float, betas: tuple[float, float], eps: float, like: Tensor
) -> tuple[float, float, float, float, float, float, int, float, float, float]:
    """Adam's constants in the order of csrc/launchers.cuh; of a step that only the device knows.

    Raises:
        InputError: the step is a tensor, but not one int64 on the device of ``like``.
    """
    beta1, beta2 = betas
    step_size, root, where = 0.0, 1.0, 0
    if isinstance(step, Tensor):
        where = address("step", step.reshape(1), (1,), like, torch.int64)
    else:
        step_size = lr / (1 - beta1**step)
        root = math.sqrt(1 - beta2**step)
    # beta = 0 has no logarithm; expm1 of this many negative steps is -1 just the same.
    logs = [math.log(beta) if beta > 0 else -1e4 for beta in betas]
    return (beta2, 1 - beta1, 1 - beta2, eps, step_size, root, where, lr, logs[0], logs[1])
