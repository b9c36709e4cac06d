"""C++ on the CPU: one file per op, over fda_fast._C."""
