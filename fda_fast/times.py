"""How long a merge took, and on which machine: the one file in which two runs of it differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIMES = "fda_times.json"
PHASES = ("read", "construct", "start", "adapt", "save")
"""Of a layer, in order; reading and saving go on beside the others."""


@dataclass(frozen=True)
class Times:
    """Seconds of a merge.

    Attributes:
        layers: {layer: {phase: seconds}}, of whichever run finished the layer.
        write: of writing the model.
        machine: where, as ``machine.here`` has it.
    """

    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    write: float = 0.0
    machine: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write ``fda_times.json``, to the millisecond."""
        layers = {
            name: {phase: round(value, 3) for phase, value in seconds.items()}
            for name, seconds in self.layers.items()
            if seconds
        }
        record = {"layers": layers, "write": round(self.write, 3), "machine": dict(self.machine)}
        (folder / TIMES).write_text(json.dumps(record, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Times:
        """What ``save`` wrote; without the file, nothing.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: a damaged file.
        """
        path = folder / TIMES
        if not path.is_file():
            return cls()
        content = json.loads(path.read_text())
        layers = {
            str(name): {str(phase): float(value) for phase, value in seconds.items()}
            for name, seconds in content["layers"].items()
        }
        return cls(layers, float(content["write"]), dict(content["machine"]))

    @property
    def phases(self) -> dict[str, float]:
        """Seconds by phase over all layers, in order, and "write"."""
        there = {phase for seconds in self.layers.values() for phase in seconds}
        known = [phase for phase in PHASES if phase in there]
        found = {
            phase: sum(seconds.get(phase, 0.0) for seconds in self.layers.values())
            for phase in (*known, *sorted(there - set(PHASES)))
        }
        return found | {"write": self.write}
