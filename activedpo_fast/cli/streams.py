"""Standard input and output that are closed, or cannot show every character."""

from __future__ import annotations

import io
import os
import sys


def mend_streams() -> None:
    """Open what is closed, and show characters that an encoding lacks as escapes.

    Where a shell has closed one (`>&-`), the next file that is opened would get its number: what
    libraries print would be written into a store.
    """
    for descriptor in range(3):  # in order: each open takes the lowest free number
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # Python has None for those that were closed at its start.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it
