"""Thrift's compact protocol, as far as Parquet's headers need it: some fields of nested structs.

pyarrow's own view of a footer ends the process where a damaged one lacks a part.

Source: apache/thrift, doc/specs/thrift-compact-protocol.md.
"""

from collections.abc import Mapping
from typing import Any

from softlabels.errors import IntegrityError

MOST_NESTED = 16

VALUES_A_STRUCT = 16
"""How many values there may be for each struct that there may be: Parquet's largest has 17."""

STRUCT = 12
_BOOLEANS, _BYTE, _WHOLE, _DOUBLE, _BINARY, _LISTS = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10)

Wanted = Mapping[int, Any]
"""By number of the field: None for its value, another mapping for a struct or list of structs."""


class Compact:
    """A reader of one value after the other.

    Its methods raise IndexError where the bytes end or mean nothing, RecursionError where values
    are nested too deep, IntegrityError where there are more than `structs` structs, or more values
    than so many need.

    Attributes:
        at: the next byte.
    """

    def __init__(self, data: bytes | memoryview, at: int, structs: int) -> None:
        # Those of Arrow are signed. Bytes are left as they are: they are read twice as fast.
        self._view = data if isinstance(data, bytes) else data.cast("B")
        self.at = at
        self._left = structs
        self._values_left = VALUES_A_STRUCT * structs

    def struct(self, wanted: Wanted, depth: int = 0) -> dict[int, Any]:
        """The wanted fields of the struct here, as far as it has them, by number.

        Whole numbers are int, truth values bool, text is bytes, structs as this, lists are lists of
        these.
        """
        self._left -= 1
        if self._left < 0:
            raise IntegrityError(_TOO_MANY)
        if depth > MOST_NESTED:
            raise RecursionError
        view, at = self._view, self.at
        found: dict[int, Any] = {}
        field = 0
        while mark := view[at]:
            at += 1
            kind = mark & 15
            self._values_left -= 1
            if self._values_left < 0:
                raise IntegrityError(_TOO_MANY)
            if mark >> 4:
                field += mark >> 4
            else:
                self.at = at
                field, at = _signed(self._varint()), self.at
            if kind in _BOOLEANS:
                if field in wanted:
                    found[field] = kind == 1
                continue
            if kind in _WHOLE and (byte := view[at]) < 128:  # most values are: no call for these
                at += 1
                if field in wanted:
                    found[field] = _signed(byte)
                continue
            self.at = at
            value = self._value(kind, wanted.get(field, _NOTHING), depth)
            at = self.at
            if field in wanted:
                found[field] = value
        self.at = at + 1
        return found

    def _value(self, kind: int, wanted: Wanted | None, depth: int) -> Any:
        if kind in _WHOLE:
            return _signed(self._varint())
        if kind == STRUCT:
            return self.struct(wanted or _NOTHING, depth + 1)
        if kind == _BINARY:
            length = self._varint()  # which moves `at` itself
            self.at += length
            return bytes(self._view[self.at - length : self.at]) if wanted is None else None
        if kind in _LISTS:
            return self._list(wanted, depth)
        if kind not in (_BYTE, _DOUBLE):
            raise IndexError(kind)
        self.at += 1 if kind == _BYTE else 8
        return None

    def _list(self, wanted: Wanted | None, depth: int) -> list[Any]:
        if depth > MOST_NESTED:
            raise RecursionError
        mark = self._view[self.at]
        self.at += 1
        kind, count = mark & 15, mark >> 4
        if count == 15:
            count = self._varint()
        if count > len(self._view) - self.at:  # each takes a byte at least
            raise IndexError(count)
        self._values_left -= count
        if self._values_left < 0 or (kind == STRUCT and count > self._left):
            raise IntegrityError(_TOO_MANY)
        if kind in _WHOLE:
            return [_signed(self._varint()) for _ in range(count)]
        # In a list, unlike in a field, true and false are a byte.
        kind = _BYTE if kind in _BOOLEANS else kind
        return [self._value(kind, wanted, depth + 1) for _ in range(count)]

    def _varint(self) -> int:
        view, at = self._view, self.at
        found = shift = 0
        while True:
            byte = view[at]
            at += 1
            found |= (byte & 127) << shift
            if byte < 128:
                self.at = at
                return found
            shift += 7
            if shift > 63:
                raise IndexError(shift)


_NOTHING: Wanted = {}
_TOO_MANY = "a header holds more values than Parquet needs"


def _signed(number: int) -> int:
    return number >> 1 if not number & 1 else -(number >> 1) - 1
