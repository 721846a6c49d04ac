"""Everything a report knows, as plain JSON values: of a table version, a plan or a run."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softlabels.errors import BadInputError, IntegrityError, SoftLabelsError
from softlabels.fingerprint import canonical_json
from softlabels.plan import Plan
from softlabels.report import contents, mass
from softlabels.report.examples import Decoder, Pixels, examples
from softlabels.report.rows import Part, Sample, of_plan, of_table, sample
from softlabels.report.runs import compare, is_run, read_record, run_facts
from softlabels.report.teacher import quality
from softlabels.store.table import Table

Facts = dict[str, Any]

_SELECTS = ("where", "choose", "sample_by", "balance", "limit")
"""What of a recipe's source leaves rows out, or takes some more often."""

_OF_TEACHER = re.compile(
    r"\b(top1_\w+|entropy|margin|position\w*|entries|topk_\w+|tail_\w+|label_\w+|sampled_ids)\b"
)
"""Columns and relations that say what a teacher thinks of a row."""


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
        is none; judges, the teachers' figures on the tables of a run's evaluation plan; notes on
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
        name, rows, files; looked_at (rows, positions, labelled, whole); lineage, bytes;
        temperature and further, as of `Part`; version, the same of the whole table version where a
        plan takes a part of it (`_version`), None where this is all of it; and where there are
        rows: teacher, entropy, kept, codec, classes, duplicates, alignment, examples.
    """
    found: Facts = {
        "name": part.name,
        "rows": part.num_rows,
        "files": part.num_files,
        "lineage": contents.lineage(part),
        "bytes": contents.bytes_by_column(part),
        "temperature": part.temperature,
        "further": part.further,
        "version": None,
    }
    seen = sample(part)
    found["looked_at"] = _looked_at(seen)
    if not seen.num_rows:
        return found
    decode, note = _decoder(seen, options)
    return found | {
        **_judged(seen),
        "duplicates": contents.duplicates(seen),
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
    notes: list[str] = []
    return {
        "kind": "plan",
        "plan": plan_facts(plan),
        "parts": _plan_parts(plan, options.roots, options, notes),
        "notes": notes,
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
            found["judges"] = [
                {
                    "name": part.name,
                    "teacher": quality(sample(part)),
                    "further": part.further,
                    "chosen": _by_teacher(judge.recipe),
                }
                for part in held
            ]
        except SoftLabelsError as error:
            notes.append(f"the teacher's figures on the evaluation plan are not known: {error}")
    return found


def _parts(plan: Plan, roots: Mapping[str, str], options: Options, notes: list[str]) -> list[Facts]:
    try:
        return _plan_parts(plan, roots, options, notes)
    except SoftLabelsError as error:
        notes.append(f"the plan's tables could not be looked at: {error}")
        return []


def _plan_parts(
    plan: Plan, roots: Mapping[str, str], options: Options, notes: list[str]
) -> list[Facts]:
    """The facts of each of a plan's tables, those of the whole version among them.

    How good a teacher is must not be judged by rows that were chosen for it, as by
    `where: top1_id = label`.
    """
    versions: dict[tuple[str, str], Facts] = {}
    found = []
    for part in of_plan(plan, plan.roots_of(roots)):
        facts = part_facts(part, options)
        found.append(facts)
        table = plan.tables[part.name]
        held = [source.rows for source in plan.report if source.table == part.name]
        if not part.num_rows:  # nothing is learnt from it
            facts["version"] = {}
            continue
        if part.rules is None and part.num_rows in held:
            continue
        key = (part.shards.root.uri, table.snapshot_digest)
        if key not in versions:
            versions[key] = _version(plan, part, notes)
        if part.rules is not None or versions[key].get("rows") != part.num_rows:
            facts["version"] = versions[key]
    return found


def _version(plan: Plan, part: Part, notes: list[str]) -> Facts:
    """rows, looked_at and what `_judged` gives of the whole version; empty if it is not there."""
    table = plan.tables[part.name]
    uri = part.shards.root.uri
    try:
        opened = Table.open(f"{uri}@{table.version}")
        if opened.snapshot_digest != table.snapshot_digest:
            raise IntegrityError(
                f"{uri}@{table.version} has snapshot {opened.snapshot_digest!r}, the plan read "
                f"{table.snapshot_digest!r}"
            )
        whole = of_table(opened)
        seen = sample(whole)
    except SoftLabelsError as error:
        notes.append(
            f"how good the teacher of {part.name!r} is cannot be told from chosen rows, and the "
            f"whole version could not be looked at: {error}"
        )
        return {}
    judged = _judged(seen) if seen.num_rows else {}
    return {"rows": whole.num_rows, "looked_at": _looked_at(seen), **judged}


def _judged(seen: Sample) -> Facts:
    """What tells whether a teacher is good and its targets are sound."""
    return {
        "teacher": quality(seen),
        "entropy": mass.entropy(seen),
        "kept": mass.kept(seen),
        "codec": mass.codec_loss(seen),
        "classes": contents.classes(seen.part),
        "alignment": contents.alignment(seen),
    }


def _looked_at(seen: Sample) -> Facts:
    return {
        "rows": seen.num_rows,
        "positions": len(seen.targets.ids) if seen.batches else 0,
        "labelled": int((seen.labels >= 0).sum()) if seen.batches else 0,
        "whole": seen.whole,
    }


def _by_teacher(recipe: Mapping[str, Any]) -> bool:
    """Whether rows were chosen by what a teacher says of them, by a plan's recipe."""
    sources = recipe.get("sources")
    for source in sources if isinstance(sources, Sequence) else ():
        held = {name: source[name] for name in _SELECTS if source.get(name) is not None}
        if "choose" in held or _OF_TEACHER.search(canonical_json(held)):
            return True
    return False


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
