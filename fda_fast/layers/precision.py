"""How matrix products are computed: "fp32", "tf32" or "bf16".

A product always accumulates in float32 (float64 in a float64 program); the precision says what its
operands are rounded to. On CUDA, "tf32" and "bf16" are the tensor cores' types. A processor that
multiplies bfloat16 faster than float32 does so in "bf16"; torch rounds such a product once more, to
bfloat16, which adds a quarter to the error. Any other processor *imitates* a GPU: the operands are
rounded to 10 or 7 bits of mantissa and multiplied in float32, so that a GPU's arithmetic can be
held to the fidelity gate on any machine.

An *operand* is a tensor in the form products take it: round once with ``operand``, use it in every
product it enters.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fda_fast.errors import InputError
from fda_fast.ops import memory

NAMES = ("fp32", "tf32", "bf16")
# How a processor computes "bf16": "native" or "rounded"; without it, ``fast_bf16`` decides.
VARIABLE = "FDA_FAST_CPU_BF16"


def resolve(name: str, device: torch.device | str) -> str:
    """The precision that ``name`` means on ``device``.

    "auto" is bf16 on a CUDA device from Ampere on, and fp32 elsewhere.

    Raises:
        InputError: an unknown name.
    """
    if name in NAMES:
        return name
    if name != "auto":
        raise InputError("precision", expected=f"one of {(*NAMES, 'auto')}", got=repr(name))
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16"
    return "fp32"


def round_tf32(x: Tensor) -> Tensor:
    """float32 rounded to 10 bits of mantissa, to nearest even; a new tensor of the same shape."""
    bits = x.contiguous().view(torch.int32)
    odd = (bits >> 13) & 1
    return ((bits + (odd + 0x0FFF)) & ~0x1FFF).view(torch.float32)


def round_bf16(x: Tensor) -> Tensor:
    """float32 rounded to bfloat16's 7 bits of mantissa, kept as float32; a new tensor."""
    return x.bfloat16().float()


def fast_bf16() -> bool:
    """Whether this processor is to multiply bfloat16 itself in "bf16".

    By what it is, not by a clock, so that a result does not hang on the load of a machine: yes with
    AMX, and on AMD with AVX512_BF16 (Zen 4: a product takes half the time of a float32 one). Intel
    with AVX512_BF16 alone multiplies bfloat16 no faster (measured). The environment variable
    ``FDA_FAST_CPU_BF16`` overrules it: "native" or "rounded".

    Raises:
        InputError: another value in the environment variable.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "native", "rounded"):
        raise InputError(VARIABLE, expected="auto, native or rounded", got=repr(wanted))
    return _multiplies_bf16() if wanted == "auto" else wanted == "native"


@functools.cache
def _multiplies_bf16() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return torch.backends.mkldnn.is_available() and multiplies_bf16(text)


def multiplies_bf16(cpuinfo: str) -> bool:
    """``fast_bf16`` of the processor that Linux describes so in /proc/cpuinfo."""
    fields = dict(re.findall(r"^(vendor_id|flags)\s*:\s*(.*)$", cpuinfo, re.M))
    flags = fields.get("flags", "").split()
    amd = fields.get("vendor_id", "").strip() == "AuthenticAMD"
    return "amx_bf16" in flags or (amd and "avx512_bf16" in flags)


class Precision:
    """Operand rounding and the matrix products of a program.

    Args:
        name: "fp32", "tf32", "bf16", or "auto" (bf16 on CUDA from Ampere on, fp32 elsewhere).
        device: where the program runs.
        native: whether a processor multiplies bfloat16 itself; default: ``fast_bf16()``.

    Attributes:
        narrow: operands are bfloat16 tensors.
        imitates: operands are float32 tensors rounded to what a GPU would multiply.
    """

    def __init__(
        self,
        name: str = "fp32",
        device: torch.device | str = "cpu",
        *,
        native: bool | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.name = resolve(name, self.device)
        self._cuda = self.device.type == "cuda"
        self.narrow = self.name == "bf16"
        if self.narrow and not self._cuda:
            self.narrow = fast_bf16() if native is None else native
        self.imitates = self.name != "fp32" and not self.narrow and not self._cuda

    def operand(self, x: Tensor) -> Tensor:
        """``x`` as products take it: itself in fp32; float64 is never rounded."""
        if x.dtype == torch.float64:
            return x
        if self.narrow:
            return memory.empty(x.shape, x, torch.bfloat16).copy_(x)
        if self.imitates:
            return round_bf16(x) if self.name == "bf16" else round_tf32(x)
        return x

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within it, CUDA float32 products run as this precision says (tensor cores or not)."""
        if not self._cuda:
            yield
            return
        settings = torch.backends.cuda.matmul
        # The name since torch 2.9, which warns about mixing it with the older one.
        new = hasattr(settings, "fp32_precision")
        name, on, off = ("fp32_precision", "tf32", "ieee") if new else ("allow_tf32", True, False)
        before = getattr(settings, name)
        setattr(settings, name, on if self.name == "tf32" else off)
        try:
            yield
        finally:
            setattr(settings, name, before)

    def matmul(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a @ b of operands [.., m, k] and [.., k, n], in float32 (or float64).

        a and b both 2-D or both 3-D; ``out`` receives the result if given.
        """
        if a.dim() == 3 and a.shape[0] == 1:
            return self.matmul(a[0], b[0], None if out is None else out[0]).unsqueeze(0)
        product: Callable[..., Tensor] = torch.mm if a.dim() == 2 else torch.bmm
        if a.dtype != torch.bfloat16:
            return product(a, b, out=out)
        if not _widening(self.device)[0]:
            shape = (*a.shape[:-1], b.shape[-1])
            out = memory.empty(shape, a, torch.float32) if out is None else out
            return out.copy_(product(a, b, out=memory.empty(shape, a)))
        if out is None:
            return product(a, b, out_dtype=torch.float32)
        return product(a, b, out_dtype=torch.float32, out=out)

    def accumulate(self, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """out += a @ b of operands, in place; shapes as in ``matmul``."""
        if a.dim() == 3 and a.shape[0] == 1:
            self.accumulate(out[0], a[0], b[0])
            return out
        add: Callable[..., Tensor] = torch.addmm if a.dim() == 2 else torch.baddbmm
        if a.dtype != torch.bfloat16:
            return add(out, a, b, out=out)
        if not _widening(self.device)[1]:
            return out.add_(self.matmul(a, b))
        return add(out, a, b, out_dtype=torch.float32, out=out)


@functools.cache
def _widening(device: torch.device) -> tuple[bool, bool]:
    """Whether this torch multiplies bfloat16 into float32 there, and adds such products to it.

    On CUDA the first works since torch 2.8 and the second since 2.10; before, a sum takes a pass
    of its own, or, before 2.8, products are rounded to bfloat16.
    """
    a = torch.ones((1, 16, 16), dtype=torch.bfloat16, device=device)
    out = torch.zeros((1, 16, 16), device=device)
    flat = out[0]
    wide: dict[str, Any] = {"out_dtype": torch.float32}

    def works(*products: Callable[[], Tensor], expected: float) -> bool:
        try:
            return all(bool((product() == expected).all()) for product in products)
        except (RuntimeError, TypeError, NotImplementedError):
            return False

    multiplies = works(
        lambda: torch.mm(a[0], a[0], **wide, out=flat),
        lambda: torch.bmm(a, a, **wide, out=out),
        expected=16,
    )
    adds = multiplies and works(
        lambda: torch.addmm(flat.fill_(3), a[0], a[0], **wide, out=flat),
        lambda: torch.baddbmm(out.fill_(3), a, a, **wide, out=out),
        expected=19,
    )
    return multiplies, adds
