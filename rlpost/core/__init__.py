"""Pure functions of tensors: log-probs, advantages, losses, batching, weight images."""
