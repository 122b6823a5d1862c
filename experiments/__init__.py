"""Commands of elmo_jax; each parses its flags, calls the library and prints."""
