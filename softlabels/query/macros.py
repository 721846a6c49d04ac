"""Macros for users' SQL: what rows of `labels` and `positions` say, in one word.

An argument is a row, given by the name or alias of its relation. Rows of `labels` must hold one
distribution, as classification's do; of sequences, take rows of `positions`.

    prob_of(l, 3)   the probability of id 3, rescaled as `prob` where the head holds it; else the
                    hard label's, where 3 is that; 0 where nothing lies outside the head; otherwise
                    NULL, for its share of the tail is not known
    margin(l)       the largest probability minus the second, rescaled; NULL where one id is stored
    agree(a, b)     whether both have the same most probable id
    kl(a, b)        KL(a‖b) in nats, over the ids that both store and one class for all the rest:
                    never more than the full KL, and equal to it where both store every id;
                    infinite where b has no mass for what a has; NULL where a tail is not known

An alias that is also a column's name means the column: call it something else.

Source: for kl, the log sum inequality (Cover & Thomas, Elements of Information Theory, theorem
2.7.1): classes that are joined lower KL.
"""

import duckdb

from softlabels.query.sql import quote_text

_ROW_COLUMNS = ("topk_ids", "topk_logprobs", "tail_logprob", "top1_id", "label_id", "label_ids")
_SEVERAL = quote_text(
    "a row of labels holds several distributions: take rows of positions for prob_of, margin, kl"
)

# `labels` holds lists of P values, `positions` values: DuckDB chooses a macro by its first type.
_ONE = f"""
CREATE MACRO softlabels_tail(x FLOAT, l) AS nullif(x::DOUBLE, 'nan'::DOUBLE), (x FLOAT[], l) AS
    CASE WHEN (l).num_positions > 1 THEN error({_SEVERAL})
        ELSE nullif(x[1]::DOUBLE, 'nan'::DOUBLE) END;
CREATE MACRO softlabels_label(x FLOAT, l) AS (l).label_id, (x FLOAT[], l) AS (l).label_ids[1];
CREATE MACRO softlabels_label_logprob(x FLOAT, l) AS (l).label_logprob,
    (x FLOAT[], l) AS (l).label_logprobs[1];
"""

_SCALE = """
CREATE MACRO softlabels_mass(logprobs) AS
    coalesce(list_sum(list_transform(logprobs, lambda x: exp(x::DOUBLE))), 0);
CREATE MACRO softlabels_scale(l) AS coalesce(
    (1 - exp(softlabels_tail((l).tail_logprob, l))) / softlabels_mass((l).topk_logprobs), 1);
"""

_ROW = """
CREATE MACRO prob_of(l, id) AS CASE
    WHEN id IS NULL OR id < 0 THEN NULL
    WHEN list_contains((l).topk_ids, id) THEN
        exp((l).topk_logprobs[list_position((l).topk_ids, id)]::DOUBLE) * softlabels_scale(l)
    WHEN softlabels_tail((l).tail_logprob, l) = '-inf'::DOUBLE THEN 0
    WHEN softlabels_label((l).tail_logprob, l) = id THEN
        exp(softlabels_label_logprob((l).tail_logprob, l)::DOUBLE)
    END;
CREATE MACRO margin(l) AS
    (exp((l).topk_logprobs[1]::DOUBLE) - exp((l).topk_logprobs[2]::DOUBLE)) * softlabels_scale(l);
CREATE MACRO agree(a, b) AS (a).top1_id = (b).top1_id;
"""

# With head probabilities s·e^x of a and t·e^y of b, the ids S that both store add
#   s·Σ_S e^x·(x − y) + s·ln(s/t)·Σ_S e^x,
# so the scales stay out of the loops. What a does not share is u = Σ e^x outside S; its rest is
# e^tail + s·u, and exactly 0 where nothing is left. Padding has x = -inf and adds nothing.
_KL = """
CREATE MACRO softlabels_shared(a, b) AS list_filter(
    list_transform((a).topk_ids, lambda i, n: {
        'x': (a).topk_logprobs[n]::DOUBLE,
        'y': (b).topk_logprobs[list_position((b).topk_ids, i)]::DOUBLE}),
    lambda e: e.y IS NOT NULL);
CREATE MACRO softlabels_rest(a, b) AS
    exp(softlabels_tail((a).tail_logprob, a)) + softlabels_scale(a) * coalesce(list_sum(
        list_transform((a).topk_ids, lambda i, n: CASE WHEN list_contains((b).topk_ids, i)
            THEN 0::DOUBLE ELSE exp((a).topk_logprobs[n]::DOUBLE) END)), 0);
CREATE MACRO softlabels_term(p, q) AS
    CASE WHEN p <= 0 THEN 0::DOUBLE WHEN q <= 0 THEN 'inf'::DOUBLE
        WHEN q IS NOT NULL THEN p * ln(p / q) END;
CREATE MACRO softlabels_head(shared, s, t) AS
    s * coalesce(list_sum(list_transform(shared, lambda e:
        CASE WHEN e.x = '-inf'::DOUBLE THEN 0::DOUBLE ELSE exp(e.x) * (e.x - e.y) END)), 0)
    + s * CASE WHEN s > 0 AND t > 0 THEN ln(s / t) ELSE 0 END
        * coalesce(list_sum(list_transform(shared, lambda e: exp(e.x))), 0);
CREATE MACRO kl(a, b) AS CASE
    WHEN softlabels_tail((a).tail_logprob, a) IS NULL THEN NULL
    WHEN softlabels_tail((b).tail_logprob, b) IS NULL THEN NULL
    ELSE greatest(0, softlabels_head(softlabels_shared(a, b), softlabels_scale(a),
            softlabels_scale(b)) + softlabels_term(softlabels_rest(a, b), softlabels_rest(b, a)))
    END;
"""


def define(con: duckdb.DuckDBPyConnection) -> None:
    """Makes the macros in a connection whose configuration is not locked yet."""
    con.execute(_ONE + _SCALE + _ROW + _KL)


def explain(reason: str) -> str:
    """What DuckDB says is wrong, in users' words where it is about the inside of a macro."""
    inside = "softlabels_" in reason or any(
        f'Could not find key "{name}" in struct' in reason for name in _ROW_COLUMNS
    )
    if not inside:
        return reason
    return (
        "prob_of, margin, agree and kl take rows: the name or alias of `labels` or `positions`, "
        f"or of a subquery with all their columns, found another thing ({reason})"
    )
