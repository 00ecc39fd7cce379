"""The HTML report holds everything, needs nothing else, and reads well in a browser."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape

import numpy as np
import pytest
from PIL import Image

from pysolve.report.page import page
from pysolve.report.report import Report
from pysolve.report.rows import Latency, LayerMass, SiteReport, Solve

KEPT, BAR = (0x0B, 0x6E, 0x99), {"light": (0xCF, 0xE2, 0xEA), "dark": (0x1D, 0x4A, 0x5E)}
PAPER = {"light": (0xFF, 0xFF, 0xFF), "dark": (0x14, 0x19, 0x1C)}
CURVE = tuple((k, 0.5 / k**2) for k in (1, 2, 4, 8))
REPORT = Report(
    before={"params": 1000, "nonzeros": 1000, "macs": 2000, "bytes": 4000, "file": 4200},
    after={"params": 250, "nonzeros": 250, "macs": 900, "bytes": 1000, "file": 1300},
    sites=(
        SiteReport("a → b", 8, 4, 0.125, 0.01, 0.02, 0.3, curve=CURVE),
        SiteReport("c → d", 8, 2, 0.05, 0.01, 0.02, 0.3, curve=CURVE),
        SiteReport("d → nothing", 3, 3, pinned="the network's output <really>"),
    ),
    divergence=0.25,
    samples=900,
    held=100,
    score_before=99.43,
    score_after=99.21,
    seconds={"find": 1.0, "refit": 0.5},
    notes=("a note & more",),
    target={"params": 0.25},
    mass=(LayerMass("a", 800, 200, 1500, 600, 2e-3, 1e-3), LayerMass("b", 200, 50, 500, 300, 1e-3, 1e-3)),
    latencies=((Latency(4e-3, 3e-3, 5e-3, 64, 2), Latency(2e-3, 1e-3, 3e-3, 64, 2)),),
    solves=(Solve("a → b", "newton", 0.1, 4, 1e-9, 2e-9, 5, 0.01),),
    warnings=("few samples: give more",),
    made_with={"pysolve": "0.1.0", "seed": "0"},
)


@pytest.fixture(scope="session")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("CHROME") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("needs a browser: install Chromium, or set CHROME to its command")

    def run(tmp_path, html, *options):
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
        command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    return run


def test_the_page_tells_all_and_needs_no_other_file():
    html = page(REPORT, "mine, <compressed>")
    for text in (
        "mine, <compressed>",
        "the network's output <really>",
        "a note & more",
        "few samples",
        "newton",
    ):
        assert escape(text) in html or text in unescape(html)
    assert "<really>" not in html
    assert not re.search(r'(src|href)="(?!#)', html)
    assert "url(http" not in html
    for table in REPORT.tables():
        assert f"<h2>{table.title}</h2>" in html


def test_no_two_parts_of_the_page_share_an_id_and_every_reference_has_one():
    html = page(REPORT, "x")
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 10
    assert {*re.findall(r'href="#([^"]+)"', html), *re.findall(r"url\(#([^)]+)\)", html)} <= set(ids)


def test_of_pruned_weights_the_page_begins_with_what_is_not_zero():
    pruned = replace(REPORT, after={**REPORT.after, "nonzeros": 55})
    assert "<b>5.5%</b><span>of the non-zeros</span>" in page(pruned, "x")
    assert "<b>25.0%</b><span>of the parameters</span>" in page(REPORT, "x")


def test_the_same_report_gives_the_same_page():
    assert page(REPORT, "x") == page(REPORT, "x")


def test_a_report_without_sites_has_no_pictures():
    assert "<svg" not in page(replace(REPORT, sites=()), "x")
    assert page(REPORT, "x").count("<svg") == 2


def test_a_page_is_of_a_report():
    assert "<h1>3</h1>" in page(REPORT, 3)
    with pytest.raises(TypeError, match=r"expected a Report, .* got NoneType"):
        page(None, "title")


def test_every_word_of_the_tables_that_needs_it_is_explained():
    html = page(REPORT, "x", {"command": "pysolve compress <mine>"})
    words = html[html.index("<h2>Words</h2>") :]
    for word in ("site", "divergence", "MACs", "bytes on disk", "relative gap", "KKT", "lam", "score"):
        assert f"<dt>{word}</dt>" in words
    assert "bits per weight" not in words
    assert "pysolve compress &lt;mine&gt;" in html


def near(pixels, color):
    return int((np.abs(pixels - np.array(color)).max(axis=2) <= 6).sum())


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_tables_and_pictures(browser, tmp_path, scheme):
    shot = tmp_path / "shot.png"
    dark = ("--blink-settings=preferredColorScheme=0",) if scheme == "dark" else ()
    browser(tmp_path, page(REPORT, "x"), "--window-size=1000,2000", f"--screenshot={shot}", *dark)
    pixels = np.asarray(Image.open(shot).convert("RGB"), dtype=int)
    assert near(pixels, PAPER[scheme]) > 0.7 * pixels[..., 0].size
    assert near(pixels, KEPT) > 3000, "the bars of the channels that each site keeps"
    assert near(pixels, BAR[scheme]) > 1500, "the bars behind the tables' numbers"
    text = (235, 235, 235) if scheme == "dark" else (20, 25, 30)
    assert (np.abs(pixels - np.array(text)).max(axis=2) < 40).sum() > 2000, "text in the colour of the scheme"


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_but_tables_is_wider_than_the_window(browser, tmp_path, width):
    script = """<script>
    const box = e => e.getBoundingClientRect().width;
    parent.document.title = JSON.stringify({
      page: document.documentElement.scrollWidth, window: innerWidth,
      pictures: [...document.querySelectorAll("figure svg")].map(box),
      tables: document.querySelectorAll("tbody tr").length});
    </script>"""
    inner = page(REPORT, "x").replace("</body>", script + "</body>")
    # A window of its own cannot be as narrow as a phone.
    frame = f'<title></title><iframe width="{width}" height="800" srcdoc="{escape(inner)}"></iframe>'
    dom = browser(tmp_path, frame, "--window-size=1300,1000", "--dump-dom")
    found = json.loads(unescape(re.search("<title>({.*?})</title>", dom).group(1)))
    assert found["page"] <= found["window"]
    assert len(found["pictures"]) == 2
    assert all(0.5 * min(width, 700) < picture <= width for picture in found["pictures"])
    assert found["tables"] == sum(len(table.rows) for table in REPORT.tables())
