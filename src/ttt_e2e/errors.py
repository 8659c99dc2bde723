"""Errors meant for people: the command line prints their message as one sentence, without a traceback."""

INTERRUPTED = 130  # the exit code after Ctrl-C, as in shells


class UserError(Exception):
    """Something the user can fix. The message says what was wrong, where, and how to fix it."""


class Divergence(UserError):  # noqa: N818 - it is a state of affairs
    """Training, or learning while reading, diverged. Repeating it unchanged would diverge again."""
