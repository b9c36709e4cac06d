"""The example in docs/report.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

GUIDE = Path(__file__).parents[2] / "docs" / "report.md"


def test_the_example_runs() -> None:
    found = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    assert found is not None
    torch.manual_seed(0)
    base, expert, merged = (nn.Linear(10, 6) for _ in range(3))
    weights = {
        name: {key: value.detach() for key, value in layer.named_parameters()}
        for name, layer in (("pretrained", base), ("start", expert), ("merged", merged))
    }
    names: dict[str, Any] = {
        "anchors": torch.randn(40, 10),
        "activations": torch.randn(64, 10),
        "pretrained_layer": base,
        "finetuned_layer": expert,
        "layer": base,
        **weights,
    }
    exec(compile(found[1], str(GUIDE), "exec"), names)
