"""Array functions with their gradients. No Flax, no batches."""
