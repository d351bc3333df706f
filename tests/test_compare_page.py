"""The report as a reader opens it: headless Chromium, no network, light and dark, wide and narrow."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from fedseg.reporting.compare.analysis import Analysis
from fedseg.reporting.compare.gather import gather
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.report import Extras, Report, ShownCase, write
from fedseg.reporting.compare.runs import find_runs, read_run
from fedseg.reporting.compare.verdicts import Verdict
from tests.run_folders import write_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, all_rendered: None) -> Report:
    """A report with every section: unseen site, heterogeneity, cases, names that would break careless HTML."""
    folder = tmp_path_factory.mktemp("page")
    sites = {"site_01": 24, "<b>&'\"": 24, "site_03": 24, "outside": 12}
    for seed in (0, 1):
        for algorithm in ("fedavg", "ditto", "local", "pooled"):
            effects = {("personal", "site_01"): 0.1, ("personal", "site_03"): -0.1}
            write_run(folder / f"{algorithm}-{seed}", algorithm, seed, sites=sites, effects=effects, unseen=["outside"])
    picture = folder / "case.png"
    Image.new("RGB", (40, 30), "red").save(picture)

    def measured(found: Sequence[Verdict]) -> Extras:
        rows = [(v.site, "", name, float(i)) for i, v in enumerate(found) for name in ("intensity", "size/cup")]
        differences = pd.DataFrame(rows, columns=["site", "other", "measure", "value"])
        return Extras(
            differences,
            "",
            [
                ShownCase("site_01", picture, "case_0001", 0.2, 0, 0.3, 2),
                ShownCase("site_01", picture, "case_0002", -0.1, 1, -0.1, 1),
            ],
        )

    runs = [read_run(path, "dice") for path in find_runs([str(folder)])]
    return write(Analysis(gather(runs), Options(draws=200)), folder / "report", measured)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(params=[(1280, 800, "light"), (390, 844, "dark")], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, report: Report) -> Iterator[Any]:
    """The open page; whatever it asks for and whatever goes wrong is collected on it."""
    width, height, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    opened = context.new_page()
    opened.asked, opened.wrong = [], []
    opened.on("request", lambda asked: opened.asked.append(asked.url))
    opened.on("console", lambda message: opened.wrong.append(message.text))
    opened.on("pageerror", lambda error: opened.wrong.append(str(error)))
    opened.goto(report.page.as_uri())
    opened.wait_for_load_state("load")
    yield opened
    context.close()


@pytest.mark.slow
def test_it_asks_for_nothing_beyond_the_file_and_no_script_fails(page: Any, report: Report) -> None:
    assert [url for url in page.asked if not url.startswith("data:")] == [report.page.as_uri()]
    assert page.wrong == []


@pytest.mark.slow
def test_every_picture_loads(page: Any) -> None:
    sizes = page.evaluate(
        "Promise.all([...document.images].map(i => i.decode().then(() => [i.currentSrc.slice(0, 10), i.naturalWidth])))"
    )
    assert len(sizes) == 20  # nine plots on light and on dark ground, two cases
    assert page.evaluate("[...document.images].filter(i => i.offsetWidth > 0).length") == 11
    assert all(source == "data:image" and width > 0 for source, width in sizes)


@pytest.mark.slow
def test_nothing_is_wider_than_the_screen(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.slow
def test_what_is_wider_than_the_screen_says_so_until_its_end_is_reached(page: Any) -> None:
    hints = "[...document.querySelectorAll('.scroll')].filter(b => b.offsetParent && b.scrollWidth > b.clientWidth + 1)"
    told = page.evaluate(hints + ".map(b => getComputedStyle(b.parentElement.querySelector('.hint')).display)")
    assert set(told) <= {"block"}
    if page.viewport_size["width"] == 390:
        assert len(told) > 3
        page.evaluate(hints + ".forEach(b => b.scrollLeft = b.scrollWidth)")
        page.wait_for_function("document.querySelectorAll('figure.wider').length === 0")


@pytest.mark.slow
def test_on_paper_everything_is_open_on_white_and_within_the_page(page: Any) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 700, "height": 990})  # A4 within its margins
    tables = page.locator("table.sortable")
    assert tables.count() > 8
    assert all(tables.nth(i).bounding_box() for i in range(tables.count()))
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("[...document.querySelectorAll('.on-dark')].every(i => i.offsetWidth === 0)")
    assert page.evaluate("[...document.querySelectorAll('.on-light')].every(i => i.offsetWidth > 0)")
    right = "[...document.querySelectorAll('table, img')].map(e => e.getBoundingClientRect().right)"
    assert page.evaluate(f"Math.max(...{right}) <= window.innerWidth")
    assert page.evaluate("[...document.querySelectorAll('.hint, nav')].every(e => e.offsetHeight === 0)")


@pytest.mark.slow
def test_the_first_screen_holds_the_answer(page: Any, report: Report) -> None:
    lines = page.locator(".verdict .line").all_inner_texts()
    assert [line.replace("\u00a0", " ") for line in lines] == [verdict.text for verdict in report.verdicts]
    assert {item.get_attribute("data-site") for item in page.locator(".verdict").all()} == {
        "mean over sites",
        "site_01",
        "<b>&'\"",
        "site_03",
    }
    assert page.locator(".verdict .line").first.bounding_box()["y"] < page.viewport_size["height"] / 2
    plot = page.locator(".answer img:visible").bounding_box()
    if page.viewport_size["width"] > 1000:
        assert plot["y"] + plot["height"] <= page.viewport_size["height"]


@pytest.mark.slow
def test_tables_sort_by_a_click_on_a_heading(page: Any) -> None:
    table = page.locator("#table-scores_best")
    head = table.locator("thead th").nth(1)

    def keys() -> list[float]:
        return [float(cell.get_attribute("data-key")) for cell in table.locator("tbody tr td:nth-child(2)").all()]

    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert keys() == sorted(keys(), reverse=True)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert keys() == sorted(keys())
    table.locator("thead button").first.click()
    names = table.locator("tbody th").all_inner_texts()
    assert names == sorted(names)
    assert head.get_attribute("aria-sort") == "none"


@pytest.mark.slow
def test_every_part_of_the_comparison_is_there(page: Any) -> None:
    titles = page.locator("h2").all_inner_texts()
    assert titles == [
        "Scores",
        "Unseen sites",
        "Personal against global",
        "Fairness and local training",
        "Ranks",
        "Cost",
        "Heterogeneity",
        "Cases",
        "Data and methods",
        "How to read this",
        "Runs",
    ]
    assert page.locator("nav a").all_inner_texts() == ["Answer", *titles]
    assert page.locator("h2 + p.warn").count() == 0
    captions = page.locator(".gallery figcaption").all_inner_texts()
    assert captions == [
        "site_01, case_0001: gain +30.0 Dice with seed 0, mean of 2 seeds +20.0 Dice",
        "site_01, case_0002: loss −10.0 Dice with seed 1",
    ]
    assert page.locator("body b").count() == 0  # names are text, not markup
    page.locator("summary", has_text="Every personal model").click()
    assert page.locator("#table-personal_against_global tbody tr").count() == 4
