"""The one exception for what a user can cause and mend.

A command ends with its message, one line, and exit code 2; anything else is a defect and
keeps its traceback.
"""


class InputError(ValueError):
    """A file, flag or argument is wrong; the message names it and the remedy.

    Example:
        >>> raise InputError("vocab.txt:4: 'bank' occurs twice; remove one")
        Traceback (most recent call last):
        elmo_jax.errors.InputError: vocab.txt:4: 'bank' occurs twice; remove one
    """
