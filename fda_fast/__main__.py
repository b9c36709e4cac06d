"""``python -m fda_fast``."""

from fda_fast.cli import main

main()
