"""axolotl's rows: targets beside input_ids, or chats with their log-probabilities."""

import re
from collections.abc import Mapping
from typing import Any

from softlabels.errors import BadInputError
from softlabels.teacher.recorded.entries import (
    BadRecordError,
    Position,
    Recording,
    list_of,
    number,
    token_id,
    token_ids,
    top_by_logprob,
)
from softlabels.teacher.recorded.files import plain
from softlabels.teacher.recorded.reader import Context

_BY_ID = re.compile(r"token_id:(\d{1,9})")
Pairs = list[tuple[int, float]]


def read(record: Mapping[str, Any], context: Context) -> list[Recording]:
    """The sequence of one row.

    Raises:
        BadInputError: rows hold targets, and the spec does not say of which place they are.
        BadRecordError: tokens and log-probabilities do not fit each other.
    """
    if "input_ids" in record and "target_token_ids" in record:
        return [_prepared(record, context)]
    return [_chat(record, context)]


def _prepared(record: Mapping[str, Any], context: Context) -> Recording:
    targets = context.spec.targets
    if targets is None:
        raise BadInputError(
            "layout axolotl: its own writers disagree on whether target i is the distribution "
            "after token i or at it; say targets: after or targets: at (softlabels verify finds "
            "out a wrong answer)"
        )
    tokens = token_ids(plain(record["input_ids"]), "input_ids")
    rows = {
        name: list_of(plain(record.get(name)), name)
        for name in ("target_token_ids", "target_logprobs")
    }
    ids, logprobs = rows["target_token_ids"], rows["target_logprobs"]
    masks = plain(record.get("target_mask"))
    masks = [None] * len(ids) if masks is None else list_of(masks, "target_mask")
    labels = plain(record.get("labels"))
    if not len(ids) == len(logprobs) == len(masks) <= len(tokens):
        raise BadRecordError(
            "record whose logprobs differ in length",
            f"{len(tokens)} input_ids, {len(ids)} target_token_ids, {len(logprobs)} "
            f"target_logprobs, {len(masks)} masks",
        )
    if labels is not None and len(list_of(labels, "labels")) != len(tokens):
        raise BadRecordError(
            "record whose labels differ in length", f"{len(tokens)} input_ids, {len(labels)} labels"
        )
    recording = Recording(context.name(record), tokens)
    for place, row in enumerate(zip(ids, logprobs, masks, strict=True)):
        index = place - (targets == "at")
        pairs = _unmasked(*row)
        if not pairs:
            continue
        if index < 0 or index + 1 >= len(tokens):
            recording.drop("position without a token before or after it")
            continue
        _add(recording, index, pairs)
    return recording


def _unmasked(ids: Any, logprobs: Any, mask: Any) -> Pairs:
    ids, logprobs = list_of(ids, "target_token_ids"), list_of(logprobs, "target_logprobs")
    mask = [1] * len(ids) if mask is None else list_of(mask, "target_mask")
    if not len(ids) == len(logprobs) == len(mask):
        raise BadRecordError(
            "record whose logprobs differ in length",
            f"{len(ids)} ids, {len(logprobs)} logprobs, {len(mask)} mask in a position",
        )
    return [
        (token_id(token, "target_token_ids"), number(logprob, "target_logprobs"))
        for token, logprob, keep in zip(ids, logprobs, mask, strict=True)
        if keep
    ]


def _chat(record: Mapping[str, Any], context: Context) -> Recording:
    spec = context.spec
    messages, logprobs = plain(record.get(spec.messages)), plain(record.get(spec.logprobs))
    if not logprobs:
        raise BadRecordError("record without logprobs", f"{spec.logprobs!r} is {logprobs!r}")
    messages = list_of(messages, spec.messages)
    beside = plain(record.get("target_token_ids"))
    listed = _listed(list_of(logprobs, spec.logprobs), beside)
    before = context.render(messages[:-1], opening=True)
    whole = context.render(messages, opening=False)
    prompt, tokens = context.encode(before, special=False), context.encode(whole, special=False)
    if tokens[: len(prompt)] != prompt:
        raise BadRecordError("chat whose answer does not begin where its prompt ends")
    if len(prompt) + len(listed) > len(tokens):
        raise BadRecordError(
            "record whose logprobs differ in length",
            f"the last message has {len(tokens) - len(prompt)} tokens, there are {len(listed)} "
            "logprobs",
        )
    recording = Recording(
        context.name(record), tokens[: len(prompt) + len(listed)], first_position=True
    )
    for place, pairs in enumerate(listed):
        index = len(prompt) + place - 1
        chosen = tokens[index + 1]
        if chosen not in {token for token, _ in pairs}:
            # An engine lists the token that it chose: this is what says that nothing has slipped.
            raise BadRecordError(
                "record whose tokens do not fit its logprobs",
                f"token {chosen!r} at {index + 1} is not among {pairs[:4]!r}",
            )
        _add(recording, index, pairs)
    return recording


def _listed(logprobs: list[Any], beside: Any) -> list[Pairs]:
    if beside is not None:
        beside = list_of(beside, "target_token_ids")
        if len(beside) != len(logprobs):
            raise BadRecordError(
                "record whose logprobs differ in length",
                f"{len(logprobs)} logprobs, {len(beside)} target_token_ids",
            )
        return [_unmasked(ids, values, None) for ids, values in zip(beside, logprobs, strict=True)]
    found = []
    for entries in logprobs:
        pairs = []
        for entry in list_of(entries, "logprobs"):
            text = entry.get("token") if isinstance(entry, Mapping) else None
            match = _BY_ID.fullmatch(text) if isinstance(text, str) else None
            if match is None:
                raise BadRecordError(
                    "record whose tokens are not named by id",
                    f"expected 'token_id:<id>', found {entry!r:.80}",
                )
            pairs.append((int(match[1]), number(entry.get("logprob"), "logprob")))
        found.append(pairs)
    return found


def _add(recording: Recording, index: int, pairs: Pairs) -> None:
    chosen = recording.tokens[index + 1]
    # vLLM lists the chosen token first, also where it is not among the likeliest.
    moved = len(pairs) == 1 or pairs[0][1] < pairs[1][1]
    top = top_by_logprob(pairs, chosen, moved)
    if not top.ids:
        recording.drop("position without certain logprobs")
        return
    recording.added |= top.added
    recording.positions.append(
        Position(index, top.ids, top.logprobs, chosen, top.label_logprob, top.label_rank)
    )
