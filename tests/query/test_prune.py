"""Files are passed over only when no row of theirs can match."""

import duckdb
import pytest

from softlabels.query.prune import may_match
from softlabels.query.sql import check_expression

BOUNDS = {"label": (3, 5), "entropy": (0.5, 1.5)}


@pytest.mark.parametrize(
    ("where", "possible"),
    [
        ("label = 4", True),
        ("label = 6", False),
        ("6 = label", False),
        ("label < 3", False),
        ("label <= 3", True),
        ("label > 5", False),
        ("label >= 5", True),
        ("5 < label", False),
        ("5 <= label", True),
        ("label = -4", False),
        ("label IN (1, 2)", False),
        ("label IN (1, 4)", True),
        ("label BETWEEN 6 AND 9", False),
        ("label BETWEEN 1 AND 2", False),
        ("label BETWEEN 5 AND 9", True),
        ("LABELS.Label = 9", False),
        ("label = 4 AND entropy > 2", False),
        ("label = 9 OR entropy > 1", True),
        ("label = 9 OR entropy > 2", False),
        ("entropy > 1.5", True),  # 1.5 is a float32, but its neighbours compare as equal
        ("entropy > 1.6", False),
        ("entropy < 0.4", False),
        ("entropy = 3e0", False),
        # Not understood, so never passed over:
        ("NOT label = 4", True),
        ("label <> 4", True),
        ("label + 1 = 40", True),
        ("label = 40 IS NOT TRUE", True),
        ("label = '40'", True),
        ("label IS NULL", True),
        ("label NOT IN (3, 4, 5)", True),
        ("margin > 40", True),
        ("label = entropy", True),
        ("label = 40::INT", True),
    ],
)
def test_bounds_decide(where: str, possible: bool) -> None:
    assert may_match(check_expression(where), BOUNDS) == possible


@pytest.mark.parametrize("form", ["a {} {}", "{1} {0} a"])
@pytest.mark.parametrize("operator", ["=", "<", "<=", ">", ">=", "<>"])
@pytest.mark.parametrize("constant", ["-2", "0", "1", "2.5", "3"])
def test_what_matches_is_never_passed_over(form: str, operator: str, constant: str) -> None:
    where = form.format(operator, constant)
    tree = check_expression(where)
    with duckdb.connect(":memory:") as con:
        matching = con.execute(f"SELECT a FROM range(-4, 5) t(a) WHERE {where}").fetchall()
    for (value,) in matching:
        for least in range(-4, value + 1):
            for greatest in range(value, 5):
                assert may_match(tree, {"a": (least, greatest)})
