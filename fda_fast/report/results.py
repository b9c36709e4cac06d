"""What the analyses of a merge found."""

from __future__ import annotations

from dataclasses import dataclass, field

from fda_fast.report.landscape import Landscape
from fda_fast.report.representation import Bias
from fda_fast.report.spectrum import Spectrum
from fda_fast.report.subspace import Overlap


@dataclass
class TaskAnalysis:
    """What is known of one (layer, task).

    Attributes:
        spectra: spectrum of the anchors by step.
        drift: largest difference of the repeated construction's last anchors from the kept ones,
            relative to the kept ones' largest value; 0 if they agree bit for bit, None if none
            were kept.
        elsewhere: in what the machine of the kept ones differs from this one; empty if in nothing.
        overlaps: with the real activations, by step, at a fifth of the width.
        overlap_by_rank: of the last step's anchors, and of the first step's, at many ranks.
        overlap_of_data: of one half of the real activations with the other: what could be reached.
        energy: share of the anchors' update in the cone of real updates, by step.
        reverse: share of the real update in the cone of the anchors' updates, at the first and the
            last step.
        reference: share of the task vector in the cone of real updates.
    """

    spectra: dict[int, Spectrum] = field(default_factory=dict)
    drift: float | None = None
    elsewhere: list[str] = field(default_factory=list)
    overlaps: dict[int, Overlap] = field(default_factory=dict)
    overlap_by_rank: tuple[Overlap, Overlap] | None = None
    overlap_of_data: Overlap | None = None
    energy: dict[int, float] = field(default_factory=dict)
    reverse: dict[int, float] = field(default_factory=dict)
    reference: float | None = None


@dataclass
class LayerAnalysis:
    """What is known of one layer.

    Attributes:
        layer: its name.
        tasks: by task name; experts that leave the layer as it is are missing.
        on_anchors: the adaptation loss around the pretrained and the merged layer.
        on_activations: the same loss on real activations.
    """

    layer: str
    tasks: dict[str, TaskAnalysis] = field(default_factory=dict)
    on_anchors: Landscape | None = None
    on_activations: Landscape | None = None


@dataclass
class Analyses:
    """All analyses of a run.

    Attributes:
        layers: of the layers looked at.
        bias: {model: {task: [bias of every layer]}}, distance from the expert's features.
        bias_layers: names of these layers.
        missing: what could not be done, and how to get it.
    """

    layers: list[LayerAnalysis] = field(default_factory=list)
    bias: dict[str, dict[str, list[Bias]]] = field(default_factory=dict)
    bias_layers: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
