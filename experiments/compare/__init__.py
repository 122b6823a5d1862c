"""Compare all methods on one data set: python -m experiments.compare."""
