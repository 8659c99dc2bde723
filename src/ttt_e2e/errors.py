"""The one exception that is meant for people: the command line prints it as one sentence, without a traceback."""

INTERRUPTED = 130  # the exit code after Ctrl-C, as shells have it


class UserError(Exception):
    """Something that the user can mend: the message says what was wrong, where, and how to mend it."""


class Divergence(UserError):  # noqa: N818 - it is a state of affairs
    """Training, or learning while reading, left all bounds: done again in the same way, it would again."""
