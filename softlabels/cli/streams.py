"""Standard streams whose reader may go away, as of `| head`: what nobody reads is dropped.

The work goes on and the exit code is its own: a `verify` that found damage must not end as a pipe
does.
"""

import io
import os
import sys
from typing import Any, TextIO

from softlabels.errors import StorageError


def patient(name: str) -> None:
    """Puts a stream that drops what cannot be read any more in the place of stdout or stderr.

    Where a program has put a stream of its own there, nothing is done.
    """
    stream: TextIO | None = getattr(sys, name)
    if stream is None:  # closed, `>&-`
        setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
    elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
        stream.flush()
        raw = _Dropping(stream.fileno(), required=name == "stdout")
        new = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, new)


class _Dropping(io.FileIO):
    """A stream that a reader may leave; `required`: a full disk is an error, said once."""

    def __init__(self, descriptor: int, required: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._required = required

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self._required and not isinstance(error, BrokenPipeError):
                self._required = False
                raise StorageError(f"stdout cannot be written: {error.strerror}") from error
            return memoryview(data).nbytes
