"""Which files a predicate can be passed over, by the bounds that the log records.

Only plain comparisons of a column with a number are understood, joined by AND and OR. Whatever is
not understood may match, so that a file is never passed over wrongly.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Bounds = Mapping[str, tuple[Any, Any]]
Names = Callable[[Sequence[str]], str]

_SLACK = 1e-6
"""Relative: a float32 column compares with the nearest float32 of a number, not with the number."""

_MIRRORED = {
    "COMPARE_LESSTHAN": "COMPARE_GREATERTHAN",
    "COMPARE_LESSTHANOREQUALTO": "COMPARE_GREATERTHANOREQUALTO",
    "COMPARE_GREATERTHAN": "COMPARE_LESSTHAN",
    "COMPARE_GREATERTHANOREQUALTO": "COMPARE_LESSTHANOREQUALTO",
    "COMPARE_EQUAL": "COMPARE_EQUAL",
}


def last_name(names: Sequence[str]) -> str:
    """The lower-case column of a reference "labels.Entropy", where there is one relation."""
    return names[-1].lower()


def may_match(tree: Mapping[str, Any], bounds: Bounds, name_of: Names = last_name) -> bool:
    """Whether a row within `bounds` can fulfil a predicate, given as its parse tree.

    Args:
        tree: as `check_expression` gives it.
        bounds: least and greatest value by lower-case column name; absent: unknown.
        name_of: gives the key of `bounds` that a reference's parts mean, "" for none.
    """
    kind = tree.get("type")

    def compare(kind: str, column: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
        known = column.get("class") == "COLUMN_REF"
        return _compare(kind, name_of(column["column_names"]) if known else "", value, bounds)

    if kind == "CONJUNCTION_AND":
        return all(may_match(child, bounds, name_of) for child in tree["children"])
    if kind == "CONJUNCTION_OR":
        return any(may_match(child, bounds, name_of) for child in tree["children"])
    if kind == "COMPARE_BETWEEN":
        return compare("COMPARE_GREATERTHANOREQUALTO", tree["input"], tree["lower"]) and (
            compare("COMPARE_LESSTHANOREQUALTO", tree["input"], tree["upper"])
        )
    if kind == "COMPARE_IN":
        column, *values = tree["children"]
        return any(compare("COMPARE_EQUAL", column, value) for value in values)
    if kind in _MIRRORED:
        left, right = tree["left"], tree["right"]
        if left.get("class") == "COLUMN_REF":
            return compare(kind, left, right)
        return compare(_MIRRORED[kind], right, left)
    return True


def _compare(kind: str, name: str, value: Mapping[str, Any], bounds: Bounds) -> bool:
    number = _number(value)
    if name not in bounds or number is None:
        return True
    least, greatest = bounds[name]
    if not isinstance(least, int | float) or not isinstance(greatest, int | float):
        return True
    slack = _SLACK * max(1.0, abs(number)) if isinstance(least, float) else 0.0
    below = least < number + slack or (least == number and kind != "COMPARE_LESSTHAN")
    above = greatest > number - slack or (greatest == number and kind != "COMPARE_GREATERTHAN")
    if kind == "COMPARE_EQUAL":
        return below and above
    return below if kind.startswith("COMPARE_LESS") else above


def _number(tree: Mapping[str, Any]) -> float | None:
    literal = tree.get("literal") or {}
    if tree.get("class") != "CONSTANT" or literal.get("kind") == "STRING":
        return None
    try:
        return float(str(literal.get("text")))
    except ValueError:
        return None
