"""Ways to spoil an input file."""


def raw(data):
    return lambda path: path.write_bytes(data)


def folder(path):
    path.unlink()
    path.mkdir()
