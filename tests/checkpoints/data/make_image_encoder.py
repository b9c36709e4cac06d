"""Make image_encoder.pt.xz: what Task Arithmetic's code saves as zeroshot.pt, at toy size.

Run once, in an environment with open_clip_torch==2.0.2, torchvision and torch:

    python make_image_encoder.py

The encoder, its transforms and the way they are pickled are the real ones; only the weights are
made up, in coarse steps so that they compress. Beside it go the same object in the old format of
torch.save and as a plain pickle, and its state dict with an input and output of its second block.
"""

from __future__ import annotations

import io
import lzma
import pickle
import sys
import types
from pathlib import Path
from unittest.mock import patch

import open_clip
import torch
from open_clip.model import CLIP
from open_clip.transform import image_transform
from safetensors.torch import save

HERE = Path(__file__).parent
VISION = {"layers": 2, "width": 8, "head_width": 4, "image_size": 8, "patch_size": 4}
TEXT = {"context_length": 3, "vocab_size": 5, "width": 4, "heads": 1, "layers": 1}


class ImageEncoder(torch.nn.Module):
    """The attributes of the class of this name in src/modeling.py."""

    def __init__(self) -> None:
        super().__init__()
        self.model = CLIP(4, VISION, TEXT, quick_gelu=True)
        del self.model.transformer
        self.train_preprocess = image_transform(8, is_train=True)
        self.val_preprocess = image_transform(8, is_train=False)
        self.cache_dir = None


def main() -> None:
    for name in ("src", "src.modeling"):
        sys.modules[name] = types.ModuleType(name)
    ImageEncoder.__module__, sys.modules["src.modeling"].ImageEncoder = "src.modeling", ImageEncoder
    generator = torch.Generator().manual_seed(0)
    encoder = ImageEncoder().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            steps = torch.randint(-4, 5, parameter.shape, generator=generator)
            parameter.copy_(steps / 16)
    store("image_encoder.pt", saved(encoder))
    # The old format quotes the source of every class, which is not ours to copy.
    with patch("torch.serialization.get_source_lines_and_file", lambda kind: (["..."], 1, "x.py")):
        store("image_encoder_old.pt", saved(encoder, _use_new_zipfile_serialization=False))
    store("image_encoder.pkl", pickle.dumps(encoder))
    x = torch.randn(3, 2, 8, generator=generator)
    with torch.no_grad():
        y = encoder.model.visual.transformer.resblocks[1](x)
    tensors = {f"state_dict.{name}": t.clone() for name, t in encoder.state_dict().items()}
    store("image_encoder.safetensors", save(tensors | {"block.x": x, "block.y": y}))
    print("open_clip", open_clip.__file__, "torch", torch.__version__)


def saved(encoder: ImageEncoder, **options: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(encoder, stream, **options)
    return stream.getvalue()


def store(name: str, content: bytes) -> None:
    path = HERE / f"{name}.xz"
    path.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
    print(path.name, len(content), "->", path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
