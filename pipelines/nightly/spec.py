"""What every night does: the one file that a schedule names."""

from datetime import date
from typing import Self

from pydantic import BaseModel, ConfigDict

from softlabels.specs import load_spec

DEFAULT = "pipelines/nightly/nightly.yaml"


class NightSpec(BaseModel):
    """What every night does.

    Attributes:
        capture: path of the capture spec; its `source.files` holds {date}.
        recipe: path of the recipe; it reads the capture's table at the tag {date}.
        plans: folder or URI of the plans.
        marker: name of the file that says a day's folder is whole; none: it is not waited for.
        first: the first day there is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    capture: str
    recipe: str
    plans: str
    marker: str | None = "_SUCCESS"
    first: date

    @classmethod
    def read(cls, path: str) -> Self:
        """The spec in a YAML file; raises BadInputError."""
        return load_spec(path, cls)
