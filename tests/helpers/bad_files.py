"""Functions that damage an input file."""


def raw(data):
    """Return a function that overwrites a file with these bytes."""
    return lambda path: path.write_bytes(data)


def folder(path):
    """Replace a file by a folder."""
    path.unlink()
    path.mkdir()
