"""Students against the teacher's whole distribution on held-out text, many in one pass."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from softlabels.plan import Plan
from softlabels.student.causal import LanguageModel
from softlabels.student.sequences import COLUMNS
from softlabels.student.stream import Stream

Figures = dict[str, float]


class Part(NamedTuple):
    """Some positions of held-out text, over the whole vocabulary of V.

    Attributes:
        labels: int64 [n], the tokens that follow.
        teacher: float [n, V], its logits.
        students: float [n, V] each, by name.
    """

    labels: Tensor
    teacher: Tensor
    students: Mapping[str, Tensor]


def measure(parts: Iterable[Part]) -> tuple[Figures, dict[str, Figures]]:
    """The teacher's figures and each student's.

    Returns:
        Means a position: nll (nats, of the token that follows), perplexity (its exponential),
        accuracy; for students also kl (KL(teacher‖student), nats, exact), agreement (same
        likeliest token), acceptance (sum of min(p, q): the share of its tokens that speculative
        decoding would keep).
    """
    sums: dict[str, Figures] = {"teacher": {}}
    count = 0
    for part in parts:
        log_p = part.teacher.log_softmax(1)
        p, top = log_p.exp(), log_p.argmax(1)
        entropy = -float((p * log_p).sum(1).double().sum())
        _add(sums["teacher"], _of_labels(log_p, part.labels))
        for name, logits in part.students.items():
            log_q = logits.log_softmax(1)
            found = _of_labels(log_q, part.labels) | _of_teacher(log_q, p, entropy, top)
            _add(sums.setdefault(name, {}), found)
        count += len(part.labels)
    means = {name: {key: x / count for key, x in found.items()} for name, found in sums.items()}
    for found in means.values():
        found["perplexity"] = math.exp(found["nll"])
    return means.pop("teacher"), means


@torch.inference_mode()
def parts_of_plan(
    plan: Plan, teacher: nn.Module, students: Mapping[str, nn.Module], num_classes: int
) -> Iterator[Part]:
    """The positions of a plan with every model run live on them; models are in evaluation mode."""
    calls = {
        name: LanguageModel(model.eval(), num_classes, "next")
        for name, model in {"": teacher, **students}.items()
    }
    stream = Stream(plan, batch_size=2, epochs=1, shuffle=False, columns=COLUMNS)
    for batch in stream:
        assert batch.targets.label_ids is not None
        labels = torch.from_numpy(batch.targets.label_ids).long()
        said = {name: call(batch).chunks() for name, call in calls.items()}
        for at, logits in said.pop(""):
            yield Part(labels[at], logits, {name: next(found)[1] for name, found in said.items()})


def _of_labels(log_q: Tensor, labels: Tensor) -> Figures:
    nll = -float(log_q.gather(1, labels[:, None]).double().sum())
    return {"nll": nll, "accuracy": float((log_q.argmax(1) == labels).sum())}


def _of_teacher(log_q: Tensor, p: Tensor, entropy: float, top: Tensor) -> Figures:
    cross = -float((p * log_q).sum(1).double().sum())
    return {
        "kl": cross - entropy,
        "agreement": float((log_q.argmax(1) == top).sum()),
        "acceptance": float(torch.minimum(p, log_q.exp()).sum(1).double().sum()),
    }


def _add(sums: Figures, found: Figures) -> None:
    for key, value in found.items():
        sums[key] = sums.get(key, 0.0) + value
