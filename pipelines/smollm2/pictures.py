"""Pictures of language-model students: bars, learning curves, and the curve over stored ids."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from softlabels.report.pictures import COLOURS, Curve, draw_curves

Path = str | os.PathLike[str]


def draw_bars(path: Path, students: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """Draws held-out perplexity and KL to the teacher, a bar a student, a dot a seed."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, name, title in (
        (left, "perplexity", f"held-out perplexity (teacher {teacher['perplexity']:.1f})"),
        (right, "kl", "KL(teacher‖student), nats"),
    ):
        for place, (found, colour) in enumerate(zip(students.values(), COLOURS * 9, strict=False)):
            values = found[name]["values"]
            axis.bar(place, found[name]["mean"], color=colour, width=0.7)
            axis.plot([place] * len(values), values, "o", color="0.2", markersize=3)
            axis.annotate(
                f"{found[name]['mean']:.3g}",
                (place, found[name]["mean"]),
                ha="center",
                va="bottom",
                fontsize=8,
                xytext=(0, 3),
                textcoords="offset points",
            )
        names = [found["title"].replace(", ", ",\n") for found in students.values()]
        axis.set_xticks(range(len(names)), names, fontsize=7)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
    figure.savefig(path, dpi=130)


def draw_learning(path: Path, metrics: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> None:
    """Draws the stored-label KL to the teacher over steps: a curve a student, a line a seed."""
    curves = {}
    for name, runs in metrics.items():
        lines = [[line for line in one if "evaluation" in line] for one in runs]
        values = [[line["evaluation"]["kl_to_teacher"] for line in one] for one in lines]
        curves[name] = Curve([line["step"] for line in lines[0]], np.array(values))
    draw_curves(path, curves, "KL to the teacher's stored labels, nats", "a few held-out rows")


def draw_gap(path: Path, points: Sequence[Mapping[str, Any]]) -> None:
    """Draws how much of the gap between hard labels and live each arm closes, over training."""
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axis = figure.subplots()
    names = [name for name in points[-1]["arms"] if name not in ("hard", "live")]
    for name, colour in zip(names, COLOURS * 9, strict=False):
        found = [(p["positions"], p["arms"][name]["gap_kl"]) for p in points if name in p["arms"]]
        found = [(positions, gaps) for positions, gaps in found if gaps]
        if not found:
            continue
        style = "--" if name.startswith("bucket") else ":" if name.startswith("ren") else "-"
        means = [100 * float(np.mean(gaps)) for _, gaps in found]
        label = f"{name} ({means[-1]:.0f} %)"
        axis.plot([at for at, _ in found], means, style, marker="o", color=colour, label=label)
    for level in (0, 95, 100):
        axis.axhline(level, color="0.75", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_ylim(-40, 110)
    axis.set_xlabel("positions trained on")
    axis.set_ylabel("gap to live closed, % of KL")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def draw_ids(path: Path, point: Mapping[str, Any]) -> None:
    """Draws KL beyond that of live over stored ids a position: bucket against draws."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    live = dict(zip(point["arms"]["live"]["seeds"], point["arms"]["live"]["kl"], strict=True))
    for kind, colour in (("sampled", COLOURS[0]), ("bucket", COLOURS[1])):
        found = []
        for name, arm in point["arms"].items():
            if name.startswith(f"{kind}-"):
                stored = sum(int(part) for part in name.removeprefix(f"{kind}-").split("+"))
                pairs = zip(arm["seeds"], arm["kl"], strict=True)
                beyond = [kl - live[seed] for seed, kl in pairs if seed in live]
                found.append((stored, float(np.mean(beyond))))
        found.sort()
        axis.plot(
            [ids for ids, _ in found], [kl for _, kl in found], "o-", color=colour, label=kind
        )
    axis.axhline(0, color="0.75", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("stored ids a position")
    axis.set_ylabel("KL to the teacher beyond that of live, nats")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
