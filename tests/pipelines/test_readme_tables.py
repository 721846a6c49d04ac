"""Tables that scripts put into README."""

from pathlib import Path

import pytest

from pipelines.readme import put, require_place
from softlabels.errors import BadInputError


def test_a_table_takes_the_old_one_s_place(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- x -->\nold\n<!-- /x -->\nafter\n")
    put("x", "new \\1\n", readme)
    assert readme.read_text() == "before\n<!-- x -->\nnew \\1\n<!-- /x -->\nafter\n"


def test_a_readme_without_the_marks_is_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- x -->\n")
    with pytest.raises(BadInputError, match=r"README.md.*has no '<!-- /x -->'"):
        require_place("x", readme)


def test_every_table_s_place_is_there() -> None:
    names = ("bench", "bench-loss", "bench-query", "ensemble", "curate", "faults")
    for name in (*names, "bench-lm", "bench-lm-capture", "bench-stream", "stats-lm"):
        require_place(name)
