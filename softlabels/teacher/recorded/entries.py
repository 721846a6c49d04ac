"""What every layout is read into: a sequence of tokens and the recorded top of its positions."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

CLAMP = -9999.0
"""What vLLM writes for -inf, and OpenAI for a token that is not among the listed ones."""


class BadRecordError(Exception):
    """A record that cannot be read exactly: left out and counted by `reason`, or the end."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Position:
    """One recorded distribution.

    Attributes:
        index: it is the one after token `index` of its sequence.
        ids: the likeliest tokens, by falling probability; no other token is likelier.
        logprobs: nats, of each of them.
        label: the token that followed, -1 where that is not known.
        label_logprob: nats; NaN where it was not recorded.
        label_rank: 0 for the likeliest; -1 where it was not recorded.
        slack: how far the mass of `ids` may be off by the layout's own rounding; NaN: unknown.
    """

    index: int
    ids: Sequence[int]
    logprobs: Sequence[float]
    label: int
    label_logprob: float = math.nan
    label_rank: int = -1
    slack: float = 0.0


@dataclass
class Recording:
    """One sequence.

    Attributes:
        name: its stable key, where the record has one.
        tokens: L token ids.
        positions: in order of index.
        added: whether an entry was put beside a position's top because its token was chosen.
        first_position: whether the first token that was recorded had a distribution.
        dropped: positions that could not be kept, by reason.
    """

    name: str | None
    tokens: list[int]
    positions: list[Position] = field(default_factory=list)
    added: bool = False
    first_position: bool = False
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        """Counts a position that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


@dataclass(frozen=True)
class Top:
    """The certain top of a position and what it says of the chosen token."""

    ids: list[int]
    logprobs: list[float]
    label_logprob: float
    label_rank: int
    added: bool


def number(value: Any, what: str) -> float:
    """`value` as a float; BadRecordError when it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecordError(f"record whose {what} is no number", f"found {value!r:.80}")
    try:
        return float(value)
    except OverflowError as error:  # an integer of hundreds of digits
        raise BadRecordError(f"record whose {what} is no number", "too large") from error


def token_id(value: Any, what: str) -> int:
    """`value` as a token id; BadRecordError when it is no whole number from 0 on."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise BadRecordError(f"record whose {what} holds no token id", f"found {value!r:.80}")
    return value


def token_ids(values: Any, what: str) -> list[int]:
    """`values` as a list of token ids."""
    return [token_id(value, what) for value in list_of(values, what)]


def list_of(values: Any, what: str) -> list[Any]:
    """`values` when it is a list."""
    if not isinstance(values, list):
        raise BadRecordError(f"record whose {what} is no list", f"found {values!r:.80}")
    return values


def top_by_logprob(pairs: Iterable[tuple[int, float]], chosen: int, may_be_added: bool) -> Top:
    """The certain top of entries that carry no ranks.

    Args:
        pairs: (token id, logprob) as they were listed.
        chosen: the token that followed.
        may_be_added: the least entry may be the chosen token, put there although it is not among
            the likeliest. It then is one of them for certain only where no token outside can be
            likelier: where its probability is at least what is left over.

    Raises:
        BadRecordError: a token is there twice, or a logprob is NaN or above 0.
    """
    listed = list(pairs)
    _check(listed)
    listed = sorted((p for p in listed if p[1] > CLAMP), key=lambda pair: -pair[1])
    ids = [token for token, _ in listed]
    logprobs = [logprob for _, logprob in listed]
    if chosen not in ids:
        return Top(ids, logprobs, math.nan, -1, False)
    rank = ids.index(chosen)
    if may_be_added and rank == len(ids) - 1:
        left = 1 - math.fsum(math.exp(logprob) for logprob in logprobs)
        if math.exp(logprobs[rank]) < left:
            return Top(ids[:-1], logprobs[:-1], logprobs[-1], -1, True)
    return Top(ids, logprobs, logprobs[rank], rank, False)


def top_by_rank(entries: Mapping[int, tuple[float, int]], chosen: int) -> Top:
    """The top of entries with ranks from 1; the chosen token may be an entry beyond it.

    Raises:
        BadRecordError: the ranks are not 1 to n, whether or not the chosen token's counts.
    """
    _check([(token, logprob) for token, (logprob, _) in entries.items()])
    listed = sorted(entries.items(), key=lambda entry: (entry[1][1], -entry[1][0]))
    ranks = [rank for _, (_, rank) in listed]
    added, rank = False, -1
    if ranks != list(range(1, len(ranks) + 1)):
        others = [entry for entry in listed if entry[0] != chosen]
        found = [rank for _, (_, rank) in others]
        if chosen not in entries or found != list(range(1, len(others) + 1)):
            raise BadRecordError("record whose ranks are not 1 to n", f"found {ranks!r:.120}")
        listed, added = others, True
        # Of equal logits, an engine counts both before either: such a rank says nothing.
        rank = entries[chosen][1] - 1 if entries[chosen][1] > len(others) else -1
    if any(later[1][0] > earlier[1][0] for earlier, later in pairwise(listed)):
        raise BadRecordError("record whose logprobs rise with the rank")
    listed = [entry for entry in listed if entry[1][0] > CLAMP]
    ids = [token for token, _ in listed]
    if not added:
        rank = ids.index(chosen) if chosen in ids else -1
    logprob = entries[chosen][0] if chosen in entries else math.nan
    known = logprob if logprob > CLAMP else math.nan
    return Top(ids, [logprob for _, (logprob, _) in listed], known, rank, added)


def _check(pairs: Sequence[tuple[int, float]]) -> None:
    if len({token for token, _ in pairs}) < len(pairs):
        seen = [token for token, _ in pairs]
        twice = next(token for token in seen if seen.count(token) > 1)
        raise BadRecordError("record with a token twice in one position", f"token {twice!r}")
    for _, logprob in pairs:
        if not logprob <= 0:
            what = "NaN" if math.isnan(logprob) else "above 0"
            raise BadRecordError(f"record with a logprob that is {what}", f"found {logprob!r}")
