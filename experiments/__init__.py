"""Commands: each parses its flags, calls elmo_jax and prints."""
