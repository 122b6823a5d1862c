"""Objectives, optimizers, the training step and loop, evaluation and checkpoints."""
