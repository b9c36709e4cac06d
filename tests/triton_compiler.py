"""Run launchers with a compiler in place of a card: what each kernel would need on one.

Not a test file: test_compile_triton.py runs it in a process of its own,

    python tests/triton_compiler.py ARCH [STEM ...]

because the interpreter must be off (TRITON_INTERPRET unset) when the kernels are imported, and the
main test process may have it on. Tensors are on the meta device, so shapes are the real ones and
no memory is used. The launchers themselves run: what is compiled is what would be launched.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class _Compiler:
    """The part of a Triton driver that compiling touches."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_launches(arch: int, cases) -> list[dict]:
    """Call every case; compile whatever it launches for ``arch``; one resource report per kernel.

    Args:
        arch: 80, 90 or 100.
        cases: pairs (label, function without arguments that calls launchers on meta tensors).

    Returns:
        Dictionaries of case, kernel, options, registers, stack (bytes; spills live there), shared.
    """
    from fda_fast.kernels import launch

    driver.set_active(_Compiler(arch))
    launch.architecture = lambda tensor: arch
    compiled: dict[tuple[str, str], tuple] = {}
    label = ""
    original = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault((kernel.metadata.name, kernel.hash), (label, kernel))
        return kernel

    JITFunction.run = run
    try:
        for label, call in cases:  # noqa: B007 (read by run)
            call()
    finally:
        JITFunction.run = original
    return [_report(case, name, kernel) for (name, _), (case, kernel) in compiled.items()]


def _report(case: str, name: str, kernel) -> dict:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "case": case,
        "kernel": name,
        "num_warps": kernel.metadata.num_warps,
        "num_stages": kernel.metadata.num_stages,
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared": kernel.metadata.shared,
        "tensor_cores": "mma" in kernel.asm["ptx"],
    }


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _activation(dtype):
    from fda_fast.kernels import activation

    x = _meta(8, 3200, 3072, dtype=dtype)
    for kind in ("gelu", "gelu_tanh", "quick_gelu", "relu"):
        activation.forward(kind, x, x)
        activation.backward(kind, x, x)
        activation.reverse(kind, x, x, x, x, x, x, True)
    activation.forward("gelu", x, None)
    activation.adjoint("gelu", x, x, x)
    activation.reverse("gelu", x, None, x, None, x, x, False)


def _gated(dtype):
    from fda_fast.kernels import gated

    x, y = _meta(1, 8192, 2 * 13824, dtype=dtype), _meta(1, 8192, 13824, dtype=dtype)
    for kind in ("silu", "gelu"):
        gated.forward(kind, x, x)
        gated.backward(kind, x, y)
        gated.tangent(kind, x, x)
        gated.reverse(kind, x, x, y, x, y, y, True)
    gated.adjoint("silu", x, x, y)


def _norm(dtype):
    from fda_fast.kernels import norm

    def sweeps(kind, tasks, rows, width, biased):
        x = _meta(tasks, rows, width, dtype=dtype)
        w, c = _meta(width, dtype=dtype), _meta(width, dtype=dtype) if biased else None
        m = _meta(tasks, width, dtype=dtype)
        mc = m if biased else None
        norm.forward(kind, x, x, w, c, m, mc, 1e-5)
        norm.backward(kind, x, x, w, 1e-5, True, True, biased)
        norm.tangent(kind, x, x, w, m, mc, 1e-5)
        norm.reverse(kind, x, x, x, x, x, x, w, m, m, 1e-5, True)
        norm.adjoint(kind, x, x, x, w, m, 1e-5, True, True, biased)

    for width in (768, 1280):
        sweeps("layer", 8, 3200, width, True)
    for width in (4096, 8192):
        sweeps("rms", 1, 8192, width, False)
    x = _meta(8, 320, 768, dtype=dtype)
    # The first norm of a block: nothing differs yet.
    norm.forward("layer", x, None, x[0, 0], x[0, 0], None, None, 1e-5)
    norm.reverse("layer", x, None, x, None, x, x, x[0, 0], x[0, :8], x[0, :8], 1e-5, False)


def _similarity(dtype):
    from fda_fast.kernels import similarity

    for shape in ((1, 8192, 5120), (8, 64, 50 * 768), (1, 64, 257 * 1024)):
        y = _meta(*shape, dtype=dtype)
        for kind in ("cosine", "l2", "l1"):
            similarity.forward(kind, y, y, 1.0)
            similarity.reverse(kind, y, y, y, 1.0)


def _alignment(dtype):
    from fda_fast.kernels import alignment

    for widths in ((13824, 13824), (768, 768, 768)):
        g = _meta(1, 3200, sum(widths), dtype=dtype)
        c = _meta(1, len(widths))
        row = _meta(1, sum(widths))
        alignment.dots(g, g, g, widths)
        alignment.mix(c, g, c, g, widths, row)
        alignment.mix(c, g, c, g, widths, None)
    p = _meta(8, 16)
    alignment.coefficients(_meta(2, 8, 16), p, _meta(16, dtype=torch.bool), 1e-8)


class _Named:
    def __init__(self, name):
        self.name = name


def _attention(dtype):
    from fda_fast.kernels import attention
    from fda_fast.ops.attention import Heads

    def sweeps(heads, tokens, precision, rope=None, needs_b=True):
        x = _meta(512, tokens, heads.packed, dtype=dtype)
        y = _meta(512, tokens, heads.query * heads.size, dtype=dtype)
        _, _, later = attention.forward(x, x, heads, rope=rope, precision=_Named(precision))
        later.backward(y)
        later.tangent(x)
        later.reverse(y, y, needs_b)
        later.adjoint(y)

    # Every entry of launch.attention: one block, several, 32 and 64 rows, both kinds of products.
    base = Heads(12, 12, 64, 0.125)
    sweeps(base, 50, "tf32")
    if dtype == torch.float32:
        sweeps(base, 5, "tf32")
        sweeps(base, 5, "fp32")
        sweeps(base, 50, "fp32")
        table = _meta(128, 128)
        llama = Heads(40, 8, 128, 0.09, causal=True)
        sweeps(llama, 128, "tf32", (table, table), needs_b=False)


def _adamw(dtype):
    from fda_fast.kernels import adamw

    x, loss = _meta(8, 320, 768), _meta(8)
    step = _meta(1, dtype=torch.int64)
    for number, history in ((3, None), (step, _meta(1200, 8))):
        adamw.step_(x, x, x, x, number, loss, loss, x, 1e-2, (0.9, 0.999), 1e-8, 1e-2, history)


def _coefficients(dtype):
    from fda_fast.kernels import coefficients

    alpha, delta = _meta(8, 768, 768), _meta(768, 768)
    for step in (3, _meta(1, dtype=torch.int64)):
        coefficients.update_(
            alpha, alpha, delta, delta, delta, delta, step, 1e-3, (0.9, 0.999), 1e-8
        )


CASES = {
    "activation": _activation,
    "gated": _gated,
    "norm": _norm,
    "similarity": _similarity,
    "alignment": _alignment,
    "attention": _attention,
    "adamw": _adamw,
    "coefficients": _coefficients,
}
# Optimiser state is always float32.
FLOAT32_ONLY = {"adamw", "coefficients"}


def main(arguments: list[str]) -> None:
    """Print the reports of the named stems (all by default) for one architecture as JSON."""
    arch, stems = int(arguments[0]), arguments[1:] or [*CASES]
    cases = []
    for stem in stems:
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.float32 or stem not in FLOAT32_ONLY:
                name = str(dtype).removeprefix("torch.")
                cases.append((f"{stem} {name}", lambda s=stem, d=dtype: CASES[s](d)))
    print(json.dumps(compile_launches(arch, cases)))


if __name__ == "__main__":
    main(sys.argv[1:])
