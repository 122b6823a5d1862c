"""Damaged ``.npz`` archives that NumPy or `zipfile` reports in different ways."""

# Offset in a member's header, and the byte to write there.
FIELDS = {"newer zip version": (4, 99), "encrypted": (6, 1), "unknown compression": (8, 77)}


def damaged(data: bytes) -> dict[str, bytes]:
    """Return a truncated archive, and archives with one field of every member changed."""
    archives = {"cut": data[:-40]}
    for name, (offset, value) in FIELDS.items():
        copy = bytearray(data)
        for signature, position in ((b"PK\3\4", offset), (b"PK\1\2", offset + 2)):  # member, then directory
            start = data.find(signature)
            while start >= 0:
                copy[start + position] = value
                start = data.find(signature, start + 4)
        archives[name] = bytes(copy)
    return archives
