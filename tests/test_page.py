"""report.html: made from results alone, complete, self-contained; every number leads to the run it came from."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from browser import assert_accessible
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dfqlib.papers import profiles
from dfqlib.report import charts, collect, page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A page of two runs of GDFQ that differ in the seed, each with a control that uses real images."""
    root, rows = tmp_path_factory.mktemp("results"), []
    for seed, top1 in enumerate((50.0, 52.0)):
        folder = root / "quick" / "gdfq" / f"run{seed}"
        folder.mkdir(parents=True)
        metrics = {"paper": "gdfq", "schedule": "reduced: <b>", "run": {"id": f"run{seed}"}, "parameters": {"lr": 0.25}}
        metrics |= {"provenance": {"commit": "0123", "versions": {"torch": "2.9"}}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "notebook.ipynb").touch()
        own = {"paper": "gdfq", "method": "gdfq", "scheme": "qat", "dataset": "cifar10", "data": "cifar10-2k"}
        own |= {"model": "resnet20_cifar10", "ranges": "generated", "profile": "quick", "schedule": "reduced: x"}
        own |= {"variant": "", "calibration": "published", "seed": seed, "top1_best": top1, "fp32_top1": 92.0}
        own |= {"seconds": 3.0, "run": f"run{seed}"}
        for bits in (3, 4):
            row = own | {"weight_bits": bits, "activation_bits": bits, "top1": top1 + bits, "folder": str(folder)}
            real = {"variant": "control", "ranges": "real images", "top1": 90.0, "seconds": 1.0}
            rows += [row, row | real]
    (root / "quick" / "gdfq" / "run1" / "notebook.html").touch()
    about = PngInfo()
    about.add_text("Description", "curve: KL against iteration")
    Image.new("L", (2, 2)).save(root / "curve.png", pnginfo=about)
    missing = collect.not_run(pd.DataFrame(), ["gdfq"], {}).query("data == 'imagenet'")
    content = [page.Section(profiles.paper("gdfq"), pd.DataFrame(rows), missing, [root / "curve.png"])]
    page.write_page(root, content)
    written = (root / "report.html").stat().st_mtime_ns
    page.write_page(root, content)
    assert (root / "report.html").stat().st_mtime_ns == written, "the same page was drawn twice"
    Image.new("L", (3, 3)).save(root / "curve.png", pnginfo=about)
    page.write_page(root, content)
    assert (root / "report.html").stat().st_mtime_ns > written
    return root


@pytest.fixture
def report(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def attributes(text: str, tag: str) -> list[dict[str, str]]:
    """The attributes of every element of this kind."""
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, name, attrs):
            if name == tag:
                found.append(dict(attrs))

    Reader().feed(text)
    return found


def test_numbers_stand_beside_the_published_ones_and_lead_to_their_runs(report, folder):
    assert ">54.00</td>" in report and ">18.78</td>" in report
    rows = report.partition("<tbody>")[2].partition("</tbody>")[0]
    assert [link["href"] for link in attributes(rows, "a")] == ["#run0", "#run1"] * 4
    assert {run["id"] for run in attributes(report, "details") if "id" in run} == {"run0", "run1"}
    files = [link["href"] for link in attributes(report, "a") if not link["href"].startswith("#")]
    assert "quick/gdfq/run1/notebook.html" in files and "quick/gdfq/run0/notebook.html" not in files
    assert all((folder / file).is_file() for file in files)
    for fact in ("0123", "versions torch", "2.9", "0.25", "reduced: &lt;b&gt;"):
        assert fact in report
    assert '<td class="text">imagenet</td>' in report
    assert "gdfq: curve: KL against iteration" in {image["alt"] for image in attributes(report, "img")}


def test_page_needs_nothing_but_itself(report):
    addresses = [tag.get("src", "") for name in ("img", "script", "iframe") for tag in attributes(report, name)]
    addresses += [tag["href"] for tag in attributes(report, "link")]
    assert addresses and all(not address or address.startswith("data:") for address in addresses)
    assert not re.search(r"(@import|url\(|from)\s*[\"']?(https?:)?//", report) and "fetch(" not in report


def test_the_frontier_is_that_of_data_free_results(report):
    panel = report.partition("cifar10, W3A3</h3>")[2].partition("</figure>")[0]
    assert "4 results. Best data-free drop: 37.00 in 3 s (gdfq)." in panel
    assert "Published drop: gdfq 18.78" in panel
    assert "log scale" in panel and "gdfq control, seed 1: drop 2.00, 1 s (run1)" in panel


def test_a_chart_without_a_teacher_shows_top1_and_a_row_that_diverged_none():
    row = {"dataset": "cifar10", "bits": "W4A4", "method": "gdfq", "scheme": "qat", "variant": "", "ranges": ""}
    row |= {"calibration": "published", "weight_bits": 4, "fp32_top1": None, "seed": 0, "run": "a"}
    row |= {"line": "x", "filters": ""}
    scores = [(40.0, 9.0), (60.0, 20.0), (50.0, 30.0), (float("nan"), 1.0)]
    rows = pd.DataFrame([row | {"top1": top1, "seconds": seconds} for top1, seconds in scores])
    _, (panel,) = charts.accuracy_against_time(rows)
    assert panel.text == "3 results. Best data-free top-1: 40.00 in 9 s (gdfq); 60.00 in 20 s (gdfq)."


@pytest.fixture
def tab(browser, folder):
    """A page of the browser that has opened the report from the file system; its errors fail the test."""
    context = browser.new_context()
    tab, errors = context.new_page(), []
    tab.on("pageerror", lambda error: errors.append(error))
    tab.goto((folder / "report.html").as_uri())
    yield tab
    context.close()
    assert not errors


def lines(tab) -> list[str]:
    """The bits and variant of each line that is to be seen."""
    return [" ".join(row.split("\t")[:2]).strip() for row in tab.locator("table.results tbody tr").all_inner_texts()]


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("", 4),
        ("?bits=w3a3&method=GDFQ", 2),
        ("?bits=W3A3&method=&model=", 2),
        ("?bits=W9A9", 4),
        ("?bits=W3A3&search=control", 1),
        ("?search=gdfq", 4),
    ],
)
def test_the_address_chooses_what_tables_and_charts_show(tab, asked, shown):
    tab.goto(tab.url + asked)
    assert len(lines(tab)) == shown and tab.inner_text("#count") == f"{shown} of 4 rows"
    assert tab.locator("[data-line]:visible").count() == 2 * shown, "each line has two seeds"


def test_filters_search_and_order_are_in_the_address_and_back_returns_to_them(tab):
    tab.select_option("[name=bits]", "W3A3")
    assert "bits=W3A3" in tab.url and tab.locator(".panels figure:visible h3").all_inner_texts() == ["cifar10, W3A3"]
    tab.select_option("[name=bits]", "W4A4")
    tab.go_back()
    assert tab.input_value("[name=bits]") == "W3A3" and len(lines(tab)) == 2
    for _ in range(2):
        tab.locator("th[data-name=drop]").focus()
        tab.get_by_role("button", name="drop").first.press("Enter")
    first = lines(tab)[0]
    tab.get_by_role("link", name="seed 1, run run1").first.click()
    tab.get_by_role("link", name="notebook.html of run1").click()
    tab.go_back()
    assert lines(tab)[0] == first and len(lines(tab)) == 2 and tab.locator("#run1").get_attribute("open") is not None
    tab.get_by_role("button", name="Reset").click()
    tab.wait_for_function("!location.search.includes('bits')")
    assert len(lines(tab)) == 4


def test_a_search_that_finds_nothing_says_so(tab):
    tab.fill("[name=search]", "nowhere")
    assert tab.is_visible("#nothing") and tab.inner_text("#count") == "0 of 4 rows" and "search=nowhere" in tab.url
    assert not tab.locator("table.results:visible, .panels figure:visible").count()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everybody_can_read_it(tab, width, scheme):
    tab.set_viewport_size({"width": width, "height": 800})
    tab.emulate_media(color_scheme=scheme)
    for name in ("bits", "top-1", "drop"):
        box = tab.locator(f"th[data-name='{name}']").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, name
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert (tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") == (
        scheme == "light"
    )
    tab.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert_accessible(tab)


def test_paper_shows_all_columns(tab):
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": 700, "height": 1000})  # A4 between its margins
    assert all(tab.evaluate("[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth <= e.clientWidth)"))
