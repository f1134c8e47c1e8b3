"""The one exception that a subcommand raises for what the user can put right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class CommandError(Exception):
    """Wrong input or environment; its text is one line that names what is wrong and the cure."""


@contextlib.contextmanager
def named_for_the_user(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of `kinds`, whose text already names what is wrong and the cure, into CommandError."""
    try:
        yield
    except kinds as error:
        raise CommandError(str(error)) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, for messages of one line."""
    return (str(error).splitlines() or [""])[0]
