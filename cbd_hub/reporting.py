"""How what takes long says what it does: line by line (``progress=``), or how much is done of how much (``report=``)."""

from __future__ import annotations

from collections.abc import Callable


Progress = Callable[[str], None]  # called with a line for each step of the work
Report = Callable[[str, int, int | None], None]  # called with what is done, how much of it, and of how much where that is known
