"""Damages of an ``.npz``, each of which NumPy or the zip file below it tells in another way."""

# The first byte of a field of a member's header, and what to write there.
FIELDS = {"of a later zip": (4, 99), "encrypted": (6, 1), "of an unknown compression": (8, 77)}


def damaged(data: bytes) -> dict[str, bytes]:
    """The archive with one field of every member changed, in the directory at its end too."""
    made = {"cut": data[:-40]}
    for name, (at, value) in FIELDS.items():
        copy = bytearray(data)
        for signature, place in ((b"PK\3\4", at), (b"PK\1\2", at + 2)):
            start = data.find(signature)
            while start >= 0:
                copy[start + place] = value
                start = data.find(signature, start + 4)
        made[name] = bytes(copy)
    return made
