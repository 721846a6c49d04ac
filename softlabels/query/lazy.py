"""Tables as Polars LazyFrames: the same relations, columns and values as in SQL."""

import polars as pl

from softlabels.query.view import FILE_COLUMN, ROW_COLUMN, open_tables, read_footer, read_remote
from softlabels.store.table import Table


def scan(table: str | Table) -> pl.LazyFrame:
    """The `labels` relation: a row an example, all columns of the table.

    On this machine nothing is read until it is collected, and then only the columns and row
    groups that are asked for. From elsewhere the version is read into memory.

    Args:
        table: a reference or an open table; only the files of that version are read.

    Raises:
        IntegrityError: a file has another length or footer than the log says.
        StorageError: a file is missing.
    """
    opened = open_tables(table)[""]
    if opened.root.is_local and opened.files:
        for file in opened.files:
            read_footer(opened, file)
        paths = [opened.root.full(file.path) for file in opened.files]
        return pl.scan_parquet(paths, glob=False, hive_partitioning=False)
    rows = read_remote(opened, opened.files).drop_columns([FILE_COLUMN, ROW_COLUMN])
    return pl.DataFrame(rows).lazy()


def scan_positions(table: str | Table) -> pl.LazyFrame:
    """The `positions` relation: a row a position. Arguments and errors as `scan`.

    A filter on it is applied after lists are unfolded: filter `scan(table)` first where rows are
    known, or use SQL.
    """
    labelled = pl.col("label_id") >= 0
    first = pl.col("ids").list.get(0, null_on_oob=True)
    top1_prob = _prob(pl.col("logprobs").list.get(0, null_on_oob=True))
    return _heads(table).select(
        "example_id",
        "view",
        "position",
        "entropy",
        "tail_logprob",
        pl.col("tail_logprob").cast(pl.Float64).exp().cast(pl.Float32).alias("tail_prob"),
        pl.when(labelled).then("label_id").alias("label_id"),
        pl.when(labelled).then("label_logprob").alias("label_logprob"),
        pl.when(labelled).then("label_rank").alias("label_rank"),
        pl.when(first >= 0).then(first).alias("top1_id"),
        pl.when(first >= 0).then(top1_prob).alias("top1_prob"),
        "token_id",
        "segment",
        pl.col("ids").alias("topk_ids"),
        pl.col("logprobs").alias("topk_logprobs"),
    )


def scan_entries(table: str | Table) -> pl.LazyFrame:
    """The `entries` relation: a row a stored id. Arguments and errors as `scan`."""
    ranks = pl.int_ranges(0, pl.col("ids").list.len(), dtype=pl.Int32)
    return (
        _heads(table)
        .with_columns(rank=ranks, id=pl.col("ids"), logprob=pl.col("logprobs"))
        .select("example_id", "view", "position", "rank", "id", "logprob", "scale")
        .explode("rank", "id", "logprob")
        .filter(pl.col("id") >= 0)
        .select(pl.exclude("scale"), _prob(pl.col("logprob")).alias("prob"))
    )


def _heads(table: str | Table) -> pl.LazyFrame:
    """A row a position, with its ids and logprobs as lists, and the head's scale."""
    opened = open_tables(table)[""]
    k = opened.contents.k
    count = pl.col("num_positions")

    def each(values: str | pl.Expr, kind: type[pl.DataType]) -> pl.Expr:
        lists = pl.col(values) if isinstance(values, str) else values
        nulls = pl.lit(None, kind).repeat_by(count)
        return pl.when(lists.is_null()).then(nulls).otherwise(lists).explode()

    def at_places(name: str) -> pl.Expr:
        return each(pl.col(name).list.gather(pl.col("position_index")), pl.Int32)

    def chunks(name: str, kind: type[pl.DataType]) -> pl.Expr:
        if not k:
            return pl.lit([], pl.List(kind)).repeat_by(count).explode()
        return pl.col(name).explode().reshape((-1, k)).arr.to_list()

    mass = pl.col("logprobs").list.eval(pl.element().cast(pl.Float64).exp()).list.sum()
    head = 1 - pl.col("tail_logprob").cast(pl.Float64).exp()
    return (
        scan(opened)
        .filter(count > 0)
        .select(
            pl.col("example_id").repeat_by(count).explode(),
            pl.col("view").repeat_by(count).explode(),
            pl.int_ranges(0, count, dtype=pl.Int32).explode().alias("position"),
            each("position_entropy", pl.Float32).alias("entropy"),
            each("tail_logprob", pl.Float32).alias("tail_logprob"),
            each("label_ids", pl.Int32).alias("label_id"),
            each("label_logprobs", pl.Float32).alias("label_logprob"),
            each("label_ranks", pl.Int32).alias("label_rank"),
            at_places("input_ids").alias("token_id"),
            at_places("segment_ids").alias("segment"),
            chunks("topk_ids", pl.Int32).alias("ids"),
            chunks("topk_logprobs", pl.Float32).alias("logprobs"),
        )
        .with_columns(scale=(head / mass).fill_null(1.0))
    )


def _prob(logprob: pl.Expr) -> pl.Expr:
    return (logprob.cast(pl.Float64).exp() * pl.col("scale")).cast(pl.Float32)
