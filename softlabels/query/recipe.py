"""The recipe: which rows of which table versions, how often and with what weight.

    seed: 0                           # of the hash that takes subsets
    once: true                        # an example of several sources comes from the first alone
    rows: 20000                       # rows an epoch
    sources:
      trusted:                        # the name of the source
        table: out/labels@v1          # TABLE, TABLE@tag or TABLE@version
        where: "top1_id = label"      # one SQL expression over the table's columns
        exclude: suspects.parquet     # without the examples of this file
        split: {take: train, holdout: 0.1, seed: 0}     # or take: holdout
        fraction: 0.5                 # of the rows that are left
        limit: {each: 100, by: label} # at most 100 of each class; a plain 5000: of all
        balance: {by: label}          # classes come alike; with temperature: 2, by √n
        weight: 2                     # share of the epoch, relative to the other sources
      unsure:
        table: out/labels@v1
        sample_by: "1 - top1_prob"    # reads of a row, relative to the others
        weight: 1
        loss_weight: 0.5              # factor of each row's loss
        stage: 1                      # read after all of stage 0
        positions: "entropy > 0.5"    # of language models: where the loss is spent
      both:
        ensemble:                     # several teachers' targets of each row
          resnet: {table: out/resnet@v1, weight: 2}
          vit: {table: out/vit@v3, weight: "top1_prob", by_class: {shirt: 3}, temperature: 2}
        weight: 1
      best:
        choose:                       # one teacher of each row
          from: {resnet: out/resnet@v1, vit: out/vit@v3}
          by: top1_prob               # the greatest value; "-entropy": the least entropy
          agreeing: label             # but first of those whose first class is this
        weight: 1

Where no source has a weight there is no `rows`, and `repeats: 1.5` says how often rows come.

Rows of a version pass `where`, then `exclude`, `split`, `once`, `fraction` and `limit`; then those
without a position that passes `positions` are dropped, and those that a teacher of an ensemble has
not.
`weight` or `repeats` says how many rows of those that are left come in an epoch, and `balance` or
`sample_by` how often which; without them all come alike.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from softlabels.errors import BadInputError
from softlabels.query.members import Member
from softlabels.query.positions import SMALLEST, LossWeight, Positions
from softlabels.query.sql import check_expression
from softlabels.rules import LARGEST
from softlabels.specs import RealNumber, WholeNumber, load_spec

Positive = Annotated[RealNumber, Field(gt=0)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


class Split(_Settings):
    """One side of a split by a hash of example_id alone: all views of an example lie on one side.

    The sides do not change when rows are added, and are the same in any table and recipe.

    Attributes:
        take: which side: train or holdout.
        holdout: its share of the examples, between 0 and 1, exact up to chance.
        seed: of the split; independent of the recipe's.
    """

    take: Literal["train", "holdout"]
    holdout: Annotated[RealNumber, Field(gt=0, lt=1)]
    seed: WholeNumber = 0


class Each(_Settings):
    """A limit for each value.

    Attributes:
        each: most rows of each value.
        by: column or SQL expression; rows without a value (NULL) are dropped.
    """

    each: Annotated[WholeNumber, Field(gt=0)]
    by: str


class Balance(_Settings):
    """How often rows come so that values have the shares wanted.

    Each value's reads are divided evenly among its rows, one more for those of the lowest hashes.

    Attributes:
        by: column or SQL expression; rows without a value (NULL) are dropped.
        temperature: T, from 1: shares go with n^(1/T), n the rows of a value. 1: as they are,
            2: by the square root. None: all values alike.
    """

    by: str
    temperature: Annotated[RealNumber, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_is_by(cls, value: Any) -> Any:
        return {"by": value} if isinstance(value, str) else value


class Choose(_Settings):
    """One teacher of each example.

    Attributes:
        teachers: references of table versions by name, written `from`. The first one's rows are
            the examples, and its columns are those of `where`, `limit` and the like.
        by: a number by SQL over each table's own columns. The teacher with the greatest value is
            read, the first listed of equal ones; one without a value (NULL, NaN) comes last.
        agreeing: column of the first table that holds a class id: teachers whose top1_id is that
            class come before all others.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    teachers: Mapping[str, str] = Field(alias="from", min_length=2)
    by: str
    agreeing: str | None = None


def _kind_of_limit(value: Any) -> str:
    return "values" if isinstance(value, Mapping | Each) else "rows"


Limit = Annotated[
    Annotated[Annotated[WholeNumber, Field(gt=0)], Tag("rows")] | Annotated[Each, Tag("values")],
    Discriminator(_kind_of_limit),
]


class Source(_Settings):
    """Rows of one table version, of an ensemble's, or of the best of several teachers for each.

    Which rows a fraction, a limit or a part of a repeat takes is decided by a hash of (seed,
    example_id, view): the same rows from any layout of shards, and a smaller subset lies within
    a larger one.

    Attributes:
        table: reference of the table version. Every source has this, `ensemble` or `choose`.
        ensemble: teachers by name, at least two, whose targets of an example are mixed. The first
            one's table says which rows and labels there are.
        choose: teachers of which each example has the best.
        where: SQL expression over the columns of `labels`; None: all rows.
        exclude: a local Parquet, CSV or JSON file with a column example_id and, where single views
            are meant, view, like `suspects -o` writes; rows in it are dropped. The plan knows it by
            what it holds, not by its path.
        split: a side of a split by example_id.
        fraction: of the rows, above 0 to 1; exact up to chance, as each row is judged alone.
        limit: most rows that are kept, or {each: most rows of each value, by: column}.
        balance: shares of the values of a column.
        sample_by: SQL expression, finite and at least 0: reads of a row relative to the others.
            They differ from what is expected by less than 1; rows of 0 are dropped.
        positions: which positions of these rows are learnt from, and with what weight.
        weight: share of the epoch relative to the other sources. Every source has one or none.
        repeats: times each row comes in an epoch; 1.5: once, and half of the rows once more.
        loss_weight: factor of each row's loss, which a float32 must hold without loss of digits;
            so must its product with a position's weight.
        stage: stages are read one after the other, by rising number.
    """

    table: str | None = None
    ensemble: Annotated[Mapping[str, Member], Field(min_length=2)] | None = None
    choose: Choose | None = None
    where: str | None = None
    exclude: Annotated[str, Field(min_length=1)] | None = None
    split: Split | None = None
    fraction: Annotated[RealNumber, Field(gt=0, le=1)] | None = None
    limit: Limit | None = None
    balance: Balance | None = None
    sample_by: str | None = None
    positions: Positions | None = None
    weight: Positive | None = None
    repeats: Annotated[RealNumber, Field(gt=0, le=1_000_000)] | None = None
    loss_weight: LossWeight = 1.0
    stage: Annotated[WholeNumber, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        given = [k for k in ("table", "ensemble", "choose") if getattr(self, k) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(
                f"give exactly one of table, ensemble and choose: where rows are; found {found}"
            )
        if self.weight is not None and self.repeats is not None:
            raise ValueError("weight and repeats both say how often rows come: give one of them")
        if self.balance is not None and self.sample_by is not None:
            raise ValueError("balance and sample_by both say how often which row comes: give one")
        for rule in (self.positions and self.positions.weights) or ():
            if not SMALLEST <= (product := rule.weight * self.loss_weight) <= LARGEST:
                raise ValueError(
                    f"loss_weight {self.loss_weight!r} times a position's weight {rule.weight!r} "
                    f"is {product!r}: expected {SMALLEST:.3g} to {LARGEST:.3g}"
                )
        return self

    @property
    def references(self) -> dict[str, str]:
        """References of its table versions by teacher; the only one of a plain source is ""."""
        if self.ensemble is not None:
            return {name: member.table for name, member in self.ensemble.items()}
        return dict(self.choose.teachers) if self.choose else {"": str(self.table)}

    def expressions(self) -> Iterator[tuple[str, str]]:
        """The keys that hold SQL over the first table's columns, and the SQL."""
        by = {
            "where": self.where,
            "limit.by": self.limit.by if isinstance(self.limit, Each) else None,
            "balance.by": self.balance.by if self.balance else None,
            "sample_by": self.sample_by,
            "choose.by": self.choose.by if self.choose else None,
            "choose.agreeing": self.choose.agreeing if self.choose else None,
        }
        return ((key, text) for key, text in by.items() if text is not None)

    def normalised(self) -> dict[str, Any]:
        """Plain values without locations: neither of tables nor of the file of `exclude`."""
        found = self.model_dump(
            mode="json", exclude={"table", "ensemble", "choose", "exclude"}, exclude_none=True
        )
        # Lists where order counts: keys of a mapping are sorted before they are digested.
        if self.ensemble is not None:
            members = self.ensemble.items()
            found["ensemble"] = [{"name": name, **m.normalised()} for name, m in members]
        if self.choose is not None:
            found["choose"] = {
                "from": list(self.choose.teachers),
                **self.choose.model_dump(mode="json", exclude={"teachers"}, exclude_none=True),
            }
        return found


class Recipe(_Settings):
    """What `mix` freezes into a plan.

    Attributes:
        sources: by name, in the order in which they are read within a stage.
        seed: of the hash that takes subsets.
        once: whether an example (example_id, view) that several sources select comes once: from
            the first of them, in the order of the recipe. One that a source selects and then does
            not read, for its weight, repeats, balance or sample_by, does not come from another.
        rows: rows an epoch, where sources have weights. None: the fewest that let every kept
            row come at least once, so that the source with the most rows for its share is read
            once and the others are repeated.
    """

    sources: Mapping[str, Source] = Field(min_length=1)
    seed: WholeNumber = 0
    once: bool = False
    rows: Annotated[WholeNumber, Field(gt=0)] | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """The recipe in a YAML file.

        Raises:
            BadInputError: the file is no YAML mapping, a key is unknown or double, a value is
                wrong, or `where` or another SQL is not one expression.
        """
        recipe = load_spec(path, cls)
        for name, source in recipe.sources.items():
            for key, text in source.expressions():
                try:
                    check_expression(text, key)
                except BadInputError as error:
                    where = f"{os.fspath(path)}: source {name!r}"
                    raise BadInputError(f"{where}: {error}") from error
        return recipe

    @field_validator("sources")
    @classmethod
    def _names_can_be_shown(cls, sources: Mapping[str, Source]) -> Mapping[str, Source]:
        teachers = [name for source in sources.values() for name in source.references if name]
        for name in [*sources, *teachers]:
            if not name.strip() or not name.isprintable():
                raise ValueError(f"{name!r} is no name: expected characters that can be shown")
        return sources

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

    def normalised(self, excluded: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Plain values without locations: equal recipes give equal values anywhere.

        Args:
            excluded: by source, the digest of what its `exclude` holds, for each that has one.
        """
        sources = [
            {
                "name": name,
                **source.normalised(),
                **({"exclude": (excluded or {})[name]} if source.exclude is not None else {}),
            }
            for name, source in self.sources.items()
        ]
        once = {"once": True} if self.once else {}
        rows = {} if self.rows is None else {"rows": self.rows}
        return {"seed": self.seed, "sources": sources, **once, **rows}
