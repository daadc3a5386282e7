"""report.html: made from results alone, complete, self-contained; every number leads to the run it came from."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest

from dfqlib.papers import profiles
from dfqlib.report import collect, page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def report(tmp_path) -> str:
    """A page of two runs of GDFQ that differ in the seed; one was executed to a notebook page too."""
    rows = []
    for seed, top1 in enumerate((50.0, 52.0)):
        folder = tmp_path / "quick" / "gdfq" / f"run{seed}"
        folder.mkdir(parents=True)
        metrics = {"paper": "gdfq", "schedule": "reduced: <b>", "run": {"id": f"run{seed}"}, "parameters": {"lr": 0.25}}
        metrics |= {"provenance": {"commit": "0123", "versions": {"torch": "2.9"}}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "notebook.ipynb").touch()
        own = {"paper": "gdfq", "method": "gdfq", "scheme": "qat", "dataset": "cifar10", "data": "cifar10-2k"}
        own |= {"model": "resnet20_cifar10", "ranges": "generated", "profile": "quick", "schedule": "reduced: x"}
        own |= {"variant": "", "seed": seed, "top1_best": top1, "fp32_top1": 92.0, "seconds": 3.0, "run": f"run{seed}"}
        for bits in (3, 4):
            rows.append(own | {"weight_bits": bits, "activation_bits": bits, "top1": top1, "folder": str(folder)})
    (tmp_path / "quick" / "gdfq" / "run1" / "notebook.html").touch()
    figure = tmp_path / "curve.png"
    figure.write_bytes(b"picture")
    missing = collect.not_run(pd.DataFrame(), ["gdfq"], {}).query("dataset == 'imagenet'")
    content = [page.Section(profiles.paper("gdfq"), pd.DataFrame(rows), missing, [figure])]
    page.write_page(tmp_path, content)
    written = (tmp_path / "report.html").stat().st_mtime_ns
    page.write_page(tmp_path, content)
    assert (tmp_path / "report.html").stat().st_mtime_ns == written, "the same page was drawn twice"
    figure.write_bytes(b"new picture")
    page.write_page(tmp_path, content)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def attributes(text: str, tag: str) -> list[dict[str, str]]:
    """The attributes of every element of this kind."""
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, name, attrs):
            if name == tag:
                found.append(dict(attrs))

    Reader().feed(text)
    return found


def test_numbers_stand_beside_the_published_ones_and_lead_to_their_runs(report, tmp_path):
    assert ">51.00 ± 1.41</td>" in report and ">75.11</td>" in report
    links = [link["href"] for link in attributes(report, "a")]
    assert links.count("#run0") == links.count("#run1") == 2
    assert {run["id"] for run in attributes(report, "details") if "id" in run} == {"run0", "run1"}
    files = [link for link in links if not link.startswith("#")]
    assert "quick/gdfq/run1/notebook.html" in files and "quick/gdfq/run0/notebook.html" not in files
    assert all((tmp_path / file).is_file() for file in files)
    for fact in ("0123", "versions torch", "2.9", "0.25", "reduced: &lt;b&gt;"):
        assert fact in report
    missing = collect.not_run(pd.DataFrame(), ["gdfq"], {}).query("dataset == 'imagenet'")
    assert report.count('<td class="text">imagenet</td>') == len(missing)


def test_page_needs_nothing_but_itself(report):
    addresses = [tag.get("src", "") for name in ("img", "script", "iframe") for tag in attributes(report, name)]
    addresses += [tag["href"] for tag in attributes(report, "link")]
    assert addresses and all(not address or address.startswith("data:") for address in addresses)
    assert not re.search(r"(@import|url\(|from)\s*[\"']?(https?:)?//", report) and "fetch(" not in report


@pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="no Chromium on this machine")
@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("", ["W3A3", "W4A4"]),
        ("?bits=w3a3&method=GDFQ", ["W3A3"]),
        ("?bits=W3A3&method=&model=", ["W3A3"]),
        ("?bits=W9A9", ["W3A3", "W4A4"]),
    ],
)
def test_the_address_filters_in_a_browser_from_the_file_system(report, tmp_path, asked, shown):
    """The filters are a form whose values are the address, so that Back, a bookmark and a link show the same rows."""
    address = (tmp_path / "report.html").as_uri() + asked
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    done = subprocess.run(
        [CHROMIUM, *options, "--enable-logging=stderr", "--dump-dom", address], capture_output=True, text=True
    )
    assert done.returncode == 0 and "CONSOLE" not in done.stderr
    assert f"{len(shown)} of 2 rows" in done.stdout
    _, _, table = done.stdout.partition('id="table-gdfq"')
    assert re.findall(r">(W\dA\d)</td>", table.partition("</table>")[0]) == shown
    assert {select["name"] for select in attributes(done.stdout, "select")} == set(page.FILTERS)
