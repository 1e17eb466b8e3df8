"""The training loop, checkpoints, evaluation on the validation and test sets, and merged models."""
