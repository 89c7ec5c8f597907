"""The page of geometry in a browser, opened as a file: turned, clicked, stepped through, by mouse, touch and keys."""

from __future__ import annotations

from pathlib import Path

import pytest

import test_report_page
from test_geometry import model_of
from test_report_page import Watched
from twofold.geometry import Question, open_model, see
from twofold.geometry.page import html

TEXT = "for word in words:\n    count(word)\n"


browser = test_report_page.browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("geometry")
    made = {}
    for name, tie in (("tied", "(Q, K=V)"), ("untied", "(Q, K, V)"), ("mixed", "(Q, K, V) | (Q, K=V)")):
        model_of(tie=tie).save_pretrained(base / name)
        question = Question(text=TEXT, shown=len(TEXT), draws=4)
        made[name] = base / f"{name}.html"
        made[name].write_text(html(see(open_model(base / name), question), f"twofold geometry {name}"))
    return made


def ready(page):
    page.wait_for_selector("html[data-ready=yes]")
    return page


def ink(page, name: str = "cloud") -> str:
    """What a canvas shows, as a text that any change changes."""
    return page.evaluate("(id) => document.getElementById(id).toDataURL()", name)


@pytest.mark.parametrize(("name", "width"), [("tied", 1280), ("untied", 360), ("mixed", 800)])
def test_everything_can_be_clicked_and_nothing_is_asked_for(browser, pages, name, width):
    with Watched(browser, pages[name], width=width) as page:
        ready(page)
        for summary in page.locator("summary").all():
            summary.click()
        for chosen in ("#layers", "#heads", "#axes", "#legend", ".zoom"):
            for button in page.locator(f"{chosen} button").all():
                button.click()
        for link in page.locator("nav a").all():
            link.click()
        for other in (1280, 800, 640, 360, 320):
            page.set_viewport_size({"width": other, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= other


def test_a_token_that_is_clicked_is_the_query_everywhere(browser, pages):
    with Watched(browser, pages["tied"]) as page:
        ready(page)
        tokens = page.locator("#text span")
        assert tokens.count() == len(TEXT)
        before = ink(page), ink(page, "map")
        tokens.nth(9).click()
        page.mouse.move(0, 0)
        assert tokens.nth(9).get_attribute("aria-selected") == "true"
        assert page.locator("#text span[aria-selected=true]").count() == 1
        assert "(token 9)" in page.locator("#told").inner_text()
        assert tokens.nth(10).evaluate("e => e.classList.contains('later')")
        assert not tokens.nth(8).evaluate("e => e.classList.contains('later')")
        after = ink(page), ink(page, "map")
        assert before[0] != after[0]
        assert before[1] != after[1]
        page.locator("#text").focus()
        page.keyboard.press("ArrowRight")
        assert "(token 10)" in page.locator("#told").inner_text()
        page.keyboard.press("End")
        assert f"(token {len(TEXT) - 1})" in page.locator("#told").inner_text()
        box = page.locator("#map").bounding_box()
        page.mouse.click(box["x"] + 2, box["y"] + box["height"] * 4.5 / len(TEXT))
        assert "(token 4)" in page.locator("#told").inner_text()
        assert "Key “f” (0)" in page.locator("#told").inner_text()


def test_the_cloud_is_turned_by_mouse_and_keys_and_set_back(browser, pages):
    with Watched(browser, pages["untied"]) as page:
        ready(page)
        first = ink(page)
        cloud = page.locator("#cloud")
        cloud.scroll_into_view_if_needed()
        box = cloud.bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(*middle)
        page.mouse.down()
        page.mouse.move(middle[0] + 90, middle[1] + 30, steps=4)
        page.mouse.up()
        page.mouse.move(0, 0)
        turned = ink(page)
        assert turned != first
        cloud.focus()
        for key in ("ArrowLeft", "ArrowUp", "+", "-"):
            before = ink(page)
            page.keyboard.press(key)
            assert ink(page) != before, key
        page.keyboard.press("0")
        assert ink(page) == first
        page.locator("#nearer").click()
        assert ink(page) != first
        page.locator("#front").click()
        assert ink(page) == first
        page.locator("#axes button").nth(1).click()
        assert ink(page) != first
        hull = page.locator("#legend button", has_text="hull")
        before = ink(page)
        hull.click()
        assert hull.get_attribute("aria-pressed") == "false"
        assert ink(page) != before


def test_the_cloud_is_turned_and_a_point_chosen_by_touch(browser, pages):
    context = browser.new_context(viewport={"width": 400, "height": 900}, has_touch=True, reduced_motion="reduce")
    page = context.new_page()
    page.goto(pages["tied"].as_uri())
    ready(page)
    cloud = page.locator("#cloud")
    cloud.scroll_into_view_if_needed()
    first, box = ink(page), cloud.bounding_box()
    session = context.new_cdp_session(page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        session.send(
            "Input.dispatchTouchEvent",
            {"type": kind, "touchPoints": [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(points)]},
        )

    x, y = box["x"] + 120, box["y"] + 100
    touch("touchStart", (x, y))
    for step in range(1, 6):
        touch("touchMove", (x + 15 * step, y))
    touch("touchEnd")
    turned = ink(page)
    assert turned != first
    touch("touchStart", (x, y), (x + 40, y))
    for step in range(1, 5):
        touch("touchMove", (x - 5 * step, y), (x + 40 + 10 * step, y))
    touch("touchEnd")
    assert ink(page) != turned
    context.close()


def test_the_pull_is_stepped_through_and_played(browser, pages):
    with Watched(browser, pages["tied"]) as page:
        ready(page)
        step = page.locator("#step")
        assert (step.get_attribute("max"), step.input_value()) == ("8", "1")
        words = page.locator("#step-words")
        assert "output" in words.inner_text()
        seen = {ink(page)}
        step.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
            seen.add(ink(page))
        assert len(seen) == 4
        assert (
            words.inner_text() == "Step 4: asked again with what it had after step 3. The model itself takes one step."
        )
        assert "after 3 steps looks at" in page.locator("#told").inner_text()
        page.locator("#play").click()
        page.wait_for_function(
            "document.getElementById('step').value === '8' && document.getElementById('play').textContent === 'Play'"
        )
        assert "Step 8" in words.inner_text()
    with Watched(browser, pages["untied"]) as page:
        ready(page)
        assert page.locator("#step").get_attribute("max") == "1"


def test_layers_of_other_ties_have_other_clouds(browser, pages):
    with Watched(browser, pages["mixed"]) as page:
        ready(page)
        names = {}
        for index in (0, 1):
            page.locator("#layers button").nth(index).click()
            page.wait_for_function(
                f"document.getElementById('layers').children[{index}].getAttribute('aria-pressed') === 'true'"
            )
            names[page.locator("#tie").inner_text()] = page.locator("#legend button").all_inner_texts()[:3]
        assert names["(Q, K, V)"] == ["queries", "keys", "values"]
        assert names["(Q, K=V)"][:2] == ["queries", "keys = values"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_follows_the_theme(browser, pages, scheme):
    with Watched(browser, pages["tied"], scheme=scheme) as page:
        ready(page)
        drawn = {}
        for chosen in ("light", "dark"):
            page.locator("#theme").click()
            assert page.evaluate("document.documentElement.dataset.theme") == chosen
            drawn[chosen] = ink(page)
        assert drawn["light"] != drawn["dark"]


def test_the_tables_and_a_still_are_there_without_scripts(browser, pages):
    with Watched(browser, pages["tied"], scripts=False) as page:
        assert page.locator("noscript svg").count() == 1
        assert page.locator("#measures table").first.is_visible()
        assert page.locator("#published tbody tr").count() == 9
