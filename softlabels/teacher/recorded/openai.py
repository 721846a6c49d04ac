"""OpenAI-compatible responses: chat and completions, with `top_logprobs`."""

from collections.abc import Mapping, Sequence
from typing import Any

from softlabels.teacher.recorded.entries import (
    CLAMP,
    BadRecordError,
    Position,
    Recording,
    Top,
    list_of,
    number,
    token_ids,
    top_by_logprob,
)
from softlabels.teacher.recorded.reader import Context
from softlabels.teacher.recorded.vocabulary import UnknownTokenError

Pairs = list[tuple[Any, Any, Any]]
"""(token string, its bytes or None, logprob) as they were listed."""


def read(record: Mapping[str, Any], context: Context) -> list[Recording]:
    """The sequences of one response, one a choice.

    A line may be the response itself, with the request's messages or prompt beside its choices,
    a batch result ({response: {body}}), or {request, response}.

    Raises:
        BadRecordError: it has no log-probabilities, or they cannot be read exactly.
    """
    response = _inside(record, "response")
    answer = _inside(response, "body")
    request = _inside(_inside(record, "request"), "body") if "request" in record else record
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices:
        raise BadRecordError("record without choices", f"keys are {list(answer)!r:.120}")
    context.require_temperature(request, record)
    found = []
    for number_, choice in enumerate(choices):
        if not isinstance(choice, Mapping):
            raise BadRecordError("record without choices", f"choice {number_} is {choice!r:.80}")
        name = context.name(record)
        if name is not None and len(choices) > 1:
            name = f"{name}#{choice.get('index', number_)}"
        logprobs = choice.get("logprobs")
        if not isinstance(logprobs, Mapping):
            raise BadRecordError("record without logprobs", f"choice {number_} has {logprobs!r}")
        holder = {"usage": answer.get("usage"), **answer, **choice}
        chat = "content" in logprobs
        reader = _chat if chat else _completion
        found.append(reader(context, name, request, holder, logprobs))
    return found


def _inside(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    inner = record.get(name)
    return inner if isinstance(inner, Mapping) else record


def _chat(
    context: Context,
    name: str | None,
    request: Mapping[str, Any],
    answer: Mapping[str, Any],
    logprobs: Mapping[str, Any],
) -> Recording:
    items = logprobs.get("content")
    if not isinstance(items, list) or not items:
        raise BadRecordError("record without logprobs", f"content is {items!r}")
    for item in items:
        if not isinstance(item, Mapping) or not isinstance(item.get("top_logprobs"), list):
            raise BadRecordError("record without top_logprobs", f"found {item!r:.80}")
    completion = _completion_ids(context, answer, [(i.get("token"), i.get("bytes")) for i in items])
    prompt = context.prompt(request, answer)
    recording = Recording(name, prompt + completion, first_position=bool(prompt))
    for place, item in enumerate(items):
        index = len(prompt) + place - 1
        listed = [_entry(entry) for entry in item["top_logprobs"]]
        # vLLM lists the chosen token first, also where it is not among the likeliest.
        moved = len(listed) == 1 or (len(listed) > 1 and listed[0][2] < listed[1][2])
        logprob = number(item.get("logprob"), "logprob")
        _add(context, recording, index, listed, logprob, completion[place], moved)
    return recording


def _completion(
    context: Context,
    name: str | None,
    request: Mapping[str, Any],
    answer: Mapping[str, Any],
    logprobs: Mapping[str, Any],
) -> Recording:
    lists = {key: logprobs.get(key) for key in ("tokens", "token_logprobs", "top_logprobs")}
    if lists["tokens"] is None or lists["top_logprobs"] is None:
        missing = next(key for key, value in lists.items() if value is None)
        raise BadRecordError("record without top_logprobs", f"logprobs has no {missing!r}")
    tokens, chosen, tops = (list_of(value, key) for key, value in lists.items())
    if not tokens:
        raise BadRecordError("record without logprobs", "tokens is empty")
    if not len(tokens) == len(chosen) == len(tops):
        raise BadRecordError(
            "record whose logprobs differ in length",
            f"{len(tokens)} tokens, {len(chosen)} token_logprobs, {len(tops)} top_logprobs",
        )
    # With echo the prompt's tokens come first, and the very first has no distribution.
    echo = chosen[0] is None
    prompt = [] if echo else context.prompt(request, answer)
    recording = Recording(name, prompt, first_position=bool(prompt))
    recording.tokens = prompt + _completion_ids(
        context, {} if echo else answer, [(token, None) for token in tokens]
    )
    for place, (logprob, top) in enumerate(zip(chosen, tops, strict=True)):
        index = len(prompt) + place - 1
        if index < 0:
            continue
        if not top:
            recording.drop("position without logprobs")
            continue
        known = CLAMP if logprob is None else number(logprob, "token_logprobs")
        _add(context, recording, index, _listed(top), known, recording.tokens[index + 1], True)
    return recording


def _listed(top: Any) -> Pairs:
    if isinstance(top, Mapping):
        return [(text, None, number(value, "top_logprobs")) for text, value in top.items()]
    return [_entry(entry) for entry in list_of(top, "top_logprobs")]


def _entry(entry: Any) -> tuple[Any, Any, float]:
    if not isinstance(entry, Mapping):
        raise BadRecordError("record without top_logprobs", f"found {entry!r:.80}")
    return entry.get("token"), entry.get("bytes"), number(entry.get("logprob"), "logprob")


def _completion_ids(
    context: Context, answer: Mapping[str, Any], tokens: Sequence[tuple[Any, Any]]
) -> list[int]:
    if answer.get("token_ids") is not None:
        found = token_ids(answer["token_ids"], "token_ids")
        if len(found) != len(tokens):
            raise BadRecordError(
                "record whose logprobs differ in length",
                f"{len(found)} token_ids, {len(tokens)} logprobs",
            )
        return found
    found = []
    for text, data in tokens:
        try:
            found.append(context.tokens.find(text, data))
        except UnknownTokenError as error:
            raise BadRecordError(f"record with a chosen token {error}", f"{text!r:.80}") from error
    return found


def _add(
    context: Context,
    recording: Recording,
    index: int,
    listed: Pairs,
    logprob: float,
    chosen: int,
    may_be_added: bool,
) -> None:
    """Adds the position before token `index` + 1, unless there is no such place or no exact top."""
    if index < 0:
        return
    try:
        pairs = [(context.tokens.find(text, data), value) for text, data, value in listed]
    except UnknownTokenError as error:
        recording.drop(f"position with a token {error}")
        return
    top: Top = top_by_logprob(pairs, chosen, may_be_added)
    if not top.ids:
        recording.drop("position without certain logprobs")
        return
    recording.added |= top.added
    value = top.label_logprob
    if chosen not in top.ids and CLAMP < logprob <= 0:
        value = logprob
    recording.positions.append(
        Position(index, top.ids, top.logprobs, chosen, value, top.label_rank)
    )
