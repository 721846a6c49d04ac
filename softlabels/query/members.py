"""Settings of the teachers of an ensemble, as recipes write them.

resnet: out/resnet@v1                    # a reference alone: weight 1
vit:
  table: out/vit@v3
  weight: "top1_prob"                    # a number, or SQL over this teacher's own `labels`
  by_class: {shirt: 3.0}                 # in its place, for examples of this hard label
  temperature: 2                         # at which its targets are taken; it must be stored
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from softlabels.errors import BadInputError
from softlabels.query.sql import check_expression
from softlabels.specs import RealNumber, written_as_number

Weight = Annotated[RealNumber, Field(ge=0)]


class Member(BaseModel):
    """One teacher of an ensemble.

    Weights are relative: those of an example's teachers are divided by their sum.

    Attributes:
        table: reference of the table version that holds what it said.
        weight: a number, or an SQL expression over the columns of its own `labels`, which must be
            finite and not below 0.
        by_class: the weight of examples whose hard label, in the first teacher's table, is this
            class: by name, or by id where no class has that name. Other examples, and those
            without a label, have `weight`.
        temperature: at which its targets are taken: 1, or one that its table stores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    table: str
    weight: Weight | str = 1.0
    by_class: Mapping[str | int, Weight] = {}
    temperature: Annotated[RealNumber, Field(gt=0)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _table_alone(cls, value: Any) -> Any:
        return {"table": value} if isinstance(value, str) else value

    @field_validator("by_class", mode="before")
    @classmethod
    def _no_truth(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and any(isinstance(name, bool) for name in value):
            raise ValueError(
                "expected class names or ids: YAML takes yes, no, on, off for truth "
                "values, so quote such names"
            )
        return value

    @field_validator("weight", mode="before")
    @classmethod
    def _number_or_text(cls, value: Any) -> Any:
        # Text is SQL, which "2" is too.
        return value if isinstance(value, str) else written_as_number(value)

    @field_validator("weight")
    @classmethod
    def _one_expression(cls, value: float | str) -> float | str:
        if isinstance(value, str):
            try:
                check_expression(value)
            except BadInputError as error:
                raise ValueError(str(error).removeprefix("where ")) from error
        return value

    def normalised(self) -> dict[str, Any]:
        """Plain values without the table's location: what a fingerprint may cover."""
        found = self.model_dump(mode="json", exclude={"table"}, exclude_defaults=True)
        if self.by_class:
            found["by_class"] = {str(name): weight for name, weight in self.by_class.items()}
        return found
