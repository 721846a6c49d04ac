"""The map of the package: who may import whom, what an import may load, how large parts may be."""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import softlabels

PACKAGE = Path(softlabels.__file__).parent
LAYERS = {
    "softlabels": 0,
    "softlabels.errors": 0,
    "softlabels.thrift": 1,
    "softlabels.delta": 1,
    "softlabels.arrays": 1,
    "softlabels.schema": 1,
    "softlabels.fingerprint": 1,
    "softlabels.storage": 1,
    "softlabels.signals": 1,
    "softlabels.specs": 1,
    "softlabels.imports": 2,
    "softlabels.pages": 2,
    "softlabels.parquet": 3,
    "softlabels.noise_model": 2,
    "softlabels.targets": 2,
    "softlabels.lineage": 2,
    "softlabels.rules": 4,
    "softlabels.store": 4,
    "softlabels.plan_entries": 4,
    "softlabels.plan_checks": 5,
    "softlabels.plan": 6,
    "softlabels.query": 7,
    "softlabels.teacher": 7,
    "softlabels.student": 7,
    "softlabels.report": 8,
    "softlabels.cli": 9,
    "softlabels.__main__": 10,
}
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
HELP_SECONDS = 0.4


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The entry of LAYERS that a module belongs to: a top-level module or a subpackage."""
    return ".".join(module.split(".")[:2])


NAMES = {module_name(file) for file in MODULES}


def type_checking_lines(tree: ast.AST) -> set[int]:
    """Lines under `if TYPE_CHECKING:`, which never run."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for inner in node.body:
                lines.update(range(inner.lineno, (inner.end_lineno or inner.lineno) + 1))
    return lines


def imported(file: Path, lazy: bool) -> Iterator[tuple[int, str]]:
    """(line, module) of every import; `lazy` takes those inside functions too."""
    tree = ast.parse(file.read_text())
    inside: set[int] = set()
    if not lazy:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inside.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for node in ast.walk(tree):
        if getattr(node, "lineno", 0) in inside:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: imports are written in full"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield node.lineno, deeper if deeper in NAMES else str(node.module)


def test_every_part_has_a_layer() -> None:
    assert {part_of(name) for name in NAMES} == set(LAYERS)


@pytest.mark.parametrize("file", MODULES, ids=module_name)
def test_imports_go_downward_also_inside_functions(file: Path) -> None:
    here = part_of(module_name(file))
    for line, target in imported(file, lazy=True):
        if target.split(".")[0] != "softlabels":
            continue
        there = part_of(target)
        # In one layer only the parts of a subpackage meet; the others stand side by side.
        assert there == here or LAYERS[there] < LAYERS[here], f"{file}:{line} imports {target}"


def test_the_lower_store_modules_do_not_know_the_upper_ones() -> None:
    order = ["shards", "files", "commits", "closed", "tags", "table", "inspect"]
    for position, name in enumerate(order):
        targets = {target for _, target in imported(PACKAGE / "store" / f"{name}.py", lazy=True)}
        above = {f"softlabels.store.{upper}" for upper in order[position + 1 :]}
        assert not targets & above, name


def test_there_is_no_import_cycle() -> None:
    graph = {}
    for file in MODULES:
        unused = type_checking_lines(ast.parse(file.read_text()))
        found = {name for line, name in imported(file, lazy=False) if line not in unused}
        graph[module_name(file)] = (found & NAMES) - {module_name(file)}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def loaded_by(*modules: str) -> set[str]:
    """Top-level packages in sys.modules of a new interpreter after importing `modules`."""
    program = f"import sys, {', '.join(modules)}\nprint(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    return {name.split(".")[0] for name in done.stdout.split()}


def modules_of(part: str) -> list[str]:
    return sorted(name for name in NAMES if part_of(name) == f"softlabels.{part}")


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (modules_of("student"), {"duckdb", "polars", "deltalake", "transformers", "pandas"}),
        (modules_of("query"), {"torch", "transformers", "pandas"}),
        (
            ["softlabels.plan", "softlabels.store.shards"],
            {"deltalake", "duckdb", "polars", "torch"},
        ),
        (modules_of("store"), {"torch", "duckdb", "polars"}),
        (modules_of("cli"), {"torch", "pyarrow", "duckdb", "polars", "deltalake", "matplotlib"}),
    ],
    ids=["student", "query", "plan and shards", "store", "cli"],
)
def test_importing_a_part_does_not_load(modules: list[str], forbidden: set[str]) -> None:
    found = loaded_by(*modules)
    assert "softlabels" in found
    assert not found & forbidden


def test_help_is_quick() -> None:
    program = [sys.executable, "-c", "from softlabels.cli import main; main()", "--help"]
    wall, cpu = [], []
    for _ in range(5):
        before, start = os.times(), time.perf_counter()
        done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True)
        after = os.times()
        wall.append(time.perf_counter() - start)
        cpu.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
        assert "capture" in done.stdout
    # Processor time where the machine is shared: there the wall clock shows the neighbours.
    assert min(min(wall), min(cpu)) < HELP_SECONDS, (min(wall), min(cpu))


@pytest.mark.parametrize("file", MODULES, ids=module_name)
def test_no_module_or_function_is_too_long(file: Path) -> None:
    text = file.read_text()
    lines = len(text.splitlines())
    assert lines <= MAX_MODULE_LINES, f"{file.name} has {lines} lines"
    long = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert not long, f"{file.name}: functions of more than {MAX_FUNCTION_LINES} lines: {long}"
