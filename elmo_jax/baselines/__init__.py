"""Word vectors to compare ELMo with: SVD, SGNS and word-vector files."""
