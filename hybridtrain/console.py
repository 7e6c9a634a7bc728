"""Lines for the person at the terminal: they go to stderr, because stdout is for results."""

from __future__ import annotations

from rich.console import Console

console = Console(stderr=True)


def say(message: str) -> None:
    """Print a line to stderr as it is: no wrapping at the terminal's width, no markup in paths."""
    console.print(message, soft_wrap=True, markup=False, highlight=False)
