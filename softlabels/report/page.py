"""The page: facts and findings as one self-contained HTML file, with nothing that runs.

What a stranger wrote (class names, ids, carried texts, tokens) goes through the template engine's
escaping and `seen`; a content security policy stands behind that.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import softlabels
from softlabels.report import charts
from softlabels.report.finding import Facts, Finding, percent
from softlabels.report.runs import FIGURES

MARK = '<meta name="generator" content="softlabels report">'
"""By which a report of ours is known, and may be written over."""

MOST_LISTED = 60
"""Lines of a table of classes."""

KINDS = {
    "hardest": "Hardest: the label is least likely",
    "disagreeing": "Disagreeing: the teacher is sure of another class (beyond those above)",
    "unsure": "Least certain",
}

_KEPT = {"\n", "\t", " "}


def render(facts: Facts, findings: Sequence[Finding], verdict: Mapping[str, Any] | None) -> str:
    """The page of what `gather`, `run_findings` and `verdict` gave."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "seen": seen,
        "figure": figure,
        "percent": lambda value, digits=1: None if value is None else percent(value, digits),
        "count": lambda value: None if value is None else f"{value:,}".replace(",", "\u202f"),
        "share": share,
        "settings": lambda found: [(name, value) for name, value in found.items()],
    }
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        facts=facts,
        findings=findings,
        verdict=verdict,
        views=[_view(part) for part in facts["parts"]],
        run_charts=_run_charts(facts),
        evaluation_rows=_evaluation(facts),
        kinds=KINDS,
        style=Markup(style),
        version=softlabels.__version__,
    )


def seen(value: object) -> str:
    """Text in which what cannot be seen, or turns the text around it, is shown as \\uXXXX."""
    return "".join(
        char
        if char in _KEPT or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn")
        else f"\\u{ord(char):04x}"
        for char in str(value)
    )


def figure(value: object, digits: int = 4) -> str | None:
    """A number as people read it; None stays."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.{digits}g}" if abs(value) < 10_000 else f"{value:.0f}"
    return str(value)


def share(value: float | None) -> str:
    """A probability: as a percentage, or with its power of ten where that would be 0.0 %."""
    if value is None:
        return "unknown"
    return percent(value) if value >= 5e-4 or value == 0 else f"{value:.0e}"


def _view(part: Facts) -> dict[str, Any]:
    """What the template shows of a part beside its facts."""
    looked = part["looked_at"]
    said = (
        f"Looked at: {looked['rows']:,} of {part['rows']:,} rows, {looked['positions']:,} positions"
    )
    said += ", all there is." if looked["whole"] else ", whole row groups evenly spread."
    if part["version"]:
        said += (
            f" Teacher, classes and targets are judged on the whole version: "
            f"{part['version']['looked_at']['rows']:,} of its {part['version']['rows']:,} rows."
        )
    fit = (part.get("teacher") or {}).get("fit")
    return {
        "part": {
            "teacher": None,
            "alignment": None,
            "codec": None,
            "duplicates": None,
            "examples": None,
            "tokens": None,
        }
        | part,
        "looked": said,
        "fit": []
        if fit is None
        else [
            ("fitted temperature", figure(fit["temperature"], 3)),
            ("fitted label noise", percent(fit["noise"])),
        ],
        "charts": _part_charts(part),
        "tables": [made for make in (_classes, _quantiles, _mass, _bytes) if (made := make(part))],
    }


def _part_charts(part: Facts) -> list[dict[str, Any]]:
    found = []
    if teacher := part.get("teacher"):
        found.append(
            {
                "svg": charts.reliability(teacher["bins"], teacher["ece"]),
                "caption": "Calibration: points on the dashed line are as often right as they say; "
                "grey: share of positions.",
            }
        )
    if entropy := part.get("entropy"):
        words = f"Entropy of the targets: mean {entropy['mean']:.3f}, at most {entropy['most']:.2f}"
        words += " nats."
        svg = charts.histogram(entropy["histogram"], "entropy, nats", "Entropy", words)
        found.append({"svg": svg, "caption": words})
    kept = part.get("kept")
    if kept and len(kept["by_k"]) > 1:
        bands = [(row["quantiles"]["10 %"], row["quantiles"]["90 %"]) for row in kept["by_k"]]
        found.append(
            {
                "svg": charts.mass_by_k(kept["by_k"], bands),
                "caption": f"Mass that the first k ids hold; {kept['draws']} draws from the rest.",
            }
        )
    return found


def _classes(part: Facts) -> dict[str, Any] | None:
    found = part.get("classes")
    if not found:
        return None
    listed = found["classes"][:MOST_LISTED]
    most = max((max(c["labels"], c["chosen"]) for c in listed), default=0) or 1
    more = "" if len(listed) == found["num_classes"] else f", the first {len(listed)}"
    return {
        "title": f"Classes: labels and the teacher's choices in {found['rows']:,} rows{more}",
        "columns": ["class", "labels", "chosen", "recall"],
        "rows": [
            [
                c["name"],
                c["labels"],
                c["chosen"],
                "" if c["recall"] is None else percent(c["recall"]),
            ]
            for c in listed
        ],
        "meters": [(c["labels"] if found["labelled"] else c["chosen"]) / most for c in listed],
        "meter": f"{'labels' if found['labelled'] else 'chosen'}, of the most",
        "open": len(listed) <= 12,
    }


def _quantiles(part: Facts) -> dict[str, Any] | None:
    entropy, kept = part.get("entropy"), part.get("kept")
    if not entropy:
        return None
    rows = [[q, figure(value, 3)] for q, value in entropy["quantiles"].items()]
    columns = ["quantile", "entropy, nats"]
    if kept:
        columns += ["head", "tail"]
        head = list(kept["by_k"][-1]["quantiles"].values())
        tail = list(kept["tail"]["quantiles"].values())
        rows = [
            [*row, figure(h, 3), figure(t, 2)] for row, h, t in zip(rows, head, tail, strict=True)
        ]
    return {
        "title": "Quantiles of entropy, head and tail mass",
        "columns": columns,
        "rows": rows,
        "meters": None,
        "open": False,
    }


def _mass(part: Facts) -> dict[str, Any] | None:
    kept = part.get("kept")
    if not kept:
        return None
    chosen = ("1 %", "10 %", "50 %", "90 %")
    return {
        "title": "Mass kept by k",
        "columns": ["k", "mean", *chosen],
        "rows": [
            [row["k"], figure(row["mean"]), *(figure(row["quantiles"][q], 3) for q in chosen)]
            for row in kept["by_k"]
        ],
        "meters": None,
        "open": False,
    }


def _bytes(part: Facts) -> dict[str, Any] | None:
    columns = part["bytes"]["columns"]
    if not columns:
        return None
    total = sum(column["bytes"] for column in columns)
    return {
        "title": f"Bytes by column: {total / max(1, part['bytes']['rows']):,.1f} a row",
        "columns": ["column", "bytes a row"],
        "rows": [[c["column"], figure(c["per_row"], 3)] for c in columns],
        "meters": [c["bytes"] / total for c in columns],
        "meter": "share of bytes",
        "open": False,
    }


def _run_charts(facts: Facts) -> list[dict[str, Any]]:
    if facts["kind"] != "run":
        return []
    runs = {"this run": facts["run"]}
    if facts["baseline"] is not None:
        runs["baseline"] = facts["baseline"]
    wanted = (
        ("curve", "loss", "Training loss, as each run minimises it"),
        ("evaluations", "accuracy", "Accuracy on the evaluation rows"),
        ("evaluations", "nll", "Loss on the hard labels of the evaluation rows, nats"),
    )
    found = []
    for series, name, caption in wanted:
        lines = {
            who: [(p["step"], p[name]) for p in run[series] if p.get(name) is not None]
            for who, run in runs.items()
        }
        lines = {who: points for who, points in lines.items() if len(points) > 1}
        if lines:
            svg = charts.curves(lines, name, caption)
            found.append({"svg": svg, "names": list(lines), "caption": caption})
    return found


def _evaluation(facts: Facts) -> dict[str, Any] | None:
    """Student, baseline and teacher side by side."""
    if facts["kind"] != "run" or facts["run"]["evaluation"] is None:
        return None
    columns: dict[str, Mapping[str, Any]] = {"student": facts["run"]["evaluation"]}
    if facts["baseline"] is not None and facts["baseline"]["evaluation"] is not None:
        columns["baseline"] = facts["baseline"]["evaluation"]
    judges = [judge["teacher"] for judge in facts["judges"] if judge["teacher"]]
    if len(judges) == 1:
        columns["teacher"] = judges[0]
    rows = [
        {"name": name.replace("_", " "), "cells": [column.get(name) for column in columns.values()]}
        for name in ("labelled", *FIGURES)
    ]
    return {
        "names": list(columns),
        "rows": [row for row in rows if any(cell is not None for cell in row["cells"])],
    }
