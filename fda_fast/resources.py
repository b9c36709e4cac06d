"""Where a merge runs and how much it may take there; nothing of it changes the result."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec

from fda_fast.budget import parse_bytes
from fda_fast.errors import InputError


@dataclass(frozen=True)
class Shard:
    """One of several parts of a merge, done by one of several processes.

    Attributes:
        number: from 1.
        of: how many parts.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "2/8".

        Raises:
            InputError: not two numbers, or not 1 <= number <= of.
        """
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        number, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= number <= of:
            raise InputError(
                "shard", expected='i/n with i from 1 to n, such as "2/8"', got=repr(text)
            )
        return cls(number, of)

    def takes(self, index: int) -> bool:
        """Whether layer number ``index`` is of this part."""
        return index % self.of == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class Resources:
    """Where a merge runs and how much it may take.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:N"; several, separated by commas, share the layers in
            a process each.
        max_memory: most bytes of the host's memory per process.
        max_gpu_memory: most bytes of the device's.
        shard: only this part of the layers, and nothing is written but the work directory.
        assemble: only write the model: all layers must be finished.
        ray: address of a Ray cluster to share the layers with; "local" starts one here.
    """

    device: str = "auto"
    max_memory: int | None = None
    max_gpu_memory: int | None = None
    shard: Shard | None = None
    assemble: bool = False
    ray: str | None = None

    @classmethod
    def of(
        cls,
        device: str = "auto",
        *,
        max_memory: str | int | None = None,
        max_gpu_memory: str | int | None = None,
        shard: str | None = None,
        assemble: bool = False,
        ray: str | None = None,
    ) -> Resources:
        """From what a user writes.

        Raises:
            InputError: a size or shard that is none; ways of sharing work that exclude each other;
                Ray where it is not installed.
        """
        wanted = {
            "shard": shard is not None,
            "assemble": assemble,
            "ray": ray is not None,
            "several devices": len(device_list(device)) > 1,
        }
        chosen = [name for name, given in wanted.items() if given]
        if len(chosen) > 1:
            raise InputError(f"{' and '.join(chosen)} cannot be combined", fix="Choose one.")
        if ray is not None and find_spec("ray") is None:
            raise InputError(
                "ray is not installed", fix="pip install 'fda-fast[ray]', or merge without --ray."
            )
        return cls(
            device,
            parse_bytes(max_memory, "max_memory"),
            parse_bytes(max_gpu_memory, "max_gpu_memory"),
            None if shard is None else Shard.parse(shard),
            assemble,
            ray,
        )


def device_list(device: str) -> list[str]:
    """The devices of "cuda:0,cuda:1"."""
    return [name.strip() for name in device.split(",") if name.strip()]
