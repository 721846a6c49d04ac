"""A table's targets at a temperature of its own, as if its teacher's logits had been divided by it.

T_t: the table's temperature, T: the loss's; the target is the teacher's softmax at T_t T.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from softlabels.errors import MismatchError
from softlabels.lineage import Contents
from softlabels.targets import Floats, SoftTargets, Temper


def stored_temperature(contents: Contents, own: float, asked: float, where: str) -> float:
    """The table's stored temperature for loss temperature `asked`: own times asked.

    Args:
        contents: what the table holds.
        own: T_t.
        asked: T.
        where: what to call the table.

    Raises:
        MismatchError: it is not stored; names all three.
    """
    wanted, stored = own * asked, (1.0, *contents.temperatures)
    for temperature in stored:
        # 1.1 times 3 is not the float 3.3.
        if math.isclose(temperature, wanted, rel_tol=1e-9):
            return temperature
    product = "" if own == 1 else f" (the loss's {asked!r} times the table's own {own!r})"
    raise MismatchError(
        f"temperature {wanted!r}{product} is not stored: {where} has {[*stored]!r}, and a tail at "
        "another temperature cannot be derived; train at one of these, or capture with it"
    )


def at_own(soft: SoftTargets, own: float, stored: Mapping[float, float]) -> SoftTargets:
    """Targets whose temperature 1 is the table's T_t.

    With shift_T = lse(z) / T - lse(z / T) for the teacher's logits z, logprob / T_t + shift_{T_t}
    is the new log-probability, and dividing that by T leaves shift_{T_t T} - shift_{T_t} / T to be
    added for T_t T. The entropy there is not stored, so it is unknown; ranks do not change.

    Args:
        soft: with what is stored for T_t and for every value of `stored`, but for 1.
        own: T_t.
        stored: T_t T by T, for each T that is asked.
    """
    if own == 1:
        return soft
    base = soft.temper[own]

    def relative(asked: float, temperature: float) -> Temper:
        if temperature == 1:
            assert soft.tail is not None
            return Temper(-base.shift / asked, soft.tail)
        there = soft.temper[temperature]
        return Temper(there.shift - base.shift / asked, there.tail)

    labels: Floats | None = soft.label_logprobs
    return replace(
        soft,
        logprobs=soft.logprobs / own + base.shift[:, None],
        tail=base.tail,
        entropy=None,
        label_logprobs=None if labels is None else labels / own + base.shift,
        temper={asked: relative(asked, temperature) for asked, temperature in stored.items()},
    )
