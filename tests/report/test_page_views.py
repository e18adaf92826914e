"""The page on a phone, a laptop and a large screen, light and dark, and by keyboard alone; ``--screenshots FOLDER`` keeps the pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ttcfast.report.compare import CompareConfig, compare

OPEN = "document.querySelectorAll('details').forEach(d => { d.open = true; })"
# The text that can be seen whose contrast with the colour behind it is below that of WCAG 2.2, 1.4.3.
FAINT = """(() => {
  const parse = (text) => {
    const v = text.match(/[\\d.]+/g).map(Number), whole = text.startsWith("color(") ? 255 : 1;
    return [whole * v[0], whole * v[1], whole * v[2], v[3] ?? 1];
  };
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]);
  const behind = (element) => {
    if (element === null) return [255, 255, 255];
    const own = parse(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own : over(own, behind(element.parentElement));
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || !element.checkVisibility() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const style = getComputedStyle(element), ground = behind(element), size = parseFloat(style.fontSize);
    const two = [luminance(ground), luminance(over(parse(style.color), ground))].sort((a, b) => b - a);
    const ratio = (two[0] + 0.05) / (two[1] + 0.05), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)}: ${text.slice(0, 40)}`);
  }
  return found;
})()"""
REACHED = "[...document.querySelectorAll('a[href], button, input, summary, [tabindex]')].filter(e => e.checkVisibility())"


@pytest.fixture(scope="module")
def page(run, multirun, tmp_path_factory):
    out = tmp_path_factory.mktemp("views")
    compare(CompareConfig((str(run), str(multirun), str(multirun.parent / "training")), str(out)))
    return out / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 1440])
def test_every_screen_shows_all_of_it_legibly(page, browser, request, tmp_path, width, dark):
    browser.open(page, width=width, dark=dark)
    browser.evaluate(OPEN)
    kept = request.config.getoption("--screenshots")
    folder = tmp_path if kept is None else Path(kept)
    folder.mkdir(parents=True, exist_ok=True)
    browser.picture(folder / f"report-{width}-{'dark' if dark else 'light'}.png")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width and browser.complaints == []
    assert browser.evaluate(FAINT) == []
    inside = (
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1)"
    )
    assert browser.evaluate(f"{inside}.map(e => e.outerHTML.slice(0, 80))") == []
    wide = browser.evaluate("[...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth).length")
    assert wide == 0 if width >= 1280 else wide > 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_figure_of_lines_takes_the_pages_colours(page, browser, tmp_path, dark):
    browser.open(page, width=1280, dark=dark)
    browser.evaluate(OPEN)
    browser.picture(tmp_path / "figure.png", "document.querySelector('.still img[src^=\"data:image/svg\"]')")
    shares = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB")) / 255.0
    light = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    ground = np.median(light)
    assert ground < 0.05 if dark else ground > 0.9
    contrast = (np.maximum(light, ground) + 0.05) / (np.minimum(light, ground) + 0.05)
    assert (contrast > 7).mean() > 0.005, "text and axes"


def test_the_keyboard_reaches_every_control_in_order_and_shows_where_it_is(page, browser):
    browser.open(page, width=1280)
    number = browser.evaluate(f"{REACHED}.length")
    assert number > 20 and browser.evaluate("document.querySelectorAll('[tabindex]:not([tabindex=\"0\"])').length") == 0
    for place in range(number):
        browser.press("Tab")
        here = f"(e => [{REACHED}.indexOf(e), getComputedStyle(e).outlineStyle, parseFloat(getComputedStyle(e).outlineWidth)])"
        found, style, width = browser.evaluate(f"{here}(document.activeElement)")
        assert found == place and style != "none" and width >= 1, browser.evaluate("document.activeElement.outerHTML.slice(0, 120)")


def test_the_keyboard_moves_the_slider_plays_sorts_and_unfolds(page, browser):
    browser.open(page, width=1280)
    browser.evaluate(OPEN)
    browser.evaluate("document.querySelector('.animation input').focus()")
    said = "document.querySelector('.animation output').value"
    last = browser.evaluate(said)
    browser.press("ArrowLeft")
    before = browser.evaluate(said)
    browser.press("ArrowRight")
    assert before != last and browser.evaluate(said) == last
    browser.evaluate("document.querySelector('.animation button').focus()")
    browser.press(" ")
    assert browser.evaluate("document.activeElement.textContent") == "Pause"
    browser.press("Enter")
    assert browser.evaluate("document.activeElement.textContent") == "Play"
    browser.evaluate("document.querySelector('th button').focus()")
    browser.press("Enter")
    assert browser.evaluate("document.activeElement.parentElement.ariaSort") == "ascending"
    browser.evaluate("document.querySelector('summary').focus()")
    browser.press("Enter")
    assert browser.evaluate("document.activeElement.parentElement.open") is False
    browser.open(page, width=390)
    browser.evaluate(OPEN)
    scrolled = "[...document.querySelectorAll('.scroll')].find(s => s.scrollWidth > s.clientWidth)"
    browser.evaluate(f"{scrolled}.focus()")
    browser.press("ArrowRight")
    browser.wait_for(f"{scrolled}.scrollLeft > 0", 10.0)
