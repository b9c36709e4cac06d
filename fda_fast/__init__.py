"""Merge fine-tuned models through Functional Dual Anchors (arXiv 2510.21223).

``merge`` does the whole job on checkpoints; ``init_anchors``, ``construct``, ``alignment`` and
``adapt`` do its parts on single layers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fda_fast.adapt import Adaptation, adapt
    from fda_fast.anchors import Anchors, init_anchors
    from fda_fast.construct import Alignment, Construction, alignment, construct
    from fda_fast.errors import InputError
    from fda_fast.merge import Report, merge

__version__ = "0.1.0"

__all__ = [
    "Adaptation",
    "Alignment",
    "Anchors",
    "Construction",
    "InputError",
    "Report",
    "adapt",
    "alignment",
    "construct",
    "init_anchors",
    "merge",
]

# Loaded at first use: `import fda_fast` stays fast and loads neither triton nor the binary.
_HOME = {
    "Adaptation": "adapt",
    "Alignment": "construct",
    "Anchors": "anchors",
    "Construction": "construct",
    "InputError": "errors",
    "Report": "merge",
    "adapt": "adapt",
    "alignment": "construct",
    "construct": "construct",
    "init_anchors": "anchors",
    "merge": "merge",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fda_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fda_fast.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
