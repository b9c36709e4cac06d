"""``python -m fda_fast.compat.official ...`` is ``fda-fast official ...``."""

import sys

from fda_fast.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["official"]
    main()
