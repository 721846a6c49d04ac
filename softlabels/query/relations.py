"""SQL of the relations that unfold a table's lists: `positions` and `entries`.

Only lists that the query's columns need are unfolded: DuckDB pushes filters on example_id and view
below the unfolding, but takes whole rows of lists through it.
"""

from collections.abc import Collection

POSITION_COLUMNS = (
    "example_id",
    "view",
    "num_positions",
    "topk_ids",
    "topk_logprobs",
    "tail_logprob",
    "position_entropy",
    "label_ids",
    "label_logprobs",
    "label_ranks",
    "input_ids",
    "position_index",
    "segment_ids",
)
"""Table columns that `positions` and `entries` are made of."""

_UNFOLDED = {
    "token_id": "unnest(list_select(input_ids, places))",
    "segment": "unnest(list_select(segment_ids, places))",
    "entropy": "unnest(position_entropy)",
    "tail_logprob": "unnest(tail_logprob)",
    "label_id": "unnest(label_ids)",
    "label_logprob": "unnest(label_logprobs)",
    "label_rank": "unnest(label_ranks)",
}
"""Columns of one value a position, besides `position` itself."""

# The factor that brings the head's probabilities to 1 - exp(tail); 1 where the tail is unknown.
_SCALE = """coalesce((1 - exp(tail_logprob::DOUBLE))
    / list_sum(list_transform(topk_logprobs, lambda x: exp(x::DOUBLE))), 1)"""

_POSITIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "entropy": ("entropy", ("entropy",)),
    "tail_logprob": ("tail_logprob", ("tail_logprob",)),
    "tail_prob": ("exp(tail_logprob::DOUBLE)::FLOAT", ("tail_logprob",)),
    "label_id": ("CASE WHEN label_id >= 0 THEN label_id END", ("label_id",)),
    "label_logprob": (
        "CASE WHEN label_id >= 0 THEN label_logprob END",
        ("label_id", "label_logprob"),
    ),
    "label_rank": ("CASE WHEN label_id >= 0 THEN label_rank END", ("label_id", "label_rank")),
    "top1_id": ("CASE WHEN first_id >= 0 THEN first_id END", ("first_id",)),
    "top1_prob": (
        f"CASE WHEN first_id >= 0 THEN (exp(topk_logprobs[1]::DOUBLE) * {_SCALE})::FLOAT END",
        ("first_id", "topk_logprobs", "tail_logprob"),
    ),
    "token_id": ("token_id", ("token_id",)),
    "segment": ("segment", ("segment",)),
    "topk_ids": ("topk_ids", ("topk_ids",)),
    "topk_logprobs": ("topk_logprobs", ("topk_logprobs",)),
}
"""Columns of `positions` besides the three keys: SQL, and what it takes of `_heads`."""

POSITIONS = ("example_id", "view", "position", *_POSITIONS)
ENTRIES = ("example_id", "view", "position", "rank", "id", "logprob", "prob")
CLASSES = ("id", "name")
"""Columns of the relations, in order."""


def positions_sql(schema: str, k: int, wanted: Collection[str] | None) -> str:
    """The SELECT that `positions` is.

    Args:
        schema: what stands before `labels`: nothing, or a quoted name and a dot.
        k: stored ids a position.
        wanted: lower-case names of columns that will be read; others may be left out. None: all.
    """
    shown = {name: of for name, of in _POSITIONS.items() if wanted is None or name in wanted}
    parts = {part for _, parts in shown.values() for part in parts}
    columns = "".join(f", {sql} AS {name}" for name, (sql, _) in shown.items())
    return f'SELECT example_id, "view", position{columns} FROM ({_heads(schema, k, parts)})'


def entries_sql(schema: str, k: int, wanted: Collection[str] | None) -> str:
    """The SELECT that `entries` is. Arguments as `positions_sql`."""
    parts = {"topk_ids"}
    logprob = prob = scale = ""
    if wanted is None or not {"logprob", "prob"}.isdisjoint(wanted):
        parts.add("topk_logprobs")
        logprob = ", unnest(topk_logprobs) AS logprob"
    if wanted is None or "prob" in wanted:
        parts.add("tail_logprob")
        prob = ", (exp(logprob::DOUBLE) * scale)::FLOAT AS prob"
        scale = f", {_SCALE} AS scale"
    return f"""
        SELECT example_id, "view", position, rank, id{", logprob" if logprob else ""}{prob}
        FROM (
            SELECT example_id, "view", position{", scale" if scale else ""},
                unnest(range(len(topk_ids)))::INTEGER AS rank,
                unnest(topk_ids) AS id{logprob}
            FROM (SELECT *{scale} FROM ({_heads(schema, k, parts)}))
        ) WHERE id >= 0
    """


def _heads(schema: str, k: int, parts: Collection[str]) -> str:
    """SQL that gives a row a position: keys, and of `parts` single values and lists of k."""
    unfolded = [f"{_UNFOLDED[name]} AS {name}" for name in _UNFOLDED if name in parts]
    lists = []
    for column, kind in (("topk_ids", "INTEGER"), ("topk_logprobs", "FLOAT")):
        if column not in parts:
            continue
        # Unnesting every k-th element, rank by rank: slices by position would cost P squared.
        unfolded += [f"unnest({column}[{r + 1}:-:{k}]) AS {column}_{r}" for r in range(k)]
        lists.append(f"[{', '.join(f'{column}_{r}' for r in range(k))}]::{kind}[] AS {column}")
    if "first_id" in parts and k:
        unfolded.append(f"unnest(topk_ids[1:-:{k}]) AS first_id")
    elif "first_id" in parts:
        lists.append("NULL::INTEGER AS first_id")
    single = [
        name for name in (*_UNFOLDED, "first_id") if name in parts and (k or name != "first_id")
    ]
    return f"""
        SELECT {", ".join(['example_id, "view", position', *single, *lists])}
        FROM (
            SELECT {", ".join(['example_id, "view"', _POSITION, *unfolded])}
            FROM (
                SELECT *, list_transform(position_index, lambda i: i + 1) AS places
                FROM {schema}labels
            )
        )
    """


_POSITION = "unnest(range(num_positions))::INTEGER AS position"
