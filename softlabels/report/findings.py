"""What is wrong with a table's labels, from its facts: each finding in a sentence, with a remedy.

Every rule asks for two things: that the fault is large enough to matter, and that it is more than
chance (SURE standard errors, or LIKELIER in twice the log-likelihood), so that a small table does
not cry wolf. A rule gives None when the facts it needs are not there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from softlabels.report import broken
from softlabels.report.finding import LIKELIER, SURE, Facts, Finding, in_order, listed, percent


def table_findings(part: Facts) -> list[Finding]:
    """The findings of one table's facts (`gather.part_facts`), worst first.

    Of a plan that takes some of a version's rows, teacher, classes and targets are judged on the
    whole version: chosen rows say how they were chosen. What is so of these rows alone is a note.

    Where targets and labels do not belong together, what would follow from that alone (label
    noise, a teacher that is not calibrated, classes that are never chosen) is left out.
    """
    version = part.get("version")
    if version is not None:
        whole = part | {name: version.get(name) for name in OF_VERSION}
        # A row whose tokens are not those of its targets speaks for itself, however chosen.
        own = part.get("alignment") or {}
        if own.get("verdict") != "contradiction" and version:
            own = version.get("alignment") or {}
        whole["alignment"] = own
        judged = table_findings(whole | {"rows": 1, "duplicates": None, "version": None})
        known = {finding.id for finding in judged}
        here = [_selected(f) for f in _found(part, OF_ROWS) if f.id not in known]
        return in_order([*judged, *_found(part, (duplicated_rows,)), *here])
    worst = _found(part, broken.RULES)[:1]
    others = _found(part, SOUND if not worst else ALWAYS)
    return in_order(worst + others)


def _selected(finding: Finding) -> Finding:
    """What is found in a plan's rows and not in the table: it may be what was asked for."""
    return replace(
        finding,
        severity="note",
        sentence=f"Of the rows that the plan takes, not of the table: {finding.sentence}",
        advice="Nothing, if that is what the recipe is for; else take other rows too.",
    )


def _found(part: Facts, rules: Sequence[Callable[[Facts], Finding | None]]) -> list[Finding]:
    return [replace(made, part=part["name"]) for rule in rules if (made := rule(part)) is not None]


def over_confident(part: Facts) -> Finding | None:
    """A teacher surer than it is right."""
    found = _temperature(part)
    if found is None or found[0] / _taken_at(part) < 1.3:
        return None
    temperature, how = found
    return Finding(
        "uncalibrated",
        "warning",
        f"The teacher is surer than it is right, so its soft labels are too hard: {how}.",
        "Fit a temperature on labelled rows and store it as a new version, or train at a "
        f"temperature of about {temperature:.1f}.",
    )


def under_confident(part: Facts) -> Finding | None:
    """Targets softer than the teacher's skill: a temperature applied twice."""
    found = _temperature(part)
    if found is None or found[0] / _taken_at(part) > 1 / 1.3:
        return None
    temperature, how = found
    return Finding(
        "temperature-twice",
        "warning",
        f"The targets are softer than the teacher is good: {how}. So it is when a temperature of "
        f"about {1 / temperature:.1f} was applied before they were stored, and the loss applies "
        "its own again (or when the teacher learnt with strong label smoothing).",
        "Store log-probabilities of the teacher's own softmax (temperature 1) and name extra "
        "temperatures in the capture; the loss divides by T by itself.",
    )


def _taken_at(part: Facts) -> float:
    """The temperature at which a plan takes the targets: it may be what mends them."""
    return float(part.get("temperature") or 1.0)


def _temperature(part: Facts) -> tuple[float, str] | None:
    """T and how it was found, where it is beyond chance and worth something."""
    teacher = part.get("teacher") or {}
    fit = teacher.get("fit")
    if fit is not None:
        # Three thousandths of a nat a row: less changes no student.
        sure = 2 * fit["positions"] * fit["temperature_gain"] > LIKELIER
        if not sure or fit["temperature_gain"] < 0.003:
            return None
        return fit["temperature"], (
            f"its probabilities fit the labels best at temperature {fit['temperature']:.2f}, "
            f"{fit['temperature_gain']:.3f} nats a row better than as stored"
        )
    if part["lineage"]["alignment"] is None or teacher.get("surprise") is None:
        return None
    # The slope of the loss in 1/T, which needs no other temperature. Half a nat, less where few
    # classes leave no room: text that is new to a sound teacher costs less (a tenth: manuals, for a
    # model of web text).
    least = min(0.5, 0.1 * math.log(part["lineage"]["classes"]))
    if abs(teacher["surprise"]) < max(least, SURE * teacher["surprise_se"]):
        return None
    guess = teacher["surprise_temperature"]
    return guess, (
        f"its text costs it {teacher['nll']:.2f} nats a token where its own distributions promise "
        f"{teacher['entropy']:.2f}; a temperature of about {guess:.1f} would make them equal"
    )


def label_noise(part: Facts) -> Finding | None:
    """Labels that are wrong however sure the teacher is."""
    teacher = part.get("teacher") or {}
    fit = teacher.get("fit")
    if not fit or 2 * fit["positions"] * fit["noise_gain"] < LIKELIER:
        return None
    # Good benchmarks have up to 3 to 6 % of wrong labels, and their teachers learnt some of them.
    # Source: Northcutt et al., Pervasive Label Errors in Test Sets, NeurIPS 2021.
    if fit["noise"] < 0.04:
        return None
    return Finding(
        "label-noise",
        "warning",
        f"About {percent(fit['noise'], 0)} of the labels look wrong at random: where the teacher "
        f"is at least 95 % sure it contradicts the label in {percent(teacher['sure_wrong'])} of "
        f"all rows; its own probabilities expect {percent(teacher['sure_wrong_expected'])}.",
        "Look at the disagreeing examples below; train with kd_weight 1, which does not use the "
        "labels, or correct them.",
    )


def truncated_classes(part: Facts) -> Finding | None:
    """Classes of the label space that do not occur."""
    found = part.get("classes")
    if not found or not found["labelled"]:
        return None
    # With 20 rows expected, an even draw misses a class once in 500 million.
    each = found["labelled"] / found["num_classes"]
    missing = found["never_label"] if each >= 20 else []
    # A teacher that finds one in five rows of a class at all misses 20 of them once in 90.
    unseen = [c for c in found["never_chosen"] if c["labels"] >= 20]
    if not missing and not unseen:
        return None
    said = []
    if missing:
        said.append(
            f"{len(missing)} of {found['num_classes']} classes are never a label in "
            f"{found['labelled']} rows ({listed(missing)})"
        )
    if unseen:
        named = [f"{c['name']}: {c['labels']} labels" for c in unseen]
        said.append(f"the teacher never chooses {len(unseen)} that are labels ({listed(named)})")
    return Finding(
        "truncated-classes",
        "warning",
        f"Classes are missing: {'; '.join(said)}.",
        "Check that the label column and the teacher's head cover the whole label space, and that "
        "the source was not cut or filtered by class.",
    )


def duplicated_rows(part: Facts) -> Finding | None:
    """The same content under several ids, or one id twice."""
    found = part.get("duplicates")
    if not found:
        return None
    if found["same_id"]:
        return Finding(
            "id-twice",
            "error",
            f"{found['same_id']} of {found['rows']} rows have an id and view that is there "
            "already.",
            "Run softlabels verify; capture into a new table.",
        )
    # One in a hundred: fewer are what large sources hold anyway, and hardly move an average.
    if found["same_targets"] < max(3, 0.01 * found["rows"]):
        return None
    return Finding(
        "duplicated-rows",
        "warning",
        f"{found['same_targets']} of {found['rows']} rows repeat another row's targets to the last "
        f"digit under another id (as {listed(found['examples'][0])}): the same content, counted "
        "more than once and able to be in training and evaluation at a time.",
        "Leave example_id out of the capture, so that equal content is one example, or remove "
        "them from the source.",
    )


def small_k(part: Facts) -> Finding | None:
    """A head that leaves much of the mass out, and no draws that would stand for it."""
    found = part.get("kept")
    if not found or found["draws"] or found["k"] >= found["classes"]:
        return None
    mass = found["by_k"][-1]["mean"]
    # The loss then sees the rest as one class. Measured on a small language model (k = 5, 10, 50 of
    # 300 classes and of 49,152 tokens): with four fifths kept about half of the gain over hard
    # labels is lost, with 19 in 20 a tenth.
    if mass > 0.95:
        return None
    severe = mass < 0.8
    return Finding(
        "k-too-small",
        "warning" if severe else "note",
        f"The {found['k']} stored ids hold {percent(mass)} of the teacher's mass on average and "
        "there are no draws from the rest: a student learns nothing of how the other "
        f"{percent(1 - mass)} is spread.",
        "Capture again with draws (k: 16, draws: 16 costs no more than k: 32 alone) or a larger "
        "k, and train with tail sampled.",
    )


def no_entropy(part: Facts) -> Finding | None:
    """Targets that say no more than labels."""
    found = part.get("entropy")
    if not found:
        return None
    # What soft targets add to a label is at most their entropy.
    if found["mean"] > 0.03 or found["quantiles"]["50 %"] > 0.005:
        return None
    return Finding(
        "no-entropy",
        "warning",
        f"The teacher is nearly always certain: its entropy is {found['mean']:.4f} nats on "
        f"average, {found['quantiles']['90 %']:.4f} or less in nine of ten positions. Soft labels "
        "say little that hard labels do not.",
        "Store and train at a higher temperature (2 to 4), use a teacher that has not seen these "
        "rows in training, or stop its training earlier.",
    )


def lossy_codec(part: Facts) -> Finding | None:
    """Rounding that costs a part of what the targets say."""
    found, entropy = part.get("codec"), part.get("entropy") or {}
    if not found:
        return None
    # A hundredth of the information at stake; the compact profile costs 1e-4 of some 2.5 nats.
    limit = max(1e-3, 0.01 * (entropy.get("mean") or 0.0))
    tail_error = found["tail_error"] or 0.0
    if found["kl_mean"] < limit and tail_error < 0.02:
        return None
    what = (
        f"Rounding (profile {found['profile']}) has cost {found['kl_mean']:.2g} nats a position"
        if found["kl_mean"] >= limit
        else f"The recorded digits leave the tail's mass unknown by up to {percent(tail_error)}"
    )
    return Finding(
        "codec-loss",
        "warning",
        f"{what}, where the entropy is {entropy.get('mean') or 0.0:.2g}.",
        "Capture with profile precise, or record with more digits.",
    )


def no_rows(part: Facts) -> Finding | None:
    """Nothing to look at."""
    if part["rows"]:
        return None
    return Finding("no-rows", "warning", "There are no rows.", "Capture first.")


def few_labels(part: Facts) -> Finding | None:
    """Too few labels to say how good the teacher is."""
    looked = part["looked_at"] or {"labelled": 0, "positions": 0}
    labelled = looked["labelled"]
    # With 200 the standard error of an accuracy is up to 3.5 %: enough to see what is broken.
    if labelled >= 200 or not looked["positions"]:
        return None
    return Finding(
        "few-labels",
        "note",
        f"Only {labelled} of {looked['positions']} positions that were looked at have a hard "
        "label: how good, how calibrated and how well aligned the teacher is cannot be told.",
        "Label a few hundred rows, if only to check the teacher.",
    )


ALWAYS = (no_rows, duplicated_rows, small_k, no_entropy, lossy_codec, few_labels)
OF_VERSION = ("looked_at", "teacher", "entropy", "kept", "codec", "classes")
OF_ROWS = (small_k, no_entropy, lossy_codec)
SOUND = (over_confident, under_confident, label_noise, truncated_classes, *ALWAYS)
