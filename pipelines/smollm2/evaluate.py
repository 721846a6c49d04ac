"""The benchmark's held-out positions: kept teacher states, live students."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pipelines.smollm2.exact import Part
from pipelines.smollm2.labels import CHUNK, Labels
from pipelines.smollm2.students import head, hidden_states


@torch.inference_mode()
def parts_of_labels(models: Mapping[str, Any], labels: Labels, rows: int) -> Iterator[Part]:
    """The positions of the first `rows` rows with what the teacher and every model say there."""
    for row in range(rows):
        ids = labels.rows[row : row + 1]
        taught = labels.take([row])["hidden"]
        states = {name: hidden_states(model, ids)[0] for name, model in models.items()}
        for start in range(0, len(taught), CHUNK):
            at = slice(start, start + CHUNK)
            said = {name: states[name][at] @ head(model).T for name, model in models.items()}
            yield Part(ids[0, 1:][at], taught[at] @ labels.head.T, said)
