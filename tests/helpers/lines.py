"""Lines of a small text file, one empty and one repeated."""

LINES = ["the bank rose .", "", "the river bank of the river " * 3, "bank", "the bank rose ."]
