"""The recipe: which rows of which table versions, how often and with what weight.

    seed: 0
    sources:
      trusted:                        # the name of the source
        table: out/labels@v1          # TABLE, TABLE@tag or TABLE@version
        where: "top1_id = label"      # one SQL expression over the table's columns
        weight: 2                     # share of the epoch, relative to the other sources
      rest:
        table: out/labels@v1
        where: "top1_id <> label"
        weight: 1
        positions: "entropy > 0.5"    # of language models: where the loss is spent
    rows: 20000                       # rows an epoch

Rows of a version pass `where`, then `fraction`, then `limit`; then those without a position that
passes `positions` are dropped; `weight` or `repeats` says how often those that are left come in an
epoch.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from softlabels.errors import BadInputError
from softlabels.query.positions import Positions
from softlabels.query.sql import check_expression
from softlabels.specs import load_spec

Positive = Annotated[FiniteFloat, Field(gt=0)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


class Source(_Settings):
    """Rows of one table version.

    Which rows a fraction, a limit or a part of a repeat takes is decided by a hash of (seed,
    example_id, view): the same rows from any layout of shards, and a smaller subset lies within
    a larger one.

    Attributes:
        table: reference of the table version.
        where: SQL expression over the columns of `labels`; None: all rows.
        fraction: of the rows, above 0 to 1; exact up to chance, as each row is judged alone.
        limit: most rows that are kept.
        positions: which positions of these rows are learnt from, and with what weight.
        weight: share of the epoch relative to the other sources. Every source has one or none.
        repeats: times each row comes in an epoch; 1.5: once, and half of the rows once more.
        loss_weight: factor of each row's loss.
        stage: stages are read one after the other, by rising number.
    """

    table: str
    where: str | None = None
    fraction: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    limit: Annotated[int, Field(gt=0)] | None = None
    positions: Positions | None = None
    weight: Positive | None = None
    repeats: Annotated[FiniteFloat, Field(gt=0, le=1_000_000)] | None = None
    loss_weight: Positive = 1.0
    stage: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _weight_or_repeats(self) -> Self:
        if self.weight is not None and self.repeats is not None:
            raise ValueError("weight and repeats both say how often rows come: give one of them")
        return self


class Recipe(_Settings):
    """What `mix` freezes into a plan.

    Attributes:
        sources: by name, in the order in which they are read within a stage.
        seed: of the hash that takes subsets.
        rows: rows an epoch, where sources have weights. None: the fewest that let every kept
            row come at least once, so that the source with the most rows for its share is read
            once and the others are repeated.
    """

    sources: Mapping[str, Source] = Field(min_length=1)
    seed: int = 0
    rows: Annotated[int, Field(gt=0)] | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """The recipe in a YAML file.

        Raises:
            BadInputError: the file is no YAML mapping, a key is unknown or double, a value is
                wrong, or `where` is not one expression.
        """
        recipe = load_spec(path, cls)
        for name, source in recipe.sources.items():
            if source.where is not None:
                try:
                    check_expression(source.where)
                except BadInputError as error:
                    raise BadInputError(f"{os.fspath(path)}: source {name!r}: {error}") from error
        return recipe

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> Self:
        without = [name for name, source in self.sources.items() if source.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(f"source {without[0]!r} has no weight, others have: give all or none")
        if without and self.rows is not None:
            raise ValueError("rows is the length of an epoch that weights share: give weights")
        return self

    @property
    def weighted(self) -> bool:
        """Whether sources have weights."""
        return all(source.weight is not None for source in self.sources.values())

    def normalised(self) -> dict[str, Any]:
        """Plain values without table locations: equal recipes give equal values anywhere."""
        sources = [
            {"name": name, **source.model_dump(mode="json", exclude={"table"}, exclude_none=True)}
            for name, source in self.sources.items()
        ]
        rows = {} if self.rows is None else {"rows": self.rows}
        return {"seed": self.seed, "sources": sources, **rows}
