"""How far two teachers' stored targets of the same positions are apart.

KL is over the ids that both store, and one class for all the rest: exact where the rest has no
mass, else at most the full KL.

N positions, k stored ids a position.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabels.query.mixture import Doubles, Known


@dataclass(frozen=True)
class Apart:
    """What two targets of N positions differ in.

    Attributes:
        kl_ab: float64 [N], KL(a‖b), nats; infinite where b excludes what a does not.
        kl_ba: float64 [N], KL(b‖a), nats.
        exact: bool [N], whether nothing is in the class for the rest.
    """

    kl_ab: Doubles
    kl_ba: Doubles
    exact: npt.NDArray[np.bool_]


def divergence(a: Known, b: Known) -> Apart:
    """How far `a` and `b` are apart at each position, both ways."""
    ids = np.concatenate([a.ids, b.ids], 1)
    # Stable: of an id that both store, a's stands before b's.
    order = np.argsort(ids, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, 1)
    shares = np.take_along_axis(np.concatenate([a.head, b.head], 1), order, 1)
    pairs = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    ours, theirs = shares[:, :-1], shares[:, 1:]
    of_a = order < a.ids.shape[1]
    single = np.ones(ids.shape, bool)
    single[:, 1:] &= ~pairs
    single[:, :-1] &= ~pairs
    rest_a = a.tail + np.where(single & of_a, shares, 0).sum(1)
    rest_b = b.tail + np.where(single & ~of_a, shares, 0).sum(1)
    return Apart(
        kl_ab=np.maximum(_kl(pairs, ours, theirs) + _term(rest_a, rest_b), 0),
        kl_ba=np.maximum(_kl(pairs, theirs, ours) + _term(rest_b, rest_a), 0),
        exact=np.asarray((rest_a == 0) & (rest_b == 0), bool),
    )


def _kl(pairs: npt.NDArray[np.bool_], p: Doubles, q: Doubles) -> Doubles:
    return np.asarray(np.where(pairs, _term(p, q), 0).sum(1), np.float64)


def _term(p: Doubles, q: Doubles) -> Doubles:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(p > 0, p * np.log(p / q), 0), np.float64)
