"""Everything a report knows, as plain JSON values: of a table version, a plan or a run."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softlabels.errors import BadInputError, SoftLabelsError
from softlabels.plan import Plan
from softlabels.report import contents, mass
from softlabels.report.examples import Decoder, Pixels, examples
from softlabels.report.rows import Part, Sample, of_plan, of_table, sample
from softlabels.report.runs import compare, is_run, read_record, run_facts
from softlabels.report.teacher import quality
from softlabels.store.table import Table

Facts = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a reader may add to a report.

    Attributes:
        baseline: a run's folder, hard labels alone.
        tokenizer: folder or tokenizer.json that token ids are shown with.
        roots: where a plan's tables are on this machine, by name.
        pixels: how to see a carried column of raw pixels.
    """

    baseline: str | None = None
    tokenizer: str | None = None
    roots: Mapping[str, str] = field(default_factory=dict)
    pixels: Pixels | None = None


def gather(subject: str, options: Options | None = None) -> Facts:
    """The facts of TABLE, TABLE@version, PLAN.parquet or a run's folder.

    Returns:
        kind ("table", "plan", "run"); subject; parts, the facts of each table (`part_facts`);
        plan (`plan_facts`), run (`runs.run_facts`) and baseline (`runs.compare`), None where there
        is none; judges, the teacher's figures on the tables of a run's evaluation plan; notes on
        what could not be looked at. Values are JSON, but for pictures of examples.

    Raises:
        BadInputError: there is no such thing, or an option does not fit it.
    """
    found: Facts = _plain(_gathered(subject, options or Options()))
    return found


def _gathered(subject: str, options: Options) -> Facts:
    folder = Path(subject)
    found: Facts = {"kind": "table", "subject": subject, "notes": [], "parts": []}
    found |= {"plan": None, "run": None, "judges": [], "baseline": None}
    if "://" not in subject and is_run(folder):
        return found | _run(folder, options)
    if options.baseline is not None:
        raise BadInputError(f"--baseline is for a run's folder, {subject!r} is none")
    if subject.endswith(".parquet") or folder.is_file():
        return found | _plan(subject, options)
    if options.roots:
        raise BadInputError(f"--root is for plans and runs, {subject!r} is none")
    part = of_table(Table.open(subject))
    return found | {"parts": [part_facts(part, options)]}


def part_facts(part: Part, options: Options) -> Facts:
    """What one table version, or a plan's rows of it, says.

    Returns:
        name, rows, files; looked_at (rows, positions, labelled, whole); lineage, bytes, and where
        there are rows: teacher, entropy, kept, codec, classes, duplicates, alignment, examples.
    """
    found: Facts = {
        "name": part.name,
        "rows": part.num_rows,
        "files": part.num_files,
        "lineage": contents.lineage(part),
        "bytes": contents.bytes_by_column(part),
    }
    seen = sample(part)
    found["looked_at"] = {
        "rows": seen.num_rows,
        "positions": len(seen.targets.ids) if seen.batches else 0,
        "labelled": int((seen.labels >= 0).sum()) if seen.batches else 0,
        "whole": seen.whole,
    }
    if not seen.num_rows:
        return found
    decode, note = _decoder(seen, options)
    return found | {
        "teacher": quality(seen),
        "entropy": mass.entropy(seen),
        "kept": mass.kept(seen),
        "codec": mass.codec_loss(seen),
        "classes": contents.classes(part),
        "duplicates": contents.duplicates(seen),
        "alignment": contents.alignment(seen),
        "examples": examples(seen, decode, options.pixels),
        "tokens": note,
    }


def plan_facts(plan: Plan) -> Facts:
    """Rows and positions of a plan: its sources with their shares, funnels and loss weights."""
    return {
        "fingerprint": plan.fingerprint,
        "rows": plan.num_rows,
        "stages": len(set(plan.entries["stage"].to_pylist())),
        "features": list(plan.features),
        "tables": [
            {
                "table": table.name,
                "version": table.version,
                "teacher": table.contents.teacher.name,
                "fingerprint": table.contents.teacher.fingerprint(),
            }
            for table in plan.tables.values()
        ],
        "sources": [source.model_dump(mode="json") for source in plan.report],
    }


def _plan(path: str, options: Options) -> Facts:
    plan = Plan.read(path)
    parts = of_plan(plan, plan.roots_of(options.roots))
    return {
        "kind": "plan",
        "plan": plan_facts(plan),
        "parts": [part_facts(part, options) for part in parts],
    }


def _run(folder: Path, options: Options) -> Facts:
    notes: list[str] = []
    record = read_record(folder) or {}
    spec = record.get("spec", {})
    roots = {**spec.get("roots", {}), **options.roots}
    found: Facts = {
        "kind": "run",
        "run": run_facts(folder),
        "notes": notes,
    }
    if options.baseline is not None:
        found["baseline"] = compare(folder, Path(options.baseline))
    plan = _plan_of(spec.get("plan"), record.get("plan_fingerprint"), notes)
    if plan is not None:
        found["plan"] = plan_facts(plan)
        found["parts"] = _parts(plan, roots, options, notes)
    judge = _plan_of((spec.get("evaluate") or {}).get("plan"), None, notes)
    if judge is not None:
        try:
            held = of_plan(judge, judge.roots_of(roots))
            found["judges"] = [{"name": p.name, "teacher": quality(sample(p))} for p in held]
        except SoftLabelsError as error:
            notes.append(f"the teacher's figures on the evaluation plan are not known: {error}")
    return found


def _parts(plan: Plan, roots: Mapping[str, str], options: Options, notes: list[str]) -> list[Facts]:
    try:
        return [part_facts(part, options) for part in of_plan(plan, plan.roots_of(roots))]
    except SoftLabelsError as error:
        notes.append(f"the plan's tables could not be looked at: {error}")
        return []


def _plan_of(path: str | None, fingerprint: str | None, notes: list[str]) -> Plan | None:
    """The plan that a run names, if it is there and is the one that was read."""
    if path is None:
        return None
    try:
        plan = Plan.read(path)
    except SoftLabelsError as error:
        notes.append(f"plan {path!r} could not be read (run from the same folder?): {error}")
        return None
    if fingerprint is not None and plan.fingerprint != fingerprint:
        notes.append(
            f"plan {path!r} is another by now: the run read {fingerprint!r}, there is "
            f"{plan.fingerprint!r}; its tables were not looked at"
        )
        return None
    return plan


def _decoder(seen: Sample, options: Options) -> tuple[Decoder | None, str | None]:
    """What turns token ids into text, and a line on why there is none."""
    held = seen.part.contents.tokenizer_sha256
    if seen.part.contents.alignment is None:
        return None, None
    if options.tokenizer is None:
        return None, "tokens are shown by id: give --tokenizer FOLDER to read them"
    from softlabels.teacher.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(os.fspath(options.tokenizer))
    if held is not None and tokenizer.sha256 != held:
        raise BadInputError(
            f"--tokenizer {options.tokenizer!r} has sha256 {tokenizer.sha256!r}, the table was "
            f"made with {held!r}: give that one"
        )
    return lambda ids: str(tokenizer.model.decode(list(ids))), None


def _plain(value: Any) -> Any:
    """The same with numbers that JSON has no word for (NaN, infinities) as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
