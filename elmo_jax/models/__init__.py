"""Flax Linen modules: embedders, LSTM layers, the biLM, combiners and the classifier."""
