"""Makes the plain layers of ``layer_stacks`` importable by the tests beside it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
