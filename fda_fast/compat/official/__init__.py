"""The published scripts' commands, folders and files, run by this package's engine."""
