"""Every error a user can meet.

Each class says whose turn it is: `exit_code` is what the command line ends with. A message says
what was expected, what was found, where, and what to do; values are shown with `!r`.
"""

import re

_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a cursor, colours, rings or turns text around, and halves of characters."""


class SoftLabelsError(Exception):
    """A failure that trying again will not mend.

    Attributes:
        exit_code: what the command line ends with.
        told_elsewhere: another process of the same command says it on the terminal.
    """

    exit_code = 1
    told_elsewhere = False


class BadInputError(SoftLabelsError):
    """What the user wrote (a spec, a recipe, a query, an argument) cannot be meant."""

    exit_code = 2


class DataError(SoftLabelsError):
    """Data contradict themselves: NaN logits, one id with two contents, a mass above one."""


class MismatchError(SoftLabelsError):
    """Two things that must fit do not: label spaces, temperatures, weights, plan and files."""


class RecipeMismatchError(MismatchError, BadInputError):
    """Tables that one recipe names do not fit each other: it cannot be meant."""


class IntegrityError(SoftLabelsError):
    """Bytes are not those that were written: a checksum, a length or a format version is wrong."""


class StorageError(SoftLabelsError):
    """A path cannot be read or written: missing, read-only, full."""


class TryAgainError(SoftLabelsError):
    """Nothing is lost and the same command may succeed later."""

    exit_code = 75


def one_line(error: object) -> str:
    """What an error says, on one line: messages of native libraries have several."""
    return " ".join(str(error).split())


def counted(number: int, name: str, plural: str | None = None) -> str:
    """How many there are, in words: "1 row", "2 rows"; `plural` where that is not name + "s"."""
    return f"{number} {name if number == 1 else plural or f'{name}s'}"


def printable(text: str) -> str:
    """`text` with escapes for characters that steer a terminal: names in files are strangers'."""
    return _STEERING.sub(lambda found: repr(found[0])[1:-1], text)
