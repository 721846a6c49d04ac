"""The page: whole, quiet, readable in light and dark, and deaf to what a stranger wrote into it."""

import copy
import html
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.image import imread

from softlabels.report.charts import curves, histogram, mass_by_k, reliability
from softlabels.report.examples import Pixels
from softlabels.report.gather import Options, gather
from softlabels.report.images import MOST_BYTES, picture, png
from softlabels.report.page import figure, render, seen, share
from softlabels.report.verdict import run_findings, verdict
from softlabels.student.trainer import train
from softlabels.teacher.tokenizer import load_tokenizer
from tests.report.browser import look, needs_chromium
from tests.report.planted import label, source
from tests.store import markov
from tests.student.problem import make_problem, run_spec
from tests.tables import make_table

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def page_of(subject: Path | str, **options: object) -> str:
    facts = gather(str(subject), Options(**options))  # type: ignore[arg-type]
    findings = run_findings(facts)
    return render(facts, findings, verdict(facts, findings))


class Elements(HTMLParser):
    """Collects what is in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def require_quiet(page: str) -> None:
    """Nothing that runs, and nothing from elsewhere."""
    found = Elements(page)
    loud = {"script", "link", "iframe", "object", "embed", "base", "form", "a", "audio", "video"}
    assert not loud & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert not [name for name, _ in found.attributes if name in ("href", "xlink:href", "srcset")]
    sources = [value for name, value in found.attributes if name == "src"]
    assert all(s.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for s in sources)
    styles = " ".join(v for n, v in found.attributes if n == "style") + page.split("</style>")[0]
    assert "url(" not in styles
    assert "@import" not in styles
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page[:600]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of real labels."""
    folder = tmp_path_factory.mktemp("page")
    table = label(folder, source().slice(0, 600))
    (folder / "report.html").write_text(page_of(table.root.uri), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a table whose every name is an attack, in a folder of such a name."""
    folder = tmp_path_factory.mktemp("evil") / "<b onclick=x>"
    rows = source().slice(0, 60)
    svg = f"<svg xmlns='http://www.w3.org/2000/svg' onload='{EVIL}'/>".encode()
    columns = {
        "example_id": [f"{EVIL}{i}" for i in range(60)],
        "label": rows["label"],
        "logits": rows["logits"],
        "note": [f"{EVIL} note {i} \u202e\x00" for i in range(60)],
        "picture": pa.array([svg] * 60, pa.binary()),
    }
    table = label(
        folder,
        pa.table(columns),
        classes=[f"{EVIL}{i}" for i in range(10)],
        carry=["note", "picture"],
    )
    page = folder / "report.html"
    page.write_text(page_of(table.root.uri), encoding="utf-8")
    return page


def test_the_page_is_whole_and_quiet(clean: Path) -> None:
    page = clean.read_text(encoding="utf-8")
    require_quiet(page)
    found = Elements(page)
    assert found.tags.count("svg") == 3
    assert found.tags.count("title") == 3 + 1  # each chart's and the page's
    assert found.tags.count("desc") == 3
    assert found.tags.count("img") == 16
    assert ("lang", "en") in found.attributes
    assert "nothing found" in page
    assert "None" not in page.replace("None of", "")
    assert "nan" not in page.lower().split("<main>")[1].replace("nans", "")


def test_what_strangers_wrote_is_text(evil: Path) -> None:
    page = evil.read_text(encoding="utf-8")
    require_quiet(page)
    assert "<script" not in page
    assert html.escape(EVIL, quote=False).replace('"', "&#34;").replace("'", "&#39;") in page
    assert "\u202e" not in page
    assert "\\u202e" in page
    assert "\\u0000" in page
    assert "<svg xmlns" not in page
    assert "<b onclick" not in page


def test_facts_are_json(tmp_path: Path) -> None:
    facts = gather(make_table(tmp_path / "t", rows=30).root.uri)
    json.dumps(facts, allow_nan=False)


def test_tokens_are_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {("<b>" if i % 2 else "</script>") + str(i): i for i in range(40)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<b>1"))
    made.save(str(tmp_path / "tokenizer.json"))
    sha256 = load_tokenizer(str(tmp_path / "tokenizer.json")).sha256
    probs = markov.chain(40)
    columns = markov.causal(markov.walk(probs, 40, 30), probs, 8, 0)
    table = markov.write(tmp_path / "t", columns, 40, 8, tokenizer_sha256=sha256)
    page = page_of(table.root.uri, tokenizer=str(tmp_path / "tokenizer.json"))
    require_quiet(page)
    assert "&lt;/script&gt;" in page
    assert "give --tokenizer" not in page
    plain = page_of(table.root.uri)
    assert "give --tokenizer FOLDER to read them" in plain
    assert "&lt;/script&gt;" not in plain


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it(clean: Path, tmp_path: Path, dark: bool) -> None:
    shot = tmp_path / "page.png"
    found = look(clean, tmp_path, dark=dark, screenshot=shot)
    assert found.console == []
    assert found.requests == []
    pixels = imread(shot)[:, :, :3]
    paper = pixels[2, 2].mean()
    assert paper < 0.15 if dark else paper > 0.95
    # Ink of the other kind is there too, and colour of the charts.
    grey = pixels.mean(2)
    assert (np.abs(grey - paper) > 0.7).mean() > 0.002
    assert (np.ptp(pixels, axis=2) > 0.3).mean() > 0.002


@needs_chromium
def test_a_browser_runs_none_of_it(evil: Path, tmp_path: Path) -> None:
    found = look(evil, tmp_path)
    assert found.console == []
    assert found.requests == []
    assert "<title>softlabels report" in found.dom
    # The same attack in a page of no escaping and no policy would have told.
    bare = tmp_path / "bare.html"
    bare.write_text(f"<title>mine</title>{EVIL}<img src=http://127.0.0.1:9/x>")
    caught = look(bare, tmp_path)
    assert "<title>owned</title>" in caught.dom
    assert caught.requests == ["http://127.0.0.1:9/x"]


@needs_chromium
def test_it_fits_a_phone(clean: Path, evil: Path, tmp_path: Path) -> None:
    for page in (clean, evil):
        frame = html.escape(page.read_text(encoding="utf-8"))
        outer = tmp_path / "outer.html"
        outer.write_text(
            f'<iframe width="360" height="700" srcdoc="{frame}" onload="document.title='
            "this.contentDocument.documentElement.scrollWidth+'/'"
            '+this.contentDocument.documentElement.clientWidth"></iframe>',
            encoding="utf-8",
        )
        title = look(outer, tmp_path).dom.split("<title>")[1].split("</title>")[0]
        wide, room = map(int, title.split("/"))
        assert 300 < room <= 360
        assert wide <= room


def test_runs_have_curves_and_words(tmp_path: Path) -> None:
    plan = make_problem(tmp_path, rows=60)
    for name, weight in (("soft", 1.0), ("hard", 0.0)):
        train(
            run_spec(
                tmp_path,
                plan,
                steps=20,
                log_every=2,
                out=str(tmp_path / name),
                evaluate={"plan": str(plan), "every": 5},
                loss={"kd_weight": weight},
            )
        )
    page = page_of(tmp_path / "soft", baseline=str(tmp_path / "hard"))
    require_quiet(page)
    assert page.count("<svg") == 3 + 3
    assert "What soft labels gained" in page or "Why soft labels did not help" in page
    for word in ("student", "baseline", "teacher", "rows an epoch"):
        assert word in page


def test_pictures_only_of_real_images() -> None:
    pixels = bytes(range(256)) * 3
    made = png(pixels, 16, 16, 3)
    assert made is not None
    shown = picture(made)
    assert shown is not None
    assert (shown.width, shown.height) == (16, 16)
    assert shown.uri.startswith("data:image/png;base64,iVBOR")
    assert png(pixels, 16, 16, 1) is None
    huge = made[:16] + (60_000).to_bytes(4, "big") * 2 + made[24:]
    jpeg = b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc0\x00\x0b\x08\x00\x10\x00\x20\x01\x01\x11\x00"
    found = picture(jpeg)
    assert found is not None
    assert (found.width, found.height) == (32, 16)
    assert found.uri.startswith("data:image/jpeg;base64,")
    for wrong in (
        b"",
        b"<svg/>",
        made[:20],
        huge,
        jpeg[:8],
        jpeg[:4] + b"\x00" * 40,
        made + bytes(MOST_BYTES),
    ):
        assert picture(wrong) is None


def test_png_pixels_are_the_given_ones(tmp_path: Path) -> None:
    grey = np.arange(28 * 28, dtype=np.uint32).astype(np.uint8).reshape(28, 28)
    made = png(grey.tobytes(), 28, 28, 1)
    assert made is not None
    (tmp_path / "x.png").write_bytes(made)
    assert (np.round(imread(tmp_path / "x.png") * 255).astype(np.uint8) == grey).all()


def test_pixels_of_a_column() -> None:
    assert Pixels.parse("image=28x28") == Pixels("image", 28, 28, 1)
    assert Pixels.parse("a=b=32x16x3") == Pixels("a=b", 32, 16, 3)


def test_charts_hold_their_points() -> None:
    bins = [
        {"lower": n / 4, "upper": (n + 1) / 4, "rows": 10, "confidence": n / 4, "accuracy": n / 4}
        for n in range(4)
    ]
    chart = reliability(bins, 0.0)
    # The left and the lower end of the unit square.
    assert 'cx="44.0" cy="186.0"' in chart
    assert chart.count("<circle") == 4
    rows = [{"k": 1, "mean": 0.5}, {"k": 2, "mean": 1.0}]
    assert "44.0,98.0 350.0,10.0" in mass_by_k(rows, [(0.1, 0.9), (0.2, 1.0)])
    assert "&lt;b&gt;" in curves({"<b>": [(0, 1.0), (1, 2.0)]}, "<i>", "<u>")
    assert "<b>" not in curves({"<b>": [(0, 1.0), (1, 2.0)]}, "<i>", "<u>")
    assert curves({}, "x", "y") == ""
    flat = curves({"a": [(1, 2.0), (1, 2.0)]}, "x", "y")
    assert "nan" not in flat
    bars = [
        {"lower": 0.0, "upper": 1.0, "positions": 1},
        {"lower": 1.0, "upper": 2.0, "positions": 3},
    ]
    assert 'height="176.0"' in histogram(bars, "x", "t", "s")


def test_figures() -> None:
    assert [figure(x) for x in (None, 3, 0.12345, 123456.7)] == [None, "3", "0.1235", "123457"]
    assert [share(x) for x in (None, 0.5, 0.00002)] == ["unknown", "50.0 %", "2e-05"]
    assert seen("a\u202eb\x1b\n\ud800") == "a\\u202eb\\u001b\n\\ud800"


def test_a_page_does_not_change_its_facts(clean: Path) -> None:
    facts = gather(str(clean.parent / "labels"))
    before = copy.deepcopy(facts)
    render(facts, run_findings(facts), None)
    assert facts == before
