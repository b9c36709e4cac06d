"""A loss curve, short enough to keep beside what it led to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

POINTS = 100
DIGITS = 6


@dataclass(frozen=True)
class Curve:
    """Losses at some of the steps of an optimisation.

    Attributes:
        steps: their numbers, from 1, rising; the first and the last step are among them.
        losses: the loss evaluated in each of these steps.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]

    @classmethod
    def of(cls, losses: Sequence[float], points: int = POINTS) -> Curve:
        """The curve of all losses, thinned evenly.

        Args:
            losses: of step 1, 2, 3, ...; at least one.
            points: how many to keep at most, 2 or more.

        Returns:
            The losses themselves, not means, rounded to six digits.
        """
        last = len(losses) - 1
        kept = min(points, len(losses))
        indices = [round(i * last / max(1, kept - 1)) for i in range(kept)]
        return cls(tuple(i + 1 for i in indices), tuple(rounded(losses[i]) for i in indices))

    def as_record(self) -> dict[str, list[Any]]:
        """JSON values; ``from_record`` reads them."""
        return {"steps": list(self.steps), "losses": list(self.losses)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Curve:
        """What ``as_record`` gave."""
        return cls(tuple(map(int, record["steps"])), tuple(map(float, record["losses"])))


def rounded(loss: float) -> float:
    """``loss`` to six significant digits: more is noise of float32."""
    return float(f"{loss:.{DIGITS}g}")
