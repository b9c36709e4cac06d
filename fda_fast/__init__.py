"""Merge fine-tuned models through Functional Dual Anchors (arXiv 2510.21223).

``merge`` does the whole job on checkpoints; ``init_anchors``, ``construct``, ``alignment`` and
``adapt`` do its parts on single layers.
"""

# Bound eagerly: merge, construct and adapt are functions here and modules below, and whoever is
# bound last wins. None of these imports loads triton, the binary or transformers.
from fda_fast.activations import collect_activations, save_activations
from fda_fast.adapt import Adaptation, adapt
from fda_fast.anchors import Anchors, init_anchors
from fda_fast.construct import Alignment, Construction, alignment, construct
from fda_fast.errors import InputError
from fda_fast.matching import gradient_alignment, gradient_matching
from fda_fast.merge import Report, merge
from fda_fast.publish import push_to_hub
from fda_fast.scale import ScaleChoice, choose_scale
from fda_fast.task_vector import TaskVector
from fda_fast.version import __version__

__all__ = [
    "Adaptation",
    "Alignment",
    "Anchors",
    "Construction",
    "InputError",
    "Report",
    "ScaleChoice",
    "TaskVector",
    "__version__",
    "adapt",
    "alignment",
    "choose_scale",
    "collect_activations",
    "construct",
    "gradient_alignment",
    "gradient_matching",
    "init_anchors",
    "merge",
    "push_to_hub",
    "save_activations",
]
