"""The exception that subcommands raise for errors that the user can correct."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class CommandError(Exception):
    """Wrong input or environment. The message is one line that names what is wrong and the cure."""


@contextlib.contextmanager
def named_for_the_user(*kinds: type[Exception]) -> Iterator[None]:
    """Convert exceptions of `kinds` into CommandError; their messages already name what is wrong and the cure."""
    try:
        yield
    except kinds as error:
        raise CommandError(str(error)) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, for use in one-line messages."""
    return (str(error).splitlines() or [""])[0]
