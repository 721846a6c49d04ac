"""Trains three smaller Fashion-MNIST teachers, each on a third of the images, for ensembles.

    python -m pipelines.fashion.train_members

Every member sees 13,000 of the 40,000 images that the large teacher learns from, so each knows
something that the others do not. Data, calibration and format are those of `train_teacher`.
Writes `member-a.safetensors` to `member-c.safetensors` and their records.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from pipelines.fashion import make_data
from pipelines.fashion.train_teacher import (
    Examples,
    best_temperature,
    fit,
    load_parts,
    logits,
    measure,
    save,
)

MEMBERS = ("a", "b", "c")
ROWS = 13_000
WIDTHS = (16, 32, 56, 56)


def main(
    source: Annotated[
        Path, typer.Option(help="Folder of the four idx.gz files.")
    ] = make_data.SOURCE,
    folder: Annotated[
        Path, typer.Option(help="Folder of train.parquet; the weights go here.")
    ] = make_data.FOLDER,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the 13,000 images.")] = 12,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; part of the result.")] = 2,
) -> None:
    """Trains, calibrates, measures and writes the members."""
    torch.set_num_threads(threads)
    parts = load_parts(source, folder)
    for number, member in enumerate(MEMBERS):
        torch.manual_seed(number)
        rows = slice(number * ROWS, (number + 1) * ROWS)
        own = Examples(*(values[rows] for values in parts["train"]))
        model, epoch = fit(own, parts["validation"], epochs, WIDTHS)
        raw = {name: logits(model, parts[name].images) for name in ("validation", "test")}
        temperature = best_temperature(raw["validation"], parts["validation"].labels)
        with torch.no_grad():
            model.classify.weight.div_(temperature)
            model.classify.bias.div_(temperature)
        record: dict[str, object] = {
            "model": "pipelines.fashion.teacher.ConvTeacher",
            "arguments": {"widths": WIDTHS},
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "trained_on": f"rows {rows.start} to {rows.stop} of what the large teacher learns from",
            "seeds": {"training": number, "split": make_data.SEED},
            "epochs": epochs,
            "chosen_epoch": epoch,
            "calibration_temperature": temperature,
            "metrics": {
                name: measure(values / temperature, parts[name].labels)
                for name, values in raw.items()
            },
            "threads": threads,
            "torch": torch.__version__,
        }
        print(save(model, record, folder, f"member-{member}"))


if __name__ == "__main__":
    typer.run(main)
