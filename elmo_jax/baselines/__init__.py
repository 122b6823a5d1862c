"""Static word vectors to compare with: SVD, SGNS and their files."""
