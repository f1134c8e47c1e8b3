"""The one exception that a subcommand raises for what the user can put right."""

from __future__ import annotations


class CommandError(Exception):
    """Wrong input or environment; its text is one line that names what is wrong and the cure."""
