"""The benchmark of losses on a small head: what it measures and what it writes."""

from pathlib import Path

import pytest
import torch

from pipelines import bench_loss
from pipelines.bench_loss import FUSED_HARD, LOSSES, PLAIN, Line, as_markdown, problem
from softlabels.errors import BadInputError

pytestmark = pytest.mark.filterwarnings("ignore:tail 'renormalize':UserWarning")


def test_every_loss_reaches_hidden_states_and_weight() -> None:
    given = problem(rows=8, width=4, classes=200, dense=True)
    values = {}
    for name, prepare in LOSSES.items():
        loss = prepare(given)()
        values[name] = float(loss.detach())
        for gradient in torch.autograd.grad(loss, (given.hidden, given.weight)):
            assert float(gradient.abs().max()) > 0, name
    assert values[FUSED_HARD] == pytest.approx(values[PLAIN], rel=1e-5)
    assert len(set(values.values())) >= 5


@pytest.mark.slow
def test_memory_is_that_of_the_logits_or_of_the_buffer() -> None:
    """N = 2,048 of V = 16,384: the logits alone are 128 MiB, and cross-entropy needs them."""
    fused, plain = (bench_loss.memory(x, 2_048, 16, 16_384) / 2**20 for x in (FUSED_HARD, PLAIN))
    assert 16 < fused < 64
    assert plain > 2 * 128


def test_the_table_replaces_what_is_between_the_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        Line(64, name, [2.0 + n, 2.0 + n], [4.0, 2.0], n * 2**20) for n, name in enumerate(LOSSES)
    ]
    table = as_markdown(lines)
    rows = table.splitlines()[2:8]
    assert [row.split(" | ")[1] for row in rows] == list(LOSSES)
    assert rows[0].startswith("| 64 | ")
    assert rows[0].endswith("| 0.40 (0.40–0.40) | 0.33 (0.33–0.33) | 1 | 0 MiB |")
    assert rows[3].split(" | ")[2] == "1"


def test_a_readme_without_marks_is_found_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object) -> None:
        pytest.fail("measured for nothing")

    (tmp_path / "README.md").write_text("before\n<!-- bench-loss -->\nafter\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_loss, "measure", measured)
    monkeypatch.setattr("sys.argv", ["bench_loss"])
    with pytest.raises(BadInputError, match=r"README.md.*has no '<!-- /bench-loss -->'"):
        bench_loss.main()
