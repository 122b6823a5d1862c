"""Exceptions that commands report in one line; any other exception is a defect and keeps its traceback."""

import signal


class InputError(ValueError):
    """A file, flag or argument is wrong; the message names it and the remedy.

    Examples:
        >>> raise InputError("vocab.txt:4: 'bank' occurs twice; remove one")
        Traceback (most recent call last):
        elmo_jax.errors.InputError: vocab.txt:4: 'bank' occurs twice; remove one
    """


class NotFiniteError(InputError):
    """Training has diverged: a loss, gradient, parameter or the monitored validation figure is not finite.

    Attributes:
        fact: The first part of the message, without the remedy.
    """

    def __init__(self, fact: str, saved_step: int | None):
        """Add advice to the message.

        Args:
            fact: What is not finite.
            saved_step: Step from which the run can be resumed; None if no step is saved.
        """
        advice = "no step is saved yet, start again with overwrite=True"
        if saved_step is not None:
            advice = f"step {saved_step} is saved, continue with resume=True and allow_config_change=True"
        super().__init__(f"{fact}; lower learning_rate or clip_norm; {advice}")
        self.fact = fact


class Interrupted(Exception):
    """Raised after a signal stopped training and the step was saved."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}, saved")
        self.exit_code = 128 + number
