"""The page in a browser, opened as a file: everything that can be clicked is clicked; no error, no request, no sideways scrolling."""

from __future__ import annotations

import csv
import io
import os
import shutil
from pathlib import Path

import pytest

from study_fixture import PLAN, write_study
from twofold import report

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
REQUIRED = os.environ.get("TWOFOLD_REQUIRE_BROWSER") == "1"


def browser_path() -> str | None:
    """The system's browser; None lets playwright use its own."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        if REQUIRED:
            raise
        pytest.skip("playwright is not installed")
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=browser_path(), args=ARGUMENTS)
        except Error as error:
            if REQUIRED:
                raise
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Studies at different moments."""
    base = tmp_path_factory.mktemp("studies")
    write_study(base / "complete", complete=True)
    write_study(base / "partial")
    write_study(base / "empty", complete=True)
    shutil.rmtree(base / "empty" / "runs")
    widths = [{"name": f"w{width}", "model": {"hidden_size": width}} for width in (32, 48, 64, 96, 128, 160, 192)]
    write_study(base / "grid", plan=PLAN | {"seeds": [0, 1], "grid": [{"name": "width", "points": widths}]})
    return {name: report.write(base / name)[0] for name in ("complete", "partial", "empty", "grid")}


class Watched:
    """A page whose every complaint and request is kept."""

    def __init__(self, browser, path: Path, *, width: int = 1280, scheme: str = "light", scripts: bool = True) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,
            java_script_enabled=scripts,
            reduced_motion="reduce",
        )
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.as_uri()
        self.page.goto(self.url)

    def __enter__(self):
        return self.page

    def __exit__(self, kind, error, trace):
        complaints, requests = self.complaints, self.requests
        self.context.close()
        if kind is None:
            assert not complaints
            outside = [url for url in requests if url != self.url and not url.startswith(("data:", "blob:"))]
            assert not outside


@pytest.mark.parametrize(("state", "width"), [("complete", 1280), ("partial", 360), ("empty", 360), ("grid", 1280)])
def test_everything_can_be_clicked(browser, pages, state, width):
    with Watched(browser, pages[state], width=width) as page:
        assert page.locator("h1").is_visible()
        for summary in page.locator("summary").all():
            summary.click()
        assert page.locator("details:not([open])").count() == 0
        for button in page.locator("button:visible").all():
            button.click()
        for link in page.locator("nav a").all():
            link.click()
        for other in (1280, 800, 640, 360, 320):
            page.set_viewport_size({"width": other, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= other


def test_switches_legends_and_the_axis_do_what_they_say(browser, pages):
    with Watched(browser, pages["complete"]) as page:
        figure = page.locator(".curves-figure").first
        shown = figure.locator(".panel:visible")
        assert shown.get_attribute("data-panel") == "held_out"
        figure.get_by_role("button", name="Training").click()
        assert shown.get_attribute("data-panel") == "train"
        figure.get_by_role("button", name="Minus reference").click()
        assert shown.get_attribute("data-panel") == "difference"
        figure.get_by_role("button", name="Held out").click()

        series = shown.locator(".wide .series[data-variant='gqa-2']")
        assert series.is_visible()
        legend = figure.locator(".legend button[data-variant='gqa-2']")
        legend.click()
        assert not series.is_visible()
        assert legend.get_attribute("aria-pressed") == "false"
        legend.click()
        assert series.is_visible()

        line = shown.locator(".wide .series path.line").first
        straight = line.get_attribute("d")
        axis = figure.get_by_role("button", name="Log tokens")
        axis.click()
        bent = line.get_attribute("d")
        assert bent != straight
        ends = [[float(number) for number in path.split()[-1].split(",")] for path in (bent, straight)]
        assert ends[0] == pytest.approx(ends[1])  # the last point stays where it is
        assert shown.locator(".wide .axis-log").is_visible()
        assert not shown.locator(".wide .axis-straight").is_visible()
        axis.click()
        assert line.get_attribute("d") == straight


def test_points_are_reached_by_keys_and_tell_their_values(browser, pages):
    with Watched(browser, pages["complete"]) as page:
        points = page.locator("svg.frontier:visible").first.locator(".point")
        assert [point.get_attribute("tabindex") for point in points.all()].count("0") == 1
        points.first.focus()
        tip = page.locator("#tip")
        assert tip.is_visible()
        first = tip.inner_text()
        page.keyboard.press("ArrowRight")
        assert tip.inner_text() != first
        assert "95%" not in first
        assert "n = 3" in first
        assert "of resamples" in first
        page.keyboard.press("Escape")
        assert not tip.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_and_can_be_chosen(browser, pages, scheme):
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}
    with Watched(browser, pages["complete"], scheme=scheme) as page:
        assert page.evaluate(ground) == colours[scheme]
        button = page.locator("#theme")
        for chosen in ("light", "dark"):
            button.click()
            assert page.evaluate(ground) == colours[chosen]
        page.reload()
        assert page.evaluate(ground) == colours["dark"]
        page.emulate_media(media="print")
        assert page.evaluate(ground) == colours["light"]


def test_the_tables_are_in_the_page_itself(browser, pages, tmp_path):
    """A copy of the one file gives every table."""
    alone = Path(shutil.copy(pages["complete"], tmp_path / "copy.html"))
    with Watched(browser, alone) as page:
        for name in ("runs.csv", "curves.csv", "differences.csv", "report.json", "report.md", "frontier.svg"):
            with page.expect_download() as waiting:
                page.locator(f"a[data-file='{name}']").click()
            assert Path(waiting.value.path()).read_bytes() == (pages["complete"].parent / name).read_bytes()
        assert len(list(csv.reader(io.StringIO((pages["complete"].parent / "runs.csv").read_text())))) == 37


def test_a_reload_while_runs_go_on_keeps_what_was_chosen(browser, pages):
    with Watched(browser, pages["partial"]) as page:
        page.clock.install()
        page.reload()
        figure = page.locator(".curves-figure").first
        figure.get_by_role("button", name="Training").click()
        figure.locator(".legend button[data-variant='mqa']").click()
        # A browser tells of an opened detail a moment later: the page may be gone by then.
        page.evaluate("addEventListener('toggle', (event) => event.stopImmediatePropagation(), true)")
        page.locator("summary").first.click()
        page.evaluate("window.scrollTo({top: 700, behavior: 'instant'}); window.mark = 1")
        page.clock.run_for(30_000)
        page.wait_for_function("window.mark === undefined")
        page.wait_for_load_state()
        assert figure.get_by_role("button", name="Training").get_attribute("aria-pressed") == "true"
        assert figure.locator(".legend button[data-variant='mqa']").get_attribute("aria-pressed") == "false"
        assert page.locator("details[open]").count() == 1
        assert abs(page.evaluate("window.scrollY") - 700) < 5

        page.locator("#updates").click()
        page.evaluate("window.mark = 1")
        page.clock.run_for(60_000)
        assert page.evaluate("window.mark") == 1


def test_a_complete_page_never_reloads(browser, pages):
    with Watched(browser, pages["complete"]) as page:
        page.clock.install()
        page.reload()
        page.evaluate("window.mark = 1")
        page.clock.run_for(120_000)
        assert page.evaluate("window.mark") == 1
        assert not page.locator("#updates").is_visible()


def test_it_is_readable_without_scripts(browser, pages):
    with Watched(browser, pages["complete"], scripts=False) as page:
        assert page.locator("svg.frontier:visible").count() == 2
        assert page.locator(".panel:visible").count() == 6


def test_print_shows_figures_whole_and_no_buttons(browser, pages):
    with Watched(browser, pages["complete"], width=680) as page:
        page.emulate_media(media="print")
        assert page.locator("svg.frontier:visible").count() == 2
        assert page.locator(".panel:visible").count() == 6
        assert page.locator("nav:visible, #theme:visible, .controls:visible").count() == 0
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_a_page_with_an_error_or_a_request_is_found(browser, tmp_path):
    """Liars: what the other tests look for is seen where it is."""
    for body in (
        "<script>throw new Error('x')</script>",
        "<img src='http://127.0.0.1:9/x.png'>",
        "<script>console.log(1)</script>",
    ):
        path = tmp_path / "liar.html"
        path.write_text(f"<!doctype html><link rel=icon href='data:,'>{body}")
        with pytest.raises(AssertionError), Watched(browser, path) as page:
            page.wait_for_timeout(50)
