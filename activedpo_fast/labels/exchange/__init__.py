"""Picks to annotation tools, and their labels back: one module a tool.

`transfer` is the front; `shown` says what is exported, `matching` which answers are labels.
"""

from __future__ import annotations

from activedpo_fast.labels.exchange.transfer import (
    TOOLS,
    Imported,
    Tool,
    export_picks,
    import_answers,
)

__all__ = ["TOOLS", "Imported", "Tool", "export_picks", "import_answers"]
