"""Errors meant for the user."""

from __future__ import annotations


class ActiveDPOError(ValueError):
    """Bad input or an unsupported setup, described in one line that names the cause.

    The command line prints only the message and exits with code 2.
    """


class UnsupportedParameterError(ActiveDPOError):
    """A trainable parameter whose per-sample gradient the library cannot compute.

    Raised before anything is computed: leaving the parameter out would give a gradient with a
    silently missing block.
    """
