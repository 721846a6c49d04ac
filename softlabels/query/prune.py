"""Which files a predicate can be passed over, by the bounds that the log records.

Only plain comparisons of a column with a number are understood, joined by AND and OR. Whatever is
not understood may match, so that a file is never passed over wrongly.
"""

from collections.abc import Mapping
from typing import Any

Bounds = Mapping[str, tuple[Any, Any]]

_SLACK = 1e-6
"""Relative: a float32 column compares with the nearest float32 of a number, not with the number."""

_MIRRORED = {
    "COMPARE_LESSTHAN": "COMPARE_GREATERTHAN",
    "COMPARE_LESSTHANOREQUALTO": "COMPARE_GREATERTHANOREQUALTO",
    "COMPARE_GREATERTHAN": "COMPARE_LESSTHAN",
    "COMPARE_GREATERTHANOREQUALTO": "COMPARE_LESSTHANOREQUALTO",
    "COMPARE_EQUAL": "COMPARE_EQUAL",
}


def may_match(tree: Mapping[str, Any], bounds: Bounds) -> bool:
    """Whether a row within `bounds` can fulfil a predicate, given as its parse tree.

    Args:
        tree: as `check_expression` gives it.
        bounds: least and greatest value by lower-case column name; absent: unknown.
    """
    kind = tree.get("type")
    if kind == "CONJUNCTION_AND":
        return all(may_match(child, bounds) for child in tree["children"])
    if kind == "CONJUNCTION_OR":
        return any(may_match(child, bounds) for child in tree["children"])
    if kind == "COMPARE_BETWEEN":
        return _compare("COMPARE_GREATERTHANOREQUALTO", tree["input"], tree["lower"], bounds) and (
            _compare("COMPARE_LESSTHANOREQUALTO", tree["input"], tree["upper"], bounds)
        )
    if kind == "COMPARE_IN":
        column, *values = tree["children"]
        return any(_compare("COMPARE_EQUAL", column, value, bounds) for value in values)
    if kind in _MIRRORED:
        left, right = tree["left"], tree["right"]
        if left.get("class") == "COLUMN_REF":
            return _compare(kind, left, right, bounds)
        return _compare(_MIRRORED[kind], right, left, bounds)
    return True


def _compare(
    kind: str, column: Mapping[str, Any], value: Mapping[str, Any], bounds: Bounds
) -> bool:
    name = column["column_names"][-1].lower() if column.get("class") == "COLUMN_REF" else ""
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
