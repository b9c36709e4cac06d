"""Models of timm and open_clip merged in memory, where these libraries are installed."""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from fda_fast.memory_merge import merge_in_memory

SMALL: dict[str, Any] = {"anchors": 4, "tokens": 5, "steps": 4, "epochs": 3}
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}
IMAGE = torch.zeros(1, 3, 32, 32)

pytestmark = pytest.mark.filterwarnings("ignore")  # of their imports


def needs(*libraries: str) -> Any:
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


def moved(model: nn.Module) -> nn.Module:
    expert = deepcopy(model)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return expert


@needs("timm", "torchvision")
@pytest.mark.parametrize("start", ["pretrained", "task_arithmetic"])
def test_timm(start: str) -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    pretrained = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=32, depth=3, num_heads=4, num_classes=7
    )
    experts = {"one": moved(pretrained), "two": moved(pretrained)}
    done = merge_in_memory(pretrained, experts, start=start, **SMALL, **QUIET)
    assert [layer.layer for layer in done.layers] == ["blocks.0", "blocks.1", "blocks.2"]
    assert isinstance(done.model, VisionTransformer)
    assert done.model(IMAGE).shape == (1, 7)


@needs("open_clip", "torchvision")
def test_open_clip() -> None:
    """The image encoder is what its fine-tunes change; the text layers stay, bit for bit."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 16, "image_size": 32}
    text = {"layers": 2, "width": 32, "heads": 4, "vocab_size": 40, "context_length": 6}
    pretrained = CLIP(16, vision, text)
    expert = deepcopy(pretrained)
    expert.visual = moved(pretrained.visual)
    done = merge_in_memory(pretrained, {"one": expert}, **SMALL, **QUIET)
    merged: Any = done.model
    assert [layer.layer for layer in done.layers] == [
        *(f"visual.transformer.resblocks.{i}" for i in range(2)),
        *(f"transformer.resblocks.{i}" for i in range(2)),
    ]
    ours, base = merged.state_dict(), pretrained.state_dict()
    changed = {name for name, tensor in base.items() if not torch.equal(ours[name], tensor)}
    assert changed and all(name.startswith("visual.transformer.resblocks") for name in changed)
    assert merged.encode_image(IMAGE).shape == (1, 16)
    assert any("attn_mask" in note for note in done.notes)
    alone = merge_in_memory(pretrained.visual, {"one": expert.visual}, **SMALL, **QUIET)
    assert len(alone.layers) == 2 and not alone.notes
