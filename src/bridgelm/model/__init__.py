"""The model and its weights: groups, forward and backward passes, optimizers, and where tensors lie."""
