"""Reading, checking and writing model checkpoints."""
