"""What a training run left behind, and how it stands beside its hard-label baseline."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softlabels.errors import BadInputError, IntegrityError, one_line
from softlabels.student.metrics import NAME as METRICS
from softlabels.student.metrics import read_metrics

RESULT = "student.json"
MOST_POINTS = 200
"""Of a curve: a page is read by people."""

FIGURES = (
    "accuracy",
    "nll",
    "perplexity",
    "ece",
    "agreement",
    "kl_to_teacher",
    "acceptance",
)

_MAY_DIFFER = {"kd_weight", "tail"}
"""Loss settings in which a like-for-like baseline differs; without soft targets a temperature and a
divergence mean nothing, so they may differ too."""


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (folder / RESULT).is_file() or (folder / METRICS).is_file()


def read_record(folder: Path) -> dict[str, Any] | None:
    """student.json of a finished run, else the newest checkpoint's state; None without either.

    Raises:
        IntegrityError: it cannot be read.
    """
    files = [folder / RESULT, *sorted(folder.glob("checkpoints/step-*/state.json"), reverse=True)]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return None
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or not isinstance(found["identity"], dict):
            raise TypeError("no record of a run")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{str(path)!r} is damaged: {one_line(error)}") from error
    return found


def run_facts(folder: Path) -> dict[str, Any]:
    """How a run was set up, its curves, its evaluations; plain JSON.

    Returns:
        out; finished; steps; settings (loss and optimiser); parameters; plan_fingerprint; curve
        (step, loss, kl, hard_ce); evaluations (step and FIGURES); evaluation, the last one, with
        accuracy_se; None where there is none.

    Raises:
        BadInputError: there is no run.
    """
    if not is_run(folder):
        raise BadInputError(f"there is no run in {str(folder)!r}: no {RESULT} and no {METRICS}")
    record = read_record(folder) or {}
    lines = read_metrics(folder)
    spec = record.get("spec", {})
    loss, optimizer = spec.get("loss", {}), spec.get("optimizer", {})
    evaluations = [
        {"step": line["step"], **_figures(line["evaluation"])}
        for line in lines
        if line.get("evaluation")
    ]
    last = record.get("evaluation") or next(
        (line["evaluation"] for line in reversed(lines) if line.get("evaluation")), None
    )
    return {
        "out": str(folder),
        "finished": (folder / RESULT).is_file(),
        "steps": record.get("steps")
        or record.get("step")
        or max((line["step"] for line in lines), default=0),
        "settings": {
            "kd_weight": loss.get("kd_weight"),
            "tail": loss.get("tail"),
            "temperature": loss.get("temperature"),
            "learning rate": optimizer.get("lr"),
            "schedule": optimizer.get("schedule"),
            "batch size": spec.get("batch_size"),
            "epochs": spec.get("epochs"),
            "seed": spec.get("seed"),
        },
        "parameters": record.get("parameters"),
        "plan": spec.get("plan"),
        "plan_fingerprint": record.get("plan_fingerprint"),
        "curve": _thinned(
            [
                {name: line.get(name) for name in ("step", "loss", "kl", "hard_ce", "lr")}
                for line in lines
                if "loss" in line
            ]
        ),
        "evaluations": _thinned(evaluations),
        "evaluation": None if last is None else _last(last),
    }


def compare(folder: Path, baseline: Path) -> dict[str, Any]:
    """A run beside its baseline: figures of both, gains, and whether they are like for like.

    Returns:
        baseline (its out); kd_weight of the baseline; like_for_like; differences, a line each;
        evaluation of the baseline; accuracy_gain with accuracy_gain_se, nll_gain (nats, positive:
        the run is better), None where either has none.
    """
    if folder.resolve() == baseline.resolve():
        raise BadInputError(f"--baseline {str(baseline)!r} is the run itself")
    mine, theirs = run_facts(folder), run_facts(baseline)
    differences = _differences(read_record(folder) or {}, read_record(baseline) or {})
    here, there = mine["evaluation"], theirs["evaluation"]
    found: dict[str, Any] = {
        "baseline": str(baseline),
        "kd_weight": theirs["settings"]["kd_weight"],
        "like_for_like": not differences,
        "differences": differences,
        "evaluation": there,
        "curve": theirs["curve"],
        "evaluations": theirs["evaluations"],
        "accuracy_gain": None,
        "accuracy_gain_se": None,
        "nll_gain": None,
    }
    if here is None or there is None:
        return found
    if None not in (here["accuracy"], there["accuracy"]):
        found["accuracy_gain"] = here["accuracy"] - there["accuracy"]
        # As if the two had been judged on different rows: on the same ones it is less.
        found["accuracy_gain_se"] = math.hypot(here["accuracy_se"], there["accuracy_se"])
    if None not in (here["nll"], there["nll"]):
        found["nll_gain"] = there["nll"] - here["nll"]
    return found


def _differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What makes two runs unlike, a line each; empty: like for like."""
    found = []
    if not mine or not theirs:
        return ["one of the runs has left no record: neither student.json nor a checkpoint"]
    if mine.get("plan_fingerprint") != theirs.get("plan_fingerprint"):
        found.append("they learnt from different plans")
    hard = theirs["identity"].get("loss", {}).get("kd_weight")
    if hard != 0:
        found.append(f"the baseline has kd_weight {hard!r}, a hard-label baseline has 0")
    here, there = _flat(mine["identity"]), _flat(theirs["identity"])
    free = {f"loss.{name}" for name in _MAY_DIFFER | {"temperature", "divergence"}}
    found += [
        f"{key} is {here.get(key)!r} here, {there.get(key)!r} in the baseline"
        for key in sorted((here.keys() | there.keys()) - free)
        if here.get(key) != there.get(key)
    ]
    code = [record.get("code", {}).get("student_sha256") for record in (mine, theirs)]
    if code[0] != code[1]:
        found.append("the student's source file changed between them")
    counts = [
        [(record.get("evaluation") or {}).get(name) for name in ("rows", "labelled", "positions")]
        for record in (mine, theirs)
    ]
    plans = [((r.get("spec") or {}).get("evaluate") or {}).get("plan") for r in (mine, theirs)]
    if counts[0] != counts[1]:
        found.append("they were evaluated on different rows")
    elif plans[0] != plans[1]:
        found.append(f"they were evaluated on {plans[0]!r} here, {plans[1]!r} in the baseline")
    if not all("steps" in record and "student_sha256" in record for record in (mine, theirs)):
        found.append("one of them is not finished")
    return found


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{name}.{key}" if name else str(key))
    return found


def _figures(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {name: evaluation.get(name) for name in FIGURES}


def _last(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    labelled, accuracy = evaluation.get("labelled") or 0, evaluation.get("accuracy")
    error = None
    if accuracy is not None and labelled:
        error = math.sqrt(max(accuracy * (1 - accuracy), 1e-9) / labelled)
    return {
        "rows": evaluation.get("rows"),
        "labelled": labelled,
        **_figures(evaluation),
        "accuracy_se": error,
        "bins": evaluation.get("bins") or [],
    }


def _thinned(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MOST_POINTS of them, the last one among them."""
    step = -(-len(points) // MOST_POINTS)
    return points[::-1][:: max(1, step)][::-1]
