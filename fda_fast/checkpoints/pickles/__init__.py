"""Pickled checkpoints read as data: nothing in them is imported, called or run.

``load_pickle`` gives the object of any file that ``torch.save`` or ``pickle.dump`` wrote,
``read_npy`` that of ``np.save``. See ``values`` for what modules, tensors and functions become.
"""

from fda_fast.checkpoints.pickles.arrays import PickledArray
from fda_fast.checkpoints.pickles.load import load_pickle, refusal
from fda_fast.checkpoints.pickles.npy import read_npy
from fda_fast.checkpoints.pickles.values import PickledTensor, Record, Reference

__all__ = [
    "PickledArray",
    "PickledTensor",
    "Record",
    "Reference",
    "load_pickle",
    "read_npy",
    "refusal",
]
