"""PNG pictures: what a teacher said, how far it can be trusted, how students learned."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Told apart by colour-blind readers too. Source: Okabe and Ito, Color Universal Design, 2008."""


@dataclass(frozen=True)
class LabelledImage:
    """One example with what its teacher said.

    Attributes:
        image: [height, width] grey or [height, width, 3] colour.
        title: above it.
        names: the teacher's top classes, likeliest first.
        probs: their probabilities.
        truth: the name of the hard label, where there is one.
    """

    image: npt.NDArray[Any]
    title: str
    names: Sequence[str]
    probs: Sequence[float]
    truth: str | None = None


@dataclass(frozen=True)
class Reliability:
    """Bins of a reliability diagram.

    Attributes:
        confidence: float [bins], mean top probability of the rows of each bin.
        accuracy: float [bins], share of them that is right.
        counts: int [bins], rows.
        ece: expected calibration error, 0 to 1.
    """

    confidence: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    ece: float


@dataclass(frozen=True)
class Curve:
    """One learning curve: a line over steps for each seed.

    Attributes:
        steps: int [points].
        values: float [seeds, points].
    """

    steps: Sequence[int]
    values: npt.NDArray[np.float64]


def draw_labels(path: str | os.PathLike[str], examples: Sequence[LabelledImage]) -> None:
    """Draws images beside their teacher's top probabilities as bars; the truth is marked."""
    columns = min(2, len(examples))
    rows = -(-len(examples) // columns)
    figure = Figure(figsize=(5.2 * columns, 1.75 * rows), layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 2.1] * columns)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, example in enumerate(examples):
        row, column = divmod(number, columns)
        picture, bars = axes[row, 2 * column], axes[row, 2 * column + 1]
        picture.imshow(example.image, cmap="gray_r")
        picture.set_title(example.title, fontsize=8)
        _bars(bars, example)
    figure.savefig(path, dpi=130)


def draw_reliability(path: str | os.PathLike[str], models: Mapping[str, Reliability]) -> None:
    """Draws a reliability diagram for each model, side by side, with the rows of each bin."""
    figure = Figure(figsize=(3.4 * len(models), 3.8), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axis, (name, bins), colour in zip(axes, models.items(), COLOURS * 9, strict=False):
        used = bins.counts >= max(1, bins.counts.sum() / 1_000)  # fewer rows are mostly chance
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
        share = bins.counts[used] / bins.counts.sum()
        axis.bar(bins.confidence[used], share, width=0.05, color="0.85", label="share of rows")
        axis.plot(bins.confidence[used], bins.accuracy[used], "o-", color=colour, markersize=4)
        axis.set_title(f"{name}\nECE {100 * bins.ece:.1f} %", fontsize=10)
        axis.set_xlabel("confidence (top probability)")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        axis.set_aspect("equal")
    axes[0].set_ylabel("accuracy · grey: share of rows")
    figure.savefig(path, dpi=130)


def draw_curves(
    path: str | os.PathLike[str], curves: Mapping[str, Curve], ylabel: str, title: str = ""
) -> None:
    """Draws learning curves: mean over seeds as a line, least to greatest as a band."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    for (name, curve), colour in zip(curves.items(), COLOURS * 9, strict=False):
        mean = curve.values.mean(0)
        axis.fill_between(
            curve.steps, curve.values.min(0), curve.values.max(0), color=colour, alpha=0.15, lw=0
        )
        axis.plot(curve.steps, mean, color=colour, label=f"{name} ({mean[-1]:.3f})")
    axis.set_xlabel("step")
    axis.set_ylabel(ylabel)
    axis.set_title(title, fontsize=10)
    axis.grid(color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def _bars(axis: Any, example: LabelledImage) -> None:
    axis.set_axis_on()
    places = np.arange(len(example.names))
    colours = [COLOURS[2] if name == example.truth else COLOURS[0] for name in example.names]
    axis.barh(places, example.probs, color=colours, height=0.7)
    axis.set_yticks(places, example.names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18)
    axis.set_xticks([])
    for place, prob in zip(places, example.probs, strict=True):
        text = f"{100 * prob:.0f} %" if prob >= 0.01 else f"{100 * prob:.1f} %"
        axis.text(prob + 0.02, place, text, va="center", fontsize=8)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
