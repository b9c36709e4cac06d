"""The vision suite: a mini ViT pretrained on Fashion-MNIST and an expert for each image task.

    python benchmarks/quality/vision.py            # train whatever is not stored yet

Training is seeded, and stored outside git task by task.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
from typing import Any

import images
import stored
import torch
from images import TASKS, Images, ImageTask
from suite import Grid, Suite, published
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

MODEL = {
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
PRETRAIN = {"epochs": 5, "batch": 128, "lr": 1e-3, "weight_decay": 0.05}
FINETUNE = {"epochs": 8, "batch": 64, "lr": 3e-4, "weight_decay": 0.01}
PROBE = {"steps": 300, "lr": 1e-2, "weight_decay": 1e-3}


class Encoder(nn.Module):
    """A ViT whose feature of an image is the last state of its class token: [N, d]."""

    def __init__(self, **model: Any) -> None:
        super().__init__()
        self.vit = ViTModel(ViTConfig(**model), add_pooling_layer=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x).last_hidden_state[:, 0]


class VisionSuite(Suite):
    """The mini ViT and its six experts."""

    name = "vision"
    tokens = 5
    grid = Grid(
        scalings=(0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4),
        wudi_rates=(1e-5, 1e-4),
        distances=("cosine",),
        weights=((1e-5, 1e-4), (5, 25)),
        coefficients=((1e-2,), (25, 100)),
        published=published("vit-b-32"),
    )

    def __init__(
        self,
        *,
        seed: int = 0,
        tasks: dict[str, ImageTask] | None = None,
        joint: bool = False,
        pretraining: Images | None = None,
        **changed: Any,
    ) -> None:
        """Trains, or loads, everything.

        Args:
            seed: of training.
            tasks, pretraining: for tests, in the place of the data.
            joint: train each head with its expert, from zero on, instead of fitting it to the
                pretrained features and freezing it.
            changed: for tests, settings.
        """
        model = {**MODEL, **changed.get("model", {})}
        pretrain = {**PRETRAIN, **changed.get("pretrain", {})}
        finetune = {**FINETUNE, **changed.get("finetune", {})}
        self.data = tasks or {name: images.load_task(name) for name in TASKS}
        self.where = stored.folder("vision")
        if joint:
            self.name = "vision-joint"
            # Heads of other features take longer ways.
            self.grid = dataclasses.replace(self.grid, weights=((1e-4, 3e-4, 1e-3), (25, 100)))
        torch.manual_seed(seed)
        base = Encoder(**model)
        settings = {"model": model, "pretrain": pretrain, "seed": seed}
        settings["data"] = "given" if tasks else images.PRETRAINING

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            start = time.perf_counter()
            data = pretraining or images.pretraining_images()
            head = nn.Linear(model["hidden_size"], int(data.y.max()) + 1)
            fit(base, head, data, pretrain, seed, [*base.parameters(), *head.parameters()])
            return base.state_dict(), {"seconds": round(time.perf_counter() - start, 1)}

        weights, record = stored.tensors(self.where, "pretrained", settings, make)
        base.load_state_dict(weights)
        self.pretrained = base.eval().requires_grad_(False)
        self.heads: dict[str, nn.Linear] = {}
        self.experts = {}
        self.record = {"pretrained": record, "experts": {}}
        for task in self.data:
            more = {"finetune": finetune, "probe": PROBE, "task": task}
            more |= {"heads": "joint"} if joint else {}
            self._expert(task, {**settings, **more})
        self.record["relative_change"] = self.relative_change()

    def _expert(self, task: str, settings: dict[str, Any]) -> None:
        expert = copy.deepcopy(self.pretrained)
        head = nn.Linear(settings["model"]["hidden_size"], self.data[task].classes)

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            start = time.perf_counter()
            data = self.data[task].train
            trained = [*self.layers(expert).requires_grad_(True).parameters()]
            if "heads" in settings:
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
                trained += head.parameters()
            else:
                probe(head, features(self.pretrained, data.x), data.y)
            fit(expert, head, data, settings["finetune"], settings["seed"], trained)
            weights = {**expert.state_dict(), **head.state_dict(prefix="head.")}
            return weights, {"seconds": round(time.perf_counter() - start, 1)}

        weights, record = stored.tensors(self.where, f"expert-{task}", settings, make)
        head.load_state_dict({k: weights.pop(f"head.{k}") for k in ("weight", "bias")})
        expert.load_state_dict(weights)
        self.heads[task] = head.requires_grad_(False)
        self.experts[task] = expert.eval().requires_grad_(False)
        self.record["experts"][task] = record

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer

    def right(self, model: nn.Module, task: str, split: str) -> Tensor:
        data: Images = getattr(self.data[task], split)
        return self.heads[task](features(model, data.x)).argmax(-1) == data.y

    def count(self, task: str, split: str) -> int:
        return len(getattr(self.data[task], split))

    def run_training_inputs(self, model: nn.Module, task: str, count: int) -> None:
        features(model, self.data[task].train.x[:count])


@torch.no_grad()
def features(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model.eval()(part) for part in x.split(256)])


def probe(head: nn.Linear, x: Tensor, y: Tensor) -> None:
    """Fits a linear head to fixed features."""
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=PROBE["lr"], weight_decay=PROBE["weight_decay"]
    )
    for _ in range(PROBE["steps"]):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x), y).backward()
        optimizer.step()


def fit(
    model: nn.Module,
    head: nn.Linear,
    data: Images,
    settings: dict[str, Any],
    seed: int,
    trained: list[nn.Parameter],
) -> None:
    """AdamW on cross-entropy; the rate warms up over a tenth of the steps, then falls to zero."""
    generator = torch.Generator().manual_seed(seed)
    steps = settings["epochs"] * math.ceil(len(data) / settings["batch"])
    optimizer = torch.optim.AdamW(trained, lr=settings["lr"], weight_decay=settings["weight_decay"])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / (0.1 * steps), (steps - s) / (0.9 * steps))
    )
    model.train()
    for _ in range(settings["epochs"]):
        for rows in torch.randperm(len(data), generator=generator).split(settings["batch"]):
            loss = nn.functional.cross_entropy(head(model(data.x[rows])), data.y[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of training")
    VisionSuite(seed=parser.parse_args().seed).print_summary()


if __name__ == "__main__":
    main()
