"""Analyses of anchors and merges (section 3 of the paper), and the page that shows them."""

from fda_fast.report.landscape import Landscape, Plane, adaptation_loss, landscape
from fda_fast.report.projection import Projection, cone_projection, induced_updates
from fda_fast.report.representation import Bias, representation_bias
from fda_fast.report.spectrum import Spectrum, spectrum
from fda_fast.report.subspace import Overlap, subspace_overlap

__all__ = [
    "Bias",
    "Landscape",
    "Overlap",
    "Plane",
    "Projection",
    "Spectrum",
    "adaptation_loss",
    "cone_projection",
    "induced_updates",
    "landscape",
    "representation_bias",
    "spectrum",
    "subspace_overlap",
]
