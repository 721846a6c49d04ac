"""The nightly job as one command: what is not done yet of one day, or of a range in order.

    python -m pipelines.nightly.run                         yesterday, UTC
    python -m pipelines.nightly.run --date 2024-02-29
    python -m pipelines.nightly.run --from 2024-02-28 --to 2024-03-01
    python -m pipelines.nightly.run --last 7                the seven days up to yesterday

Prints one line of JSON a day, the last one for the day that it ended with. Exit 0: all days are
done; 1: one cannot be; 2: what was asked for is wrong; 75: not yet, run the same command later.
"""

import dataclasses
import json
import sys
from datetime import UTC, date, datetime, timedelta
from typing import Annotated

import typer

from pipelines.nightly.spec import DEFAULT, NightSpec
from softlabels.cli.main import SETTINGS, run
from softlabels.errors import BadInputError, SoftLabelsError
from softlabels.signals import stop_on_signal

app = typer.Typer(**SETTINGS)


@app.command()
def main(
    spec: Annotated[
        str, typer.Argument(metavar="[NIGHTLY.yaml]", help="What a night does.")
    ] = DEFAULT,
    day: Annotated[
        str | None, typer.Option("--date", metavar="YYYY-MM-DD", help="One day.")
    ] = None,
    first: Annotated[
        str | None, typer.Option("--from", metavar="YYYY-MM-DD", help="The first day of a range.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="YYYY-MM-DD", help="Its last day; default: yesterday."),
    ] = None,
    last: Annotated[
        int | None, typer.Option("--last", min=1, help="So many days, up to yesterday.")
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Say on stderr only what goes wrong.")
    ] = False,
) -> None:
    """Label, verify, tag and mix the partition of a day; yesterday's (UTC) when none is named.

    What is done is not done again. A range is done in order, and stops at the first day that
    cannot be done. Exit 75: not yet, or stopped: run the same command later; it goes on.
    """
    from pipelines.nightly.night import night_of, run_night

    days = _days(day, first, to, last, datetime.now(UTC).date() - timedelta(days=1))
    found = NightSpec.read(spec)
    with stop_on_signal() as stopped:
        for one in days:
            try:
                report = run_night(night_of(found, one), _mute if quiet else _say, stopped)
            except SoftLabelsError as error:
                _print({"day": one.isoformat(), "exit": error.exit_code, "error": str(error)})
                raise
            _print(dataclasses.asdict(report) | {"exit": 0})


def _days(
    day: str | None, first: str | None, to: str | None, last: int | None, yesterday: date
) -> list[date]:
    """The days that were asked for, in order."""
    if [day is not None, first is not None or to is not None, last is not None].count(True) > 1:
        raise BadInputError("which days? Give one of --date, --from with --to, and --last")
    if to is not None and first is None:
        raise BadInputError(f"--to {to!r} is the end of a range: give --from too")
    if day is not None:
        return [_parse("--date", day)]
    start = yesterday if first is None else _parse("--from", first)
    end = yesterday if to is None else _parse("--to", to)
    if last is not None:
        start = yesterday - timedelta(days=last - 1)
    if end < start:
        raise BadInputError(f"the range from {start} to {end} has no days")
    return [start + timedelta(days=number) for number in range((end - start).days + 1)]


def _parse(name: str, text: str) -> date:
    try:
        found = date.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.isoformat() != text:
        raise BadInputError(f"{name} {text!r}: expected a day such as 2024-02-29")
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _mute(line: str) -> None:
    pass


def _print(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run(app)
