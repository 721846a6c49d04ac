"""What targets must be, how they are tempered, and what the loss refuses."""

import importlib
import math
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabels.errors import BadInputError, DataError, MismatchError, SoftLabelsError
from softlabels.student.losses import (
    Targets,
    check_targets,
    distillation_loss,
    rescale_head,
    temper,
)
from softlabels.student.temper import log1mexp

V = 12


def good() -> Targets:
    """Three rows: a full head, a padded one, and one with no tail."""
    ids = torch.tensor([[3, 0, 7], [5, 2, -1], [1, -1, -1]])
    probs = torch.tensor([[0.5, 0.2, 0.1], [0.6, 0.3, 0.0], [1.0, 0.0, 0.0]])
    tail = torch.tensor([0.2, 0.1, 0.0]).log()
    draws = torch.tensor([[1, 1], [0, 11], [-1, -1]])
    return Targets(ids, probs.log(), tail, draws)


def with_entry(name: str, place: tuple[int, ...], value: float) -> Targets:
    tensor = getattr(good(), name).clone()
    tensor[place] = value
    return good()._replace(**{name: tensor})


BROKEN: dict[str, tuple[Targets, type[SoftLabelsError], str]] = {
    "duplicate": (
        with_entry("ids", (0, 2), 3),
        DataError,
        r"targets.ids, row 0: expected each id once in a row, found \[3\]",
    ),
    "id too large": (
        with_entry("ids", (1, 1), V),
        MismatchError,
        r"targets.ids, row 1: expected ids from 0 to 11, or -1 for none, found \[12\]",
    ),
    "id too small": (with_entry("ids", (1, 2), -2), MismatchError, r"row 1.*found \[-2\]"),
    "probable pad": (
        with_entry("logprobs", (1, 2), -30.0),
        DataError,
        r"targets.logprobs, row 1: expected -inf where ids are -1, found \[-30.0\]",
    ),
    "tail above 0": (
        with_entry("tail_logprob", (0,), 0.5),
        DataError,
        r"targets.tail_logprob, row 0: expected nats, at most 0, found \[0.5\]",
    ),
    "tail NaN": (with_entry("tail_logprob", (2,), math.nan), DataError, r"row 2.*found \[nan\]"),
    "logprob NaN": (with_entry("logprobs", (0, 0), math.nan), DataError, "row 0.*a head of mass"),
    "head without its tail": (
        with_entry("tail_logprob", (1,), math.log(0.4)),
        DataError,
        r"targets, row 1: expected a head of mass 1 - exp\(tail\), both shown, found \[0.89.*0.6",
    ),
    "draw in the head": (
        with_entry("draws", (1, 0), 5),
        DataError,
        r"targets.draws, row 1: expected ids outside the row's top k, found \[5\]",
    ),
    "draw missing": (
        with_entry("draws", (0, 1), -1),
        DataError,
        r"targets.draws, row 0: expected a draw wherever there is tail mass, found \[-1\]",
    ),
    "draw too large": (with_entry("draws", (0, 1), V), MismatchError, r"row 0.*found \[12\]"),
    "float ids": (good()._replace(ids=good().logprobs), BadInputError, "targets.ids.*float32"),
    "half logprobs": (
        good()._replace(logprobs=good().logprobs.half()),
        BadInputError,
        r"targets.logprobs: expected 2 axes of torch.float32 or torch.float64, "
        r"found shape \(3, 3\) of torch.float16",
    ),
    "flat tail": (
        good()._replace(tail_logprob=good().tail_logprob.unsqueeze(1)),
        BadInputError,
        r"targets.tail_logprob.*\(3, 1\)",
    ),
    "other k": (
        good()._replace(logprobs=good().logprobs[:, :2]),
        MismatchError,
        r"targets.logprobs.*\(3, 3\).*\(3, 2\)",
    ),
    "fewer draws": (good()._replace(draws=torch.zeros(2, 2).long()), MismatchError, "draws"),
    "short entropy": (good()._replace(entropy=torch.zeros(2)), MismatchError, "entropy"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_targets_are_refused_in_one_line(name: str) -> None:
    targets, error, message = BROKEN[name]
    with pytest.raises(error, match=message) as caught:
        check_targets(targets, V)
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match=message):
        distillation_loss(torch.zeros(3, V), targets)


def test_good_targets_pass() -> None:
    check_targets(good(), V)
    check_targets(good()._replace(ids=good().ids.int(), draws=good().draws.int()), V)  # type: ignore[union-attr]
    no_ids = Targets(
        torch.zeros(2, 0).long(),
        torch.zeros(2, 0),
        torch.tensor([0.0, 1e-7]),
        torch.ones(2, 3).long(),
    )
    check_targets(no_ids, V)
    check_targets(Targets(*(None if x is None else x[:0] for x in good())), V)  # type: ignore[arg-type]


def test_tail_mass_with_every_class_stored_is_refused() -> None:
    targets = Targets(
        torch.tensor([[1, 0]]), torch.tensor([[0.6, 0.3]]).log(), torch.tensor([0.1]).log()
    )
    check_targets(targets, 3)
    with pytest.raises(DataError, match="row 0: expected -inf, since every class is stored"):
        check_targets(targets, 2)


def test_validation_can_be_left_to_the_caller() -> None:
    targets, _, _ = BROKEN["duplicate"]
    assert torch.isfinite(distillation_loss(torch.zeros(3, V), targets, validate=False).loss)
    with pytest.raises(BadInputError):
        distillation_loss(torch.zeros(3, V), BROKEN["float ids"][0], validate=False)


def test_unvalidated_missing_draws_and_labels_give_their_mass_to_no_class() -> None:
    targets = with_entry("draws", (0, 1), -1)
    for tail, first in (("sampled", {1: 0.1}), ("label", {})):
        logits = torch.zeros(3, V, requires_grad=True)
        labels = torch.tensor([-1, 0, -1])
        loss = distillation_loss(
            logits,
            targets,
            tail=tail,  # type: ignore[arg-type]
            labels=labels,
            normalizer=1.0,
            validate=False,
        ).loss
        (grad,) = torch.autograd.grad(loss, logits)
        want = torch.full((V,), 1 / V)
        for at, prob in {3: 0.5, 0: 0.2, 7: 0.1, **first}.items():
            want[at] -= prob
        torch.testing.assert_close(grad[0], want)


def test_a_tail_rounded_above_zero_is_a_tail_of_everything() -> None:
    logits = torch.linspace(-1, 1, V).expand(1, V)
    empty = torch.zeros(1, 0)
    exact, above = (
        distillation_loss(
            logits,
            Targets(empty.long(), empty, torch.tensor([tail]), torch.tensor([[1, 4]])),
            tail="sampled",
        ).loss
        for tail in (0.0, 1e-3)
    )
    assert float(exact) == float(above)
    head = rescale_head(torch.zeros(1, 2), torch.tensor([1e-3]))
    assert (head == -torch.inf).all()


LABELS = torch.tensor([1, 2, -1])
CALLS: dict[str, tuple[dict[str, Any], type[SoftLabelsError], str]] = {
    "three axes": ({"logits": torch.zeros(3, 1, V)}, BadInputError, "logits: expected floats"),
    "int logits": ({"logits": torch.zeros(3, V).int()}, BadInputError, "torch.int32"),
    "rows": ({"logits": torch.zeros(4, V)}, MismatchError, "expected 4 rows as logits, found 3"),
    "narrow": ({"logits": torch.zeros(3, 6)}, MismatchError, r"ids from 0 to 5.*found \[7\]"),
    "T 0": ({"temperature": 0.0}, BadInputError, "temperature: expected .* found 0.0"),
    "T < 0": ({"temperature": -1.0}, BadInputError, "found -1.0"),
    "T NaN": ({"temperature": math.nan}, BadInputError, "found nan"),
    "kd_weight": ({"kd_weight": 1.5, "labels": LABELS}, BadInputError, "kd_weight.*found 1.5"),
    "kd_weight NaN": ({"kd_weight": math.nan, "labels": LABELS}, BadInputError, "found nan"),
    "mode": ({"tail": "drop"}, BadInputError, "tail: expected one of .* found 'drop'"),
    "no labels": ({"kd_weight": 0.5}, BadInputError, "labels: .* None, with kd_weight 0.5"),
    "no label for the tail": ({"tail": "label"}, BadInputError, "None.*tail 'label'"),
    "labels' length": ({"labels": LABELS[:2]}, MismatchError, r"labels: .*\(3,\), found \(2,\)"),
    "labels' dtype": ({"labels": LABELS.float()}, MismatchError, "labels: .*torch.float32"),
    "label too large": ({"labels": LABELS + 10}, MismatchError, r"labels, row 1: .*\[12\]"),
    "a row without label": (
        {"tail": "label", "labels": torch.tensor([-1, 0, -1])},
        DataError,
        r"labels, row 0: expected a label wherever there is tail mass, found \[-1\]",
    ),
    "weights": ({"weights": torch.ones(2)}, MismatchError, r"weights: .*\(3,\), found \(2,\)"),
    "no draws": (
        {"tail": "sampled", "targets": good()._replace(draws=None)},
        BadInputError,
        "tail 'sampled': expected draws, found none",
    ),
    "no draws, unvalidated": (
        {
            "tail": "sampled",
            "targets": good()._replace(draws=torch.zeros(3, 0).long()),
            "validate": False,
        },
        BadInputError,
        "tail 'sampled': expected draws, found none",
    ),
    "nothing to renormalize": (
        {
            "tail": "renormalize",
            "targets": Targets(
                torch.full((3, 1), -1), torch.full((3, 1), -torch.inf), torch.zeros(3)
            ),
        },
        DataError,
        "row 0: expected an id to renormalize",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls_are_refused_in_one_line(name: str) -> None:
    arguments, error, message = CALLS[name]
    arguments = {"logits": torch.zeros(3, V), "targets": good(), **arguments}
    with pytest.raises(error, match=message) as caught:
        distillation_loss(**arguments)
    assert "\n" not in str(caught.value)


def test_renormalize_warns_once_a_process() -> None:
    code = (
        "import warnings, torch\n"
        "from softlabels.student.losses import Targets, distillation_loss\n"
        "t = Targets(torch.tensor([[0]]), torch.tensor([[-.5]]), torch.tensor([-.93]))\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3):\n"
        "        distillation_loss(torch.zeros(1, 4), t, tail='renormalize')\n"
        "    for mode in ('bucket', 'uniform'):\n"
        "        distillation_loss(torch.zeros(1, 4), t, tail=mode)\n"
        "print([(w.category.__name__, w.filename) for w in seen])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[('UserWarning', '<string>')]\n"


def test_sampled_needs_no_draws_where_there_is_no_tail() -> None:
    targets = good()
    last = Targets(targets.ids[2:], targets.logprobs[2:], targets.tail_logprob[2:])
    got = distillation_loss(torch.zeros(1, V), last, tail="sampled")
    torch.testing.assert_close(got.loss, torch.tensor(V).log())


@settings(max_examples=100, deadline=None)
@given(
    head=st.lists(st.floats(-30, 0), min_size=1, max_size=6),
    tail=st.one_of(st.floats(-100, -1e-6), st.just(-math.inf)),
    pads=st.integers(0, 2),
)
def test_rescaled_heads_have_the_mass_the_tail_leaves(
    head: list[float], tail: float, pads: int
) -> None:
    """In float32, against float64, from a tail of everything to a tail of nothing."""
    row = torch.tensor([head + [-math.inf] * pads])
    got = rescale_head(row, torch.tensor([tail]))
    left = -math.expm1(float(torch.tensor(tail)))
    assert float(got.double().exp().sum()) == pytest.approx(left, rel=1e-5)
    moved = (got - row)[:, : len(head)]
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), rtol=0, atol=1e-5)
    assert (got[:, len(head) :] == -torch.inf).all()


def test_the_mass_a_tail_leaves_is_accurate_at_both_ends() -> None:
    """In float32, 1 - exp(x) has no correct digit at x = -1e-8, nor has its log at x = -20."""
    x = -torch.logspace(-30, 1.9, 200)
    want = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()]
    got = log1mexp(x).double()
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=0)


def test_an_empty_head_stays_empty() -> None:
    nothing = torch.full((2, 3), -torch.inf)
    assert (rescale_head(nothing, torch.tensor([0.0, -1.0])) == -torch.inf).all()
    assert rescale_head(nothing[:, :0], torch.zeros(2)).shape == (2, 0)


@pytest.mark.parametrize("temperature", [0.5, 1.5, 2.0, 4.0])
def test_tempered_targets_are_the_teacher_at_that_temperature(temperature: float) -> None:
    gen = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(9, 40, generator=gen, dtype=torch.float64)
    at_one, at_t = torch.log_softmax(z, 1), torch.log_softmax(z / temperature, 1)
    logprobs, ids = at_one.topk(6, 1)
    tails = [x.scatter(1, ids, -torch.inf).logsumexp(1) for x in (at_one, at_t)]
    shift = z.logsumexp(1) / temperature - (z / temperature).logsumexp(1)
    draws = torch.zeros(9, 2, dtype=torch.long)
    stored = Targets(ids, logprobs, tails[0], draws, -(at_one.exp() * at_one).sum(1))
    rounded = stored._replace(logprobs=logprobs + 0.01 * torch.randn(9, 6, generator=gen))
    got = temper(stored, temperature, shift=shift, tail_logprob=tails[1])
    torch.testing.assert_close(got.logprobs, at_t.gather(1, ids))
    torch.testing.assert_close(got.tail_logprob, tails[1])
    assert got.draws is None
    assert got.entropy is None
    mass = temper(rounded, temperature, shift=shift, tail_logprob=tails[1]).logprobs.exp().sum(1)
    torch.testing.assert_close(mass, 1 - tails[1].exp())
    again = temper(stored, temperature, shift=shift, tail_logprob=tails[1], draws=draws)
    assert again.draws is draws
    with pytest.raises(DataError, match=rf"temper to T = {temperature}, row \d: expected a head"):
        temper(stored, temperature, shift=shift, tail_logprob=tails[0])
    with pytest.raises(DataError, match="expected a head of mass"):
        temper(stored, temperature, shift=torch.zeros_like(shift), tail_logprob=tails[1])


def test_tempering_refuses_what_does_not_fit() -> None:
    targets = good()
    one = torch.zeros(3)
    with pytest.raises(BadInputError, match=r"temperature: .* found 0"):
        temper(targets, 0.0, shift=one, tail_logprob=targets.tail_logprob)
    with pytest.raises(MismatchError, match=r"shape \(3,\), found \(2,\) and \(3,\)"):
        temper(targets, 2.0, shift=one[:2], tail_logprob=targets.tail_logprob)


@pytest.fixture
def typed() -> Iterator[ModuleType]:
    """A copy of the losses whose shape annotations are executed."""
    modules = ("temper", "several", "call", "blocks", "losses")
    names = [f"softlabels.student.{module}" for module in modules]
    package = sys.modules["softlabels.student"]
    kept = {name: sys.modules.pop(name) for name in names}
    try:
        with jaxtyping.install_import_hook(names, "beartype.beartype"):
            yield importlib.import_module(names[-1])
    finally:
        sys.modules.update(kept)
        for name, module in kept.items():
            setattr(package, name.rpartition(".")[2], module)


def test_shapes_at_the_border_are_what_the_annotations_say(typed: ModuleType) -> None:
    targets = typed.Targets(*good())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits = torch.zeros(3, V, dtype=dtype, requires_grad=True)
        for tail in ("bucket", "sampled", "uniform"):
            for weights in (None, torch.ones(3), torch.tensor(1.0), torch.ones(1)):
                result = typed.distillation_loss(
                    logits, targets, tail=tail, weights=weights, labels=LABELS, temperature=2.0
                )
                result.loss.backward()
    both = [(targets, torch.ones(3)), (targets, torch.tensor(0.5))]
    typed.distillation_loss(torch.zeros(3, V), both, tail="sampled")
    typed.check_targets(targets, V)
    typed.temper(targets, 1.0, shift=torch.zeros(3), tail_logprob=targets.tail_logprob)
    with pytest.raises(jaxtyping.TypeCheckError):
        typed.rescale_head(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(jaxtyping.TypeCheckError):
        typed.distillation_loss(torch.zeros(3, V), targets, labels=torch.zeros(2).long())
    with pytest.raises(jaxtyping.TypeCheckError):
        typed.distillation_loss(torch.zeros(3, V, 1), targets)
