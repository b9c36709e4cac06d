"""``python -m fda_fast.compat.official``: see ``commands``."""

import sys

from fda_fast.compat.official.commands import main

if __name__ == "__main__":
    sys.exit(main())
