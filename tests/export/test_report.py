"""``report.html``: it says what the records say, needs nothing else, and is the same for the same bundle."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from export import export_bundle
from export.pipeline import GateFailed
from export.report.charts import class_chart, ladder_chart, latency_chart, name_of
from export.report.page import headline
from patchslim.records import load_record
from tests.helpers.exports import change_plan, read, tiny
from validate import load_parity
from validate.latency_sheet import LatencySheet
from validate.parity_records import ClassChange

if TYPE_CHECKING:
    from export.pipeline import Outcome

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """The addresses that a page names, its tags in order, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "br", "path", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "img", "br", "path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(ort_export: Outcome) -> str:
    return (ort_export.bundle / "report.html").read_text(encoding="utf-8")


def test_the_page_says_what_the_records_say(ort_export: Outcome, page: str) -> None:
    text = re.sub(r"\s+", " ", Page(page).text.replace("\N{NARROW NO-BREAK SPACE}", " "))
    parity = load_parity(ort_export.bundle)
    assert headline(parity, None) in text
    assert f"{100 * parity.macs.reduction:.1f} %" in text
    for one in parity.rungs:
        assert one.stage in text
        assert f"{one.top1:.2f} %" in text
        assert one.note in text
    assert parity.comparison is not None
    assert f"p = {parity.comparison.mcnemar:.2g}" in text
    assert parity.evaluation.fingerprint in text
    assert "passed" in text
    assert "Not measured where this bundle was built" in text
    assert "Two points, both measured" in text
    assert "Then serve it: serving/README.md in the bundle" in text


def test_the_page_asks_for_nothing_and_runs_nothing(page: str) -> None:
    parsed = Page(page)
    assert not parsed.open
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in parsed.addresses)
    assert "default-src 'none'" in page
    assert not re.search(r"<script|javascript:|@import|url\(\s*['\"]?http|\son\w+=", page)
    assert page.count("data:image/png") == 1 + min(8, page.count("KL ") - page.count("KL divergence"))


def test_nothing_is_said_to_come_from_an_index(ort_export: Outcome) -> None:
    """Whoever has the bundle alone is told where patchslim is to be had: no package index has it."""
    texts = {
        path.relative_to(ort_export.bundle).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(ort_export.bundle.rglob("*"))
        if path.suffix in (".html", ".md", ".json", ".py", ".txt", ".yaml", ".pbtxt")
    }
    assert not [name for name, text in texts.items() if re.search(r"install [^\n]*['\"]patchslim\b", text)]
    wheel = re.compile(r"pip install (?:\"|&#34;)\./patchslim-\S+-py3-none-any\.whl\[edge\](?:\"|&#34;)")
    assert all(wheel.search(texts[name]) for name in ("report.html", "serving/README.md"))


def test_its_check_is_started_beside_the_bundle_and_runs_nothing_that_lies_there(
    page: str, ort_export: Outcome, tmp_path: Path
) -> None:
    (commands,) = re.findall(r"<pre>(.*?)</pre>", page, flags=re.DOTALL)
    digests, install, check = html.unescape(commands).splitlines()
    assert install.startswith("pip install ")
    planted = Path(shutil.copytree(ort_export.bundle, tmp_path / ort_export.bundle.name)) / "validate"
    planted.mkdir()
    (planted / "__init__.py").write_text("raise SystemExit('this was run')")  # Python looks where it is started first
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(Path(__file__).parents[2])}
    results = [
        subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        for line in (digests, check)
    ]
    assert [done.returncode for done in results] == [0, 3], results
    assert "validate/__init__.py: is not listed in manifest.json" in results[1].stderr


def test_every_class_of_the_page_is_styled(page: str) -> None:
    """The style sheet of a plan's page is the ground of this one's: what that loses is missed here."""
    style, _, body = page.partition("</style>")
    used = {name for names in re.findall(r'class="([^"]+)"', body) for name in names.split()}
    styled = set(re.findall(r"\.([a-z][a-z0-9-]*)", style))
    assert used - styled <= {"passed"}
    assert {"tiles", "card", "scroll", "facts", "wide", "charts", "plot"} <= used & styled


def test_plots_have_a_name_and_the_pages_colours(page: str) -> None:
    plots = re.findall(r'<svg class="plot"[^>]*>', page)
    assert plots
    assert all('role="img"' in plot and 'aria-label="' in plot for plot in plots)
    assert not re.search(r"#0[1-6]0[1-6]0[1-6]", page)


def test_names_from_outside_are_text() -> None:
    hostile = "</svg><script>alert(1)</script>"
    drawn = class_chart([ClassChange(label=0, images=3, original=3, candidate=1)], [hostile])
    assert "<script" not in drawn
    assert "&lt;script" in drawn
    assert name_of(0, ["x" * 100]) == "x" * 27 + "\N{HORIZONTAL ELLIPSIS}"
    assert name_of(7, []) == "class 7"


def test_a_page_of_a_failed_gate_says_so(ort_export: Outcome, export_work: Path, tmp_path: Path) -> None:
    savage = change_plan(ort_export.bundle / "plan.json", tmp_path / "plan.json", [[0]] * 3)
    with pytest.raises(GateFailed) as caught:
        export_bundle(tiny(export_work, "reported", plan=savage, max_top1_drop=1.0))
    text = (caught.value.outcome.bundle / "report.html").read_text(encoding="utf-8")
    assert "not passed" in text
    assert "is not to be served" in text
    assert "Then serve it" not in text
    assert "top-1 drops by" in text


def test_charts_are_the_same_for_the_same_records(ort_export: Outcome) -> None:
    parity = load_parity(ort_export.bundle)
    assert ladder_chart(parity) == ladder_chart(parity)
    for one in parity.rungs[1:]:
        assert one.stage in ladder_chart(parity)


def test_the_graphs_are_timed_unless_that_is_left_out(ort_export: Outcome, export_work: Path) -> None:
    assert not (ort_export.bundle / "latency.json").exists()
    outcome = export_bundle(tiny(export_work, "timed", measure_latency=True))
    sheet = load_record(outcome.bundle / "latency.json", LatencySheet, "latency sheet")
    assert [one.batch for one in sheet.comparisons] == [1, 8]
    assert all(one.dense_ms > 0 and one.slim_ms > 0 and one.threads == 1 for one in sheet.comparisons)
    assert {file["path"] for file in read(outcome.bundle / "manifest.json")["files"]} >= {"latency.json", "report.html"}
    text = (outcome.bundle / "report.html").read_text(encoding="utf-8")
    assert f"{sheet.comparisons[-1].speedup:.2f} times as fast on one CPU thread" in text
    assert sheet.processor in text
    assert "batches of 8" in latency_chart(sheet)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [375, 1200])
def test_a_browser_shows_it_without_a_fault(ort_export: Outcome, tmp_path: Path, width: int) -> None:
    picture = tmp_path / "page.png"
    assert BROWSER is not None
    given = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},2400"]
    log = ["--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}"]
    address = (ort_export.bundle / "report.html").resolve().as_uri()
    done = subprocess.run(
        [BROWSER, *given, *log, f"--screenshot={picture}", address], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert picture.stat().st_size > 10_000
    assert "CONSOLE" not in done.stderr, done.stderr
