"""What every quality suite offers: a pretrained encoder, one expert a task, held-out scores."""

from __future__ import annotations

import copy
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fda_fast.presets import STARTS, get_preset

Scores = dict[str, float]
LayerWeights = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Grid:
    """Settings to choose from on the validation split, and the published ones of adaptation.

    Attributes:
        scalings: factors of a starting point's merged task vector.
        wudi_rates: of WUDI's descent.
        distances: of layer outputs.
        weights: (rates, epochs) from the pretrained model, all weights free (Eq. 5).
        coefficients: (rates, epochs) from a merged model, coefficients free (Eq. 6).
        published: start -> the paper's settings for this kind of model.
    """

    scalings: tuple[float, ...]
    wudi_rates: tuple[float, ...]
    distances: tuple[str, ...]
    weights: tuple[tuple[float, ...], tuple[int, ...]]
    coefficients: tuple[tuple[float, ...], tuple[int, ...]]
    published: Mapping[str, Mapping[str, Any]]


def published(preset: str) -> dict[str, dict[str, Any]]:
    """The paper's adaptation settings (appendix C.3), by start."""
    found = {}
    for start in STARTS:
        settings = get_preset(preset).adapt(start)
        found[start] = {
            "distance": settings.distance,
            "lr": settings.lr,
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
        }
        if start != "pretrained":
            found[start]["scaling"] = get_preset(preset).start(start).scaling
    return found


class Suite(ABC):
    """A pretrained encoder and full fine-tunes of its layers, one for each task.

    Only the repeated layers are fine-tuned: embeddings, the last normalisation and the task's
    linear head are common to the pretrained model and the experts. The head is fitted to the
    pretrained features and frozen before fine-tuning, as CLIP's text heads are in the paper.

    Attributes:
        name: of the suite.
        anchors, tokens: the suite's number of anchors a task, and of tokens an anchor.
        steps: of construction.
        grid: what adaptation's settings are chosen from, see ``Grid``.
        pretrained: the encoder.
        experts: task -> fine-tuned encoder.
        record: what was trained and how, for the result file.
    """

    name: str
    anchors: int = 64
    tokens: int
    steps: int = 1200
    grid: Grid
    pretrained: nn.Module
    experts: dict[str, nn.Module]
    record: dict[str, Any]

    @abstractmethod
    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The repeated layers of a model of this suite."""

    @abstractmethod
    def right(self, model: nn.Module, task: str, split: str) -> Tensor:
        """Which examples of a split ("validation" or "test") the task's head gets right: [N]."""

    @abstractmethod
    def count(self, task: str, split: str) -> int:
        """Number of examples in a split."""

    @abstractmethod
    def run_training_inputs(self, model: nn.Module, task: str, count: int) -> None:
        """Forward pass over ``count`` training inputs of a task, for hooks to see."""

    @property
    def tasks(self) -> list[str]:
        return list(self.experts)

    @property
    def depth(self) -> int:
        return len(self.layers(self.pretrained))

    def experts_at(self, index: int) -> list[nn.Module]:
        """Layer ``index`` of every expert."""
        return [self.layers(expert)[index] for expert in self.experts.values()]

    def assemble(self, layers: LayerWeights) -> nn.Module:
        """The pretrained encoder with these weights in its layers."""
        model = copy.deepcopy(self.pretrained)
        for layer, weights in zip(self.layers(model), layers, strict=True):
            layer.load_state_dict(dict(weights), strict=True)
        return model.eval()

    def accuracy(self, model: nn.Module, task: str, split: str) -> float:
        """Share of a split that is right."""
        return self.right(model, task, split).float().mean().item()

    def score(self, model: nn.Module, split: str) -> Scores:
        """Accuracy on every task."""
        return {task: self.accuracy(model, task, split) for task in self.tasks}

    def score_experts(self, split: str) -> Scores:
        """Every expert on its own task."""
        return {t: self.accuracy(expert, t, split) for t, expert in self.experts.items()}

    def outcomes(self, models: Mapping[str, nn.Module], split: str) -> dict[str, Any]:
        """ "scores", and example by example what was "right", of one model a task."""
        right = {task: self.right(model, task, split) for task, model in models.items()}
        return {
            "scores": {task: found.float().mean().item() for task, found in right.items()},
            "right": {task: pack(found) for task, found in right.items()},
        }

    def relative_change(self) -> dict[str, float]:
        """|task vector| / |pretrained layers| of every task."""
        base = dict(self.layers(self.pretrained).named_parameters())
        norm = sum(float(p.detach().double().square().sum()) for p in base.values()) ** 0.5
        found = {}
        for task, expert in self.experts.items():
            moved = self.layers(expert).named_parameters()
            square = sum(float((p - base[n]).detach().double().square().sum()) for n, p in moved)
            found[task] = round(square**0.5 / norm, 4)
        return found

    def print_summary(self) -> None:
        """One line a task: test accuracy before and after fine-tuning, and how far it went."""
        before, after = self.score(self.pretrained, "test"), self.score_experts("test")
        for task in self.tasks:
            print(
                f"{task:10} pretrained {100 * before[task]:5.1f}  expert {100 * after[task]:5.1f}  "
                f"|tau|/|theta| {self.record['relative_change'][task]:.3f}  "
                f"{self.record['experts'][task]['seconds']:.0f} s"
            )

    @torch.no_grad()
    def real_inputs(self, task: str, index: int, count: int, seed: int = 0) -> Tensor:
        """Real inputs [count, tokens, d] of layer ``index`` of the task's expert.

        ``tokens`` positions of every input are drawn at random if it has more.
        """
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        expert = self.experts[task]
        hook = self.layers(expert)[index].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self.run_training_inputs(expert, task, count)
        finally:
            hook.remove()
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for batch in seen:
            for one in batch.detach():
                chosen = torch.randperm(len(one), generator=generator)[: self.tokens]
                rows.append(one[chosen])
        return torch.stack(rows[:count]).clone()


def pack(right: Tensor) -> str:
    """Booleans [N] as hexadecimal digits; ``tables.unpack`` is the way back."""
    return np.packbits(right.cpu().numpy()).tobytes().hex()


def mean(scores: Scores) -> float:
    """Average over tasks, in per cent."""
    return 100 * statistics.fmean(scores.values())
