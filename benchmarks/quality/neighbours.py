"""Puts the folders whose modules the suites share on the path: benchmarks/ and examples/."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", "examples")]
