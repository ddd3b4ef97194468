"""`activedpo env`: its options and help."""

from __future__ import annotations

from activedpo_fast.cli.session import Quiet, say, session

EPILOG = "Example:\n\n  activedpo env"


def env(quiet: Quiet = False) -> None:
    """Show versions, devices and which backends are active."""
    with session(quiet):
        from activedpo_fast.cli.env import report

        section = None
        rows = report()
        width = max(len(row.name) for row in rows)
        for row in rows:
            if row.section != section:
                say(quiet, f"{row.section}:")
                section = row.section
            say(quiet, f"  {row.name:<{width}}  {row.value}")
