"""Speed of elmo_jax beside other implementations: python -m experiments.benchmark."""
