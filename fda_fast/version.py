"""The version, in one place: the package, the wheel and every file written carry it."""

__version__ = "0.1.0"
