"""vLLM's own records: `prompt_logprobs`, dicts or flat lists, of its server or RequestOutput."""

import re
from collections.abc import Mapping
from typing import Any

from softlabels.teacher.recorded.entries import (
    BadRecordError,
    Position,
    Recording,
    list_of,
    number,
    token_id,
    token_ids,
    top_by_logprob,
    top_by_rank,
)
from softlabels.teacher.recorded.reader import Context

_ID = re.compile("[0-9]{1,10}")

Entries = dict[int, tuple[float, int | None]]
"""(logprob, rank from 1) by token id."""


def read(record: Mapping[str, Any], context: Context) -> list[Recording]:
    """The sequence of one record: its prompt, and the tokens generated after it where they are.

    Raises:
        BadRecordError: token ids are missing, or do not fit their log-probabilities.
    """
    answer = _answer(record)
    context.require_temperature(record, record.get("sampling_params"), record.get("request"))
    prompt = token_ids(_required(answer, "prompt_token_ids"), "prompt_token_ids")
    listed = _positions(_required(answer, "prompt_logprobs"))
    if len(listed) != len(prompt):
        raise BadRecordError(
            "record whose logprobs differ in length",
            f"{len(prompt)} prompt_token_ids, {len(listed)} prompt_logprobs",
        )
    recording = Recording(context.name(record), list(prompt), first_position=bool(listed[:1][0]))
    if recording.first_position:
        raise BadRecordError(
            "record whose first token has logprobs", "vLLM gives none: they may be one token off"
        )
    output = answer.get("outputs")
    if isinstance(output, list) and len(output) > 1:
        raise BadRecordError(
            "record of several outputs",
            f"found {len(output)}, of which only one could be kept: write a record for each",
        )
    if isinstance(output, list) and output and isinstance(output[0], Mapping):
        generated = token_ids(output[0].get("token_ids") or [], "outputs[0].token_ids")
        after = _positions(output[0].get("logprobs") or [])
        if after and len(after) != len(generated):
            raise BadRecordError(
                "record whose logprobs differ in length",
                f"{len(generated)} output token_ids, {len(after)} logprobs",
            )
        recording.tokens += generated[: len(after)]
        listed += after
    for index, entries in enumerate(listed[1:]):
        _add(recording, index, entries)
    return [recording]


def _answer(record: Mapping[str, Any]) -> dict[str, Any]:
    """What holds prompt_logprobs: the record, its response, or its only choice."""
    inner = record.get("response", record)
    holder = dict(inner) if isinstance(inner, Mapping) else {}
    choices = holder.get("choices")
    if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], Mapping):
        # Of a completion they are in the choice, of a chat beside it.
        holder = {**holder, **{k: v for k, v in choices[0].items() if v is not None}}
    return holder


def _required(answer: Mapping[str, Any], name: str) -> Any:
    value = answer.get(name)
    if not value:
        raise BadRecordError(f"record without {name}", f"found {value!r}")
    return value


def _positions(value: Any) -> list[Entries]:
    if isinstance(value, Mapping):
        return _flat(value)
    found: list[Entries] = []
    for entries in list_of(value, "logprobs"):
        if entries is None:
            found.append({})
            continue
        if not isinstance(entries, Mapping):
            raise BadRecordError("record whose logprobs are no dicts", f"found {entries!r:.80}")
        items = {}
        for key, entry in entries.items():
            if not _ID.fullmatch(key) or not isinstance(entry, Mapping):
                raise BadRecordError(
                    "record whose logprobs are no dicts", f"{key!r}: {entry!r:.80}"
                )
            items[token_id(int(key), "logprobs")] = _entry(entry.get("logprob"), entry.get("rank"))
        found.append(items)
    return found


def _flat(value: Mapping[str, Any]) -> list[Entries]:
    """vLLM's FlatLogprobs: parallel lists, and where each position begins and ends in them."""
    names = ("start_indices", "end_indices", "token_ids", "logprobs", "ranks")
    starts, ends, tokens, logprobs, ranks = (list_of(value.get(name), name) for name in names)
    if len(starts) != len(ends) or not len(tokens) == len(logprobs) == len(ranks):
        raise BadRecordError("record whose logprobs differ in length", "flat lists do not match")
    found = []
    for start, stop in zip(starts, ends, strict=True):
        if not 0 <= start <= stop <= len(tokens):
            raise BadRecordError("record whose flat logprobs end early", f"{start}:{stop}")
        # The chosen token comes first, and again where it is among the likeliest: that one counts.
        found.append(
            {
                token_id(tokens[i], "token_ids"): _entry(logprobs[i], ranks[i])
                for i in range(start, stop)
            }
        )
    return found


def _entry(logprob: Any, rank: Any) -> tuple[float, int | None]:
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if rank is not None and not (whole and 1 <= rank < 1 << 31):
        raise BadRecordError("record whose ranks are not 1 to n", f"found {rank!r:.80}")
    return number(logprob, "logprob"), rank


def _add(recording: Recording, index: int, entries: Entries) -> None:
    if not entries:
        recording.drop("position without logprobs")
        return
    chosen = recording.tokens[index + 1]
    if chosen not in entries:
        raise BadRecordError(
            "record whose tokens do not fit its logprobs",
            f"token {chosen!r} at {index + 1} is not among {list(entries)!r:.120}; vLLM always "
            "lists it",
        )
    ranked = {t: (logprob, rank) for t, (logprob, rank) in entries.items() if rank is not None}
    if len(ranked) == len(entries):
        top = top_by_rank(ranked, chosen)
    else:
        top = top_by_logprob([(t, logprob) for t, (logprob, _) in entries.items()], chosen, True)
    if not top.ids:
        recording.drop("position without certain logprobs")
        return
    recording.added |= top.added
    recording.positions.append(
        Position(index, top.ids, top.logprobs, chosen, top.label_logprob, top.label_rank)
    )
