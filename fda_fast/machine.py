"""What the last bits of a result depend on beside the job: the machine, its threads, its libraries.

A matrix product sums in another order on another processor, on another number of threads or by
another library, and an optimisation carries such a difference on: after a hundred steps anchors
can differ by some per cent, at the same loss. The same machine and the same number of threads
give the same bits.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fda_fast.ops import dispatch


def here(device: torch.device) -> dict[str, Any]:
    """This machine, as results record it: JSON values.

    Args:
        device: where layers are computed.

    Returns:
        {"device": the name of the processor or the GPU, "torch": version, "backends": of the fused
        operations, "threads": of a processor}.
    """
    found: dict[str, Any] = {"torch": torch.__version__, "backends": backends()}
    if device.type == "cuda":
        return found | {"device": torch.cuda.get_device_name(device)}
    name = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return found | {"device": name, "threads": torch.get_num_threads()}


def processor() -> str:
    """The processor's own name, such as "AMD EPYC 7763 64-Core Processor"."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return found[1].strip() if found else platform.processor() or platform.machine()


def backends() -> str:
    """What can compute here: implementations agree to rounding, not to the last bit."""
    found = [name for name, reason in dispatch.available().items() if not reason]
    wanted = os.environ.get("FDA_FAST_BACKEND", "auto")
    return f"{wanted} of {', '.join(sorted(found))}"


@contextmanager
def as_recorded(record: Mapping[str, Any]) -> Iterator[None]:
    """Within, torch computes on as many threads as a record says, where there are as many cores."""
    before, wanted = torch.get_num_threads(), record.get("threads", 0)
    cores = os.cpu_count() or 1
    if not 0 < wanted <= max(cores, before):
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def differences(record: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two records differ: "threads 8, here 2"."""
    keys = dict.fromkeys([*record, *now])
    return [
        f"{key} {record.get(key, 'unknown')}, here {now.get(key, 'none')}"
        for key in keys
        if record.get(key) != now.get(key)
    ]
