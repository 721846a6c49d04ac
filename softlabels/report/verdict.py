"""Whether soft labels helped a run, and why not, in words.

The causes are rules as in `findings`, over a run's facts (`gather`): each gives a finding or None.
"""

from typing import Any

from softlabels.report.finding import SURE, Facts, Finding, in_order, percent
from softlabels.report.findings import table_findings

GAIN_NLL = 0.01
"""Nats: a lower loss below it is not called a gain. One run differs from the next by as much."""


def run_findings(facts: Facts) -> list[Finding]:
    """All findings of a report's facts, of its tables and of the run, worst first."""
    found = [finding for part in facts["parts"] for finding in table_findings(part)]
    if facts["plan"] is not None and not facts["plan"]["rows"]:
        found.append(Finding("no-rows", "warning", "The plan has no rows.", "See its sources."))
    if facts["kind"] == "run":
        found += [made for rule in RULES if (made := rule(facts)) is not None]
    return in_order(found)


def verdict(facts: Facts, findings: list[Finding]) -> dict[str, Any] | None:
    """What soft labels gained, or why they did not help; None unless the facts are of a run.

    Returns:
        helped: True, False, or None when it cannot be told; title; sentences.
    """
    if facts["kind"] != "run":
        return None
    baseline, run = facts["baseline"], facts["run"]
    known = [f for f in findings if f.id != "not-like-for-like"]  # said for itself
    causes = [f"{f.sentence} {f.advice}" for f in known if f.severity != "note"]
    hints = [f"{f.sentence} {f.advice}" for f in known if f.severity == "note"]
    if run["settings"]["kd_weight"] == 0:
        return _said(None, "Hard labels alone", ["This run did not use soft labels: kd_weight 0."])
    if baseline is None:
        ask = (
            "Whether soft labels helped cannot be told without a run of hard labels alone on the "
            "same plan (loss.kd_weight=0): give it as --baseline RUN."
        )
        return _said(None, "Did soft labels help?", [ask, *causes])
    helped, measured = _measured(baseline)
    if not baseline["like_for_like"]:
        unlike = "The two runs are not like for like: " + "; ".join(baseline["differences"]) + "."
        return _said(None, "Whether soft labels helped cannot be told", [unlike, measured, *causes])
    if helped is None:
        return _said(None, "Did soft labels help?", [measured, *causes])
    if helped:
        also = [f"More may be had: {cause}" for cause in causes]
        return _said(True, "What soft labels gained", [measured, *also])
    reasons = causes + hints or [
        "None of the causes that this report knows was found. The difference of two single runs is "
        "also chance: repeat both with three or more seeds before concluding."
    ]
    return _said(False, "Why soft labels did not help", [measured, *reasons])


def _said(helped: bool | None, title: str, sentences: list[str]) -> dict[str, Any]:
    return {"helped": helped, "title": title, "sentences": sentences}


def _measured(baseline: Facts) -> tuple[bool | None, str]:
    gain, error, nll = (baseline[n] for n in ("accuracy_gain", "accuracy_gain_se", "nll_gain"))
    if gain is None and nll is None:
        return None, "One of the runs was not evaluated, so that they cannot be compared."
    said = []
    if gain is not None:
        which = "higher" if gain >= 0 else "lower"
        said.append(
            f"accuracy {percent(abs(gain))} {which} (± {percent(error)}, one standard error)"
        )
    if nll is not None:
        said.append(f"loss on hard labels {abs(nll):.3f} nats {'lower' if nll >= 0 else 'higher'}")
    helped = (gain is not None and gain > 2 * error) or (
        nll is not None and nll > GAIN_NLL and (gain is None or gain > -2 * error)
    )
    gave = "soft labels gave" if baseline["like_for_like"] else "the run has"
    return helped, f"Against the baseline, {gave} {' and '.join(said)}."


def teacher_no_better(facts: Facts) -> Finding | None:
    """A teacher that the baseline has caught up with."""
    found = _gap(facts)
    if found is None:
        return None
    teacher, student, gap, error = found
    if gap > 0 and gap > 2 * error:
        return None
    return Finding(
        "teacher-no-better",
        "warning",
        f"On the evaluation rows the teacher is right in {percent(teacher)} and the baseline, "
        f"which learnt from labels alone, in {percent(student)}: there is little to learn from it.",
        "Use a better teacher, or an ensemble.",
    )


def too_much_data(facts: Facts) -> Finding | None:
    """Labels so many that the baseline comes close to the teacher by itself."""
    found = _gap(facts)
    if found is None or facts["plan"] is None:
        return None
    teacher, student, gap, error = found
    # A student keeps a part of the gap: of less than two points nothing is left to be seen.
    if not 2 * error < gap < 0.02:
        return None
    # Another teacher of an ensemble speaks of the same rows.
    own = [part.get("teacher") or {} for part in facts["parts"] if not part["further"]]
    labelled = sum(teacher.get("labelled", 0) for teacher in own)
    return Finding(
        "too-much-data",
        "warning",
        f"Labels alone bring the student to {percent(student)}, {percent(gap)} below its teacher "
        f"({percent(teacher)}): with {facts['plan']['rows']} rows an epoch ({labelled} labelled "
        "positions looked at) soft labels have little left to add.",
        "Soft labels pay where labels are few: use rows without labels as well, a smaller "
        "student, or a better teacher.",
    )


def memorised(facts: Facts) -> Finding | None:
    """A teacher that was trained on the very rows it labels."""
    there = _unchosen(facts)
    # Of whole versions: rows to learn from may be those in which the teacher is right.
    looked = [part if part["version"] is None else part["version"] for part in facts["parts"]]
    here = [part["teacher"] for part in looked if part.get("teacher")]
    if not there or not here or any(t["fit"] is None for t in (*here, *there)):
        return None
    known, new = _pooled(here), _pooled(there)
    error = (known[1] ** 2 + new[1] ** 2) ** 0.5
    # Train and test rows of one source are a point or two apart by nature.
    if known[0] < 0.97 or known[0] - new[0] < max(0.03, SURE * error):
        return None
    return Finding(
        "teacher-memorised",
        "warning",
        f"The teacher is right in {percent(known[0])} of the rows to learn from and in "
        f"{percent(new[0])} of the evaluation rows: it was trained on the former, where its soft "
        "labels are hardly softer than the labels.",
        "Label rows that the teacher has not seen (cross-fitting: two teachers, each labels the "
        "other's half).",
    )


def wrong_temperature(facts: Facts) -> Finding | None:
    """A temperature at which targets say nearly nothing."""
    temperature = facts["run"]["settings"]["temperature"]
    if temperature is None or facts["run"]["settings"]["kd_weight"] == 0:
        return None
    for part in facts["parts"]:
        entropy = part.get("entropy")
        if not entropy:
            continue
        at = {t["temperature"]: t["mean"] for t in entropy["tempered"]} | {1.0: entropy["mean"]}
        taken = temperature * part["temperature"]
        share = at.get(taken, 0.0) / entropy["most"]
        # Nine tenths of an even distribution: what is told apart is mostly rounding.
        if temperature > 1 and share > 0.9:
            return Finding(
                "wrong-temperature",
                "warning",
                f"At the run's temperature {temperature:g} the targets' entropy is "
                f"{at[taken]:.2f} nats of at most {entropy['most']:.2f}: they are nearly "
                f"even (at temperature 1: {entropy['mean']:.2f}).",
                "Train at a lower temperature: 1 or 2.",
                part["name"],
            )
    return None


def unused_draws(facts: Facts) -> Finding | None:
    """Draws that are stored and not used, or a tail mode that is known to mislead."""
    tail = facts["run"]["settings"]["tail"]
    if facts["run"]["settings"]["kd_weight"] == 0:
        return None
    for part in facts["parts"]:
        kept = part.get("kept")
        if not kept or kept["k"] >= kept["classes"] or tail == "sampled":
            continue
        mass = kept["by_k"][-1]["mean"]
        if mass > 0.95 or not (kept["draws"] or tail == "renormalize"):
            continue
        return Finding(
            "tail-mode",
            "warning" if tail == "renormalize" else "note",
            f"The head holds {percent(mass)} of the mass and the run's tail mode is {tail}, "
            + (
                "which teaches that the rest never happens."
                if tail == "renormalize"
                else f"though {kept['draws']} draws a position are stored."
            ),
            "Train with loss.tail sampled." if kept["draws"] else "Train with loss.tail bucket.",
            part["name"],
        )
    return None


def still_learning(facts: Facts) -> Finding | None:
    """A run that ended while its loss still fell."""
    values = [p["loss"] for p in facts["run"]["curve"] if p["loss"] is not None]
    if len(values) < 15 or not facts["run"]["finished"]:
        return None
    fifth = len(values) // 5
    before = sum(values[-2 * fifth : -fifth]) / fifth
    after = sum(values[-fifth:]) / fifth
    # A tenth in the last fifth of the steps, although schedules have slowed down by then.
    if before <= 0 or after > 0.9 * before:
        return None
    return Finding(
        "still-learning",
        "note",
        f"In the last fifth of the run its loss still fell from {before:.3f} to {after:.3f}.",
        "Train longer: soft labels bear more epochs than hard ones before a student overfits.",
    )


def mismatch(facts: Facts) -> Finding | None:
    """A student that does no better than guessing on the evaluation rows."""
    evaluation = facts["run"]["evaluation"]
    there = [judge["teacher"] for judge in facts["judges"] if judge["teacher"]]
    if not evaluation or evaluation["accuracy"] is None or not there:
        return None
    error = 2 * evaluation["accuracy_se"]
    guess = max(teacher["majority"] for teacher in there)
    skilled = min(teacher["accuracy"] for teacher in there)
    if evaluation["accuracy"] > guess + error or skilled < guess + 0.1:
        return None
    said = (
        f"The student is right in {percent(evaluation['accuracy'])} of the evaluation rows, no "
        f"better than always saying the commonest label ({percent(guess)}), where its teacher "
        f"reaches {percent(skilled)}"
    )
    losses = [point["loss"] for point in facts["run"]["curve"] if point["loss"] is not None]
    # Who has brought down its training loss to a third has learnt something that does not hold
    # there; who has not is not done.
    if len(losses) > 1 and losses[-1] > losses[0] / 3:
        return Finding(
            "not-learnt",
            "warning",
            f"{said}; its training loss only went from {losses[0]:.3g} to {losses[-1]:.3g} in "
            f"{facts['run']['steps']} steps.",
            "Train longer, or look for a better learning rate, before comparing.",
        )
    return Finding(
        "mismatch",
        "error",
        f"{said}, though it has learnt its own rows: inputs or label spaces of the two plans do "
        "not fit.",
        "Compare the classes, the carried columns and the decode of both plans.",
    )


def unlike_baseline(facts: Facts) -> Finding | None:
    """A baseline that is compared although something else than the labels differs."""
    baseline = facts["baseline"]
    if baseline is None or baseline["like_for_like"]:
        return None
    return Finding(
        "not-like-for-like",
        "warning",
        "The baseline differs in more than its labels: " + "; ".join(baseline["differences"]) + ".",
        "Train the baseline from the same spec with --set loss.kd_weight=0 and another out.",
    )


def _gap(facts: Facts) -> tuple[float, float, float, float] | None:
    """Teacher's and baseline's accuracy on the evaluation rows, difference and standard error."""
    there = _unchosen(facts)
    # What an ensemble gets right is more than what each of its teachers does.
    if facts["baseline"] is None or not there or any(j["further"] for j in facts["judges"]):
        return None
    student = facts["baseline"]["evaluation"]
    if student is None or student["accuracy"] is None:
        return None
    teacher, error = _pooled(there)
    gap = teacher - student["accuracy"]
    return teacher, student["accuracy"], gap, float((error**2 + student["accuracy_se"] ** 2) ** 0.5)


def _unchosen(facts: Facts) -> list[Facts]:
    """The teachers' figures on evaluation rows that were not chosen by what a teacher says."""
    return [j["teacher"] for j in facts["judges"] if j["teacher"] and not j["chosen"]]


def _pooled(found: list[Facts]) -> tuple[float, float]:
    """Accuracy over several tables' rows and its standard error."""
    rows = sum(teacher["labelled"] for teacher in found)
    accuracy = sum(teacher["accuracy"] * teacher["labelled"] for teacher in found) / rows
    return accuracy, max(accuracy * (1 - accuracy), 1e-9) ** 0.5 / rows**0.5


RULES = (
    mismatch,
    teacher_no_better,
    too_much_data,
    memorised,
    wrong_temperature,
    unused_draws,
    unlike_baseline,
    still_learning,
)
