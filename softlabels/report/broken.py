"""Targets and labels that do not belong together: nothing else can be said before that is mended.

Each rule takes a table's facts (`gather.part_facts`) and gives a finding or None.
"""

import math

from softlabels.report.finding import SURE, Facts, Finding, percent


def shifted_rows(part: Facts) -> Finding | None:
    """Labels that belong to the row before or after."""
    teacher = part.get("teacher") or {}
    for shift, found in (teacher.get("shifted") or {}).items():
        rows, own, other = found["rows"], found["accuracy"], found["neighbour"]
        error = math.sqrt(max(own + other, 1 / rows) / rows)
        # Rows whose neighbour has another label: a sound teacher hits its own far more often.
        if other - own > SURE * error and other > max(2 * own, 0.2):
            rows_off = abs(int(shift))
            where = "next" if int(shift) > 0 else "previous"
            return Finding(
                "labels-shifted",
                "error",
                f"The teacher's choice is the label of {percent(own)} of the rows, but that of the "
                f"{where} row{'' if rows_off == 1 else ' but one'} of {percent(other)} (of {rows} "
                f"rows whose neighbour has another label): labels are off by {rows_off}.",
                "Put labels and inputs of the source in step again and capture anew; join them by "
                "id, not by order.",
            )
    return None


def shifted_tokens(part: Facts) -> Finding | None:
    """Distributions that stand one token off."""
    found = part.get("alignment") or {}
    if found.get("verdict") not in ("wrong", "contradiction"):
        return None
    return Finding(
        "targets-shifted",
        "error",
        f"Distributions do not stand at their tokens: {found['problem']}.",
        "Check position_index and what the recording engine calls the first position, and capture "
        "or import again.",
    )


def wrong_tokenizer(part: Facts) -> Finding | None:
    """A teacher that is sure of something else than what stands there."""
    teacher, entropy = part.get("teacher") or {}, part.get("entropy") or {}
    if part["lineage"]["alignment"] is None or teacher.get("surprise") is None:
        return None
    nothing = entropy["most"]
    can_know = nothing - teacher["entropy"]
    # A teacher that is calibrated on its text has used all of what it thinks it knows, one on text
    # of a kind that is new to it most; ids of another vocabulary leave next to nothing.
    used = (nothing - teacher["nll"]) / can_know if can_know > 0 else 1.0
    if can_know < 0.2 * nothing or used > 0.35 or teacher["surprise"] < 1:
        return None
    # A teacher that is merely too sure is right far more often than always saying one token.
    guess = teacher["majority"] + 0.15 * max(0.0, teacher["confidence"] - teacher["majority"])
    if teacher["surprise"] < SURE * teacher["surprise_se"] or teacher["accuracy"] > guess:
        return None
    return Finding(
        "wrong-tokenizer",
        "error",
        f"The text surprises its teacher: {teacher['nll']:.2f} nats a token where its own "
        f"distributions promise {teacher['entropy']:.2f} (guessing evenly costs {nothing:.2f}). "
        "It reads ids of another tokenizer, or text that is none to it.",
        "Tokenise with the teacher's own tokenizer and chat template, and capture again.",
    )


def other_order(part: Facts) -> Finding | None:
    """Classes that stand in another order in the teacher than in the labels."""
    teacher = part.get("teacher") or {}
    mapped = teacher.get("mapped")
    if not mapped or mapped["accuracy"] is None or mapped["moved"] < 2:
        return None
    own, other = teacher["accuracy"], mapped["accuracy"]
    error = math.sqrt((own + other) / max(1, teacher["labelled"] // 2))
    if other - own < SURE * error or other < max(0.5, 1.5 * own):
        return None
    return Finding(
        "class-order",
        "error",
        f"The teacher is right in {percent(own)} of the rows, but in {percent(other)} if its "
        f"classes are taken for others ({mapped['moved']} of them move): the two number their "
        "classes differently.",
        "Give teacher.classes in the order of the teacher's outputs, map the labels to it, and "
        "capture again.",
    )


def no_teacher(part: Facts) -> Finding | None:
    """A teacher that does no better than always guessing the commonest class."""
    teacher = part.get("teacher") or {}
    if not teacher or teacher["labelled"] < 50:
        return None
    if teacher["accuracy"] > teacher["majority"] + 2 * teacher["accuracy_se"]:
        return None
    # Where one class is nearly all, a good teacher chooses it too: its probabilities still tell.
    if teacher["nll"] is not None and teacher["nll"] < 0.95 * teacher["prior"]:
        return None
    return Finding(
        "teacher-knows-nothing",
        "error",
        f"The teacher is right in {percent(teacher['accuracy'])} of {teacher['labelled']} "
        f"labelled positions; always saying the commonest label is in "
        f"{percent(teacher['majority'])}.",
        "Check that the right weights were loaded and that decode makes the inputs that the "
        "teacher was trained on.",
    )


RULES = (shifted_rows, shifted_tokens, wrong_tokenizer, other_order, no_teacher)
