"""The errors that a person is meant to read."""

from __future__ import annotations


class ActiveDPOError(ValueError):
    """Bad input or an unsupported set-up, said in one line that names what is at fault.

    The command line prints the message alone and exits with code 2.
    """


class UnsupportedParameterError(ActiveDPOError):
    """A trainable parameter whose per-sample gradient the library cannot take.

    Raised before anything is computed: leaving the parameter out would give a gradient with a
    silently missing block.
    """
