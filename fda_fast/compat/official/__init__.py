"""The published scripts' commands, folders and files, run by this package's engine.

``python -m fda_fast.compat.official vision construct ...`` takes the flags of
``python construct_fda.py ...`` and writes the same files; ``optimise`` takes the place of the
optimisation loop inside that script. ``docs/official.md`` lists every difference.
"""

from fda_fast.compat.official.optimise import Optimised, optimise

__all__ = ["Optimised", "optimise"]
