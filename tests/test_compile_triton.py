"""Every Triton kernel, with every launch that ships, compiled for three cards without one."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

ARCHS = (80, 90, 100)
SCRIPT = Path(__file__).with_name("triton_compiler.py")
# Attention takes as long as everything else together.
PARTS = (
    ("attention",),
    ("activation", "gated", "norm", "similarity", "alignment", "adamw", "coefficients"),
)
KERNELS = Path(__file__).parents[1] / "kernels"
# Largest shared memory of one block, bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Blocks were chosen to need no stack with Triton 3.6. The register allocation of any other release
# is its own: a register or two on the stack costs nothing, an unrolled loop's operands cost
# hundreds of bytes.
STACK_LIMIT = 0 if version("triton").startswith("3.6.") else 32


def compile_part(job):
    arch, stems = job
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # As Triton's default, said aloud: 3.9 warns when it is left open.
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(arch), *stems],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, f"sm_{arch} {stems}:\n{done.stderr[-4000:]}"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def reports():
    """{arch: resource reports}, from two compiling processes at a time."""
    jobs = [(arch, part) for part in PARTS for arch in ARCHS]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(compile_part, jobs))
    return {
        arch: [row for job, rows in zip(jobs, found, strict=True) if job[0] == arch for row in rows]
        for arch in ARCHS
    }


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_and_shared_memory_fits(arch, reports):
    """Spilled registers live on the stack; nothing else here needs one."""
    for row in reports[arch]:
        assert row["stack"] <= STACK_LIMIT, row
        assert row["shared"] <= SHARED_LIMIT[arch], row
        # A multiprocessor has 65536 registers: more, and the kernel cannot start.
        assert row["registers"] * row["num_warps"] * 32 <= 65536, row


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_is_compiled(arch, reports):
    declared = {
        line.split("(")[0].removeprefix("def ")
        for path in KERNELS.glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
    }
    assert declared == {row["kernel"] for row in reports[arch]}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_uses_tensor_cores_unless_told_not_to(arch, reports):
    rows = [r for r in reports[arch] if "attention" in r["kernel"] and "rotate" not in r["kernel"]]
    assert {row["tensor_cores"] for row in rows} == {True, False}
    assert all(row["tensor_cores"] for row in rows if row["case"] == "attention bfloat16")
