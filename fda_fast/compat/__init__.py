"""Ways in for scripts, files and packages that people already have."""
