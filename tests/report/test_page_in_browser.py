"""The page of a report in a browser, wide and narrow: it is drawn, fits, is legible, and loads nothing.

    pip install playwright          drives an installed Chromium, found by its usual names
    apt-get install chromium        … or at the path in $CHROMIUM

    tools/test --long tests/report/test_page_in_browser.py -n 0 --basetemp out

leaves a screenshot of each width below `out`.
"""

import os
import shutil

import pytest

pytestmark = pytest.mark.long
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = [1280, 390]

OUTSIDE = """() => {
  const wide = document.documentElement.clientWidth;
  const scrolls = element => element && (
    ["auto", "scroll"].includes(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
  return [...document.body.querySelectorAll("*")].filter(element => {
    const box = element.getBoundingClientRect();
    const svg = element.closest("svg");
    if (!element.checkVisibility({checkVisibilityCSS: true})) return false;
    if (element.closest("defs, #js-plotly-tester")) return false;
    if (svg && svg !== element) {  // what an SVG draws beyond its edge is cut off
      const frame = svg.getBoundingClientRect();
      return element.matches("text") && (box.left < frame.left - 1 || box.right > frame.right + 1
        || box.top < frame.top - 1 || box.bottom > frame.bottom + 1);
    }
    return !scrolls(element.parentElement) && (box.left < -1 || box.right > wide + 1);
  }).map(element => element.outerHTML.slice(0, 200));
}"""

COVERED = """() => [...document.querySelectorAll(".js-plotly-plot")].filter(chart => {
  const area = chart.querySelector(".nsewdrag").getBoundingClientRect();
  const legend = chart.querySelector("g.legend");
  return legend && legend.getBoundingClientRect().bottom > area.top;
}).map(chart => chart.id)"""

UNNAMED = """() => [...document.querySelectorAll(".js-plotly-plot")].filter(chart => {
  const names = chart.layout.xaxis.ticktext || [];
  const shown = [...chart.querySelectorAll(".xtick text")].filter(
    text => text.checkVisibility({checkOpacity: true}));
  return names.length && shown.length !== names.length;
}).map(chart => chart.id)"""

LEGIBILITY = """() => {
  const numbers = colour => {
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const light = colour => {
    const [r, g, b] = colour.slice(0, 3).map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = numbers(getComputedStyle(element).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility({checkVisibilityCSS: true})) continue;
    const style = getComputedStyle(element);
    const ground = behind(element);
    const colour = numbers(element.closest("svg") ? style.fill : style.color);
    const seen = colour.slice(0, 3).map((v, i) => v * colour[3] + ground[i] * (1 - colour[3]));
    const [low, high] = [light(seen), light(ground)].sort((a, b) => a - b);
    found.push({text, ratio: (high + 0.05) / (low + 0.05), size: parseFloat(style.fontSize)});
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("the page is tried in a browser through Playwright: pip install playwright")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.fail("no Chromium: apt-get install chromium, or name the program in $CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=WIDTHS)
def page(request, browser, folder, tmp_path_factory):
    """The drawn page, with the addresses it asked for and what its console said."""
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    page.requests, page.messages = [], []
    page.on("request", lambda each: page.requests.append(each.url))
    page.on("console", lambda each: page.messages.append(f"{each.type}: {each.text}"))
    page.on("pageerror", lambda each: page.messages.append(str(each)))
    page.address = (folder / "report.html").as_uri()
    page.goto(page.address)
    page.wait_for_selector("body[data-drawn=true]")
    place = tmp_path_factory.mktemp("screenshots")
    page.screenshot(path=place / f"{request.param}.png", full_page=True)
    yield page
    page.close()


def test_a_finger_on_a_chart_scrolls_the_page(browser, folder):
    context = browser.new_context(viewport={"width": 390, "height": 900}, has_touch=True)
    page = context.new_page()
    page.goto((folder / "report.html").as_uri())
    page.wait_for_selector("body[data-drawn=true]")
    area = page.locator(".nsewdrag").nth(2)
    area.scroll_into_view_if_needed()
    box, before = area.bounding_box(), page.evaluate("scrollY")
    points = [{"x": box["x"] + 100, "y": box["y"] + 200 - 20 * k} for k in range(10)]
    fingers = context.new_cdp_session(page)
    for kind, places in [("Start", points[:1]), *(("Move", [p]) for p in points), ("End", [])]:
        fingers.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": places})
    page.wait_for_function("before => scrollY > before + 100", arg=before)
    context.close()


def test_every_chart_is_drawn_without_a_message_in_the_console(page):
    charts = page.locator(".panel > div[id]")
    assert charts.count() > 10
    assert charts.count() == page.locator(".js-plotly-plot:has(.trace path)").count()
    assert page.messages == []


def test_no_request_leaves_the_page(page):
    page.evaluate("window.dispatchEvent(new Event('resize'))")
    page.mouse.wheel(0, 20_000)
    assert [url for url in page.requests if not url.startswith("data:")] == [page.address]


def test_nothing_overflows(page):
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    wide = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= wide
    assert page.evaluate(OUTSIDE) == []


def test_every_name_on_an_axis_is_shown(page):
    assert page.evaluate(UNNAMED) == []


def test_no_legend_covers_a_chart(page):
    assert page.evaluate(COVERED) == []


def test_every_text_is_legible(page):
    """Contrast of WCAG 2's AA, 4.5 to 1, and letters of 12 pixels at least."""
    texts = page.evaluate(LEGIBILITY)
    assert len(texts) > 100
    assert [text for text in texts if text["ratio"] < 4.5 or text["size"] < 12] == []


def test_the_keyboard_reaches_the_slider_and_it_moves_the_rates(page):
    page.evaluate("document.activeElement.blur()")
    for _ in range(200):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "range":
            break
    slider = page.locator("input:focus")
    assert slider.evaluate("each => getComputedStyle(each).outlineStyle") != "none"
    chart = slider.get_attribute("id").removesuffix("-slider")
    drawn = f"[...document.querySelectorAll('#{chart} .trace path')].map(each => each.outerHTML)"
    shown = page.locator(f"#{chart}-epoch")
    last, before = shown.text_content(), page.evaluate(drawn)
    page.keyboard.press("Home")
    assert (shown.text_content(), last) == ("1", "3")
    assert slider.get_attribute("aria-valuetext") == "epoch 1"
    page.wait_for_function(f"before => JSON.stringify({drawn}) !== before", arg=str(before))
    assert page.evaluate(drawn) != before
    page.keyboard.press("End")
    assert shown.text_content() == last
