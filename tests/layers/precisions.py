"""Every way in which a CPU computes products; bf16 both ways, whatever the machine would choose."""

from fda_fast.layers.precision import Precision

PRECISIONS = {
    "fp32": Precision("fp32"),
    "tf32": Precision("tf32"),
    "bf16": Precision("bf16", native=False),
    "bf16 native": Precision("bf16", native=True),
}
# Largest relative error of dL/dX, at every size of the task vector.
GATE = {"tf32": 3e-3, "bf16": 2e-2, "bf16 native": 2e-2}
