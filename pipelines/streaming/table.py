"""The README's tables of streams, from the figures that `bench` keeps."""

import statistics
from collections.abc import Mapping
from typing import Any

from pipelines.streaming.cases import Case
from pipelines.streaming.contenders import CONTENDERS

TITLES = {
    "lm": "Language-model rows: {positions} positions, k = {k}; {rows:,} rows, batches of {batch}",
    "labels": "Labels only: classification, k = {k}; {rows:,} rows, batches of {batch}",
    "payload": "Classification with {payload:,} bytes of input a row; {rows:,} rows, "
    "batches of {batch}",
}
HEAD = (
    "| | bytes a row | first pass, CPU µs a row | later epochs | later, wall | memory MB | "
    "shuffled among |\n|---|---|---|---|---|---|---|\n"
)


def as_markdown(figures: Mapping[str, Any]) -> str:
    """Tables of all cases, then what they mean."""
    text = "".join(_case(found) for found in figures["cases"].values())
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    return text + (
        f"Medians (range) of {figures['turns']} turns, in which contenders alternate, each in a "
        f"process of its own with one torch thread on {figures['cpus']} CPUs; CPU time counts all "
        "threads and child processes; the page cache is warm; what libraries load late is loaded "
        "before, by reading 64 rows. The first pass begins with opening the data set. Memory is "
        "the peak over all epochs above that of the process before, mapped pages counted. All "
        "rows hold the same numbers, which sums over every field have shown. † reads the first "
        f"{_fewer(figures):,} rows only. {versions}.\n"
    )


def _case(found: Mapping[str, Any]) -> str:
    case = Case(**found["case"])
    text = f"\n**{TITLES[case.name].format(**case._asdict())}**\n\n{HEAD}"
    failures = []
    for name, figures in found["contenders"].items():
        title = CONTENDERS[name].title
        bad = [turn["failed"] for turn in (figures, *figures.get("turns", ())) if "failed" in turn]
        if bad:
            failures.append(f"{title} could not run here: {bad[0]}.")
            continue
        text += _line(name, title, figures, case)
        if not figures["same"] or figures["distinct"] != figures["rows"]:
            failures.append(
                f"{title} handed out {figures['handed_out']:,} rows, {figures['distinct']:,} of "
                f"{figures['rows']:,} distinct ones."
            )
    failures += [
        _resumed(name, one) for name, one in found["contenders"].items() if "resume" in one
    ]
    return text + "\n" + "".join(f"{failure}\n" for failure in failures) + "\n" * bool(failures)


def _resumed(name: str, figures: Mapping[str, Any]) -> str:
    title, resumed = CONTENDERS[name].title, figures["resume"]
    if "failed" in resumed:
        return f"{title} did not resume here: {resumed['failed']}."
    return (
        f"{title}, stopped in mid-epoch and resumed: first batch after {resumed['seconds']:.2f} s, "
        f"state of {resumed['state']:,} bytes, {resumed['rows']:,} rows handed out, "
        f"{resumed['distinct']:,} of {figures['rows']:,} distinct ones."
    )


def _line(name: str, title: str, figures: Mapping[str, Any], case: Case) -> str:
    turns = figures["turns"]
    first = [_micro(turn["epochs"][0], "cpu") for turn in turns]
    later = [_micro(epoch, "cpu") for turn in turns for epoch in turn["epochs"][1:]]
    wall = [_micro(epoch, "wall") for turn in turns for epoch in turn["epochs"][1:]]
    memory = statistics.median(turn["memory"] for turn in turns) / 1e6
    dagger = " †" * (figures["rows"] < case.rows)
    return (
        f"| {title}{dagger} | {figures['bytes']:,.0f} | {_spread(first)} | {_spread(later)} | "
        f"{_spread(wall)} | {memory:.0f} | {CONTENDERS[name].shuffle} |\n"
    )


def _micro(epoch: Mapping[str, float], what: str) -> float:
    return epoch[what] / epoch["rows"] * 1e6


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    digits = 0 if statistics.median(values) >= 20 else 2
    low, middle, high = (
        f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low}–{high})"


def _fewer(figures: Mapping[str, Any]) -> int:
    return max(
        (
            contender["rows"]
            for found in figures["cases"].values()
            for contender in found["contenders"].values()
            if contender.get("rows", found["case"]["rows"]) < found["case"]["rows"]
        ),
        default=0,
    )
