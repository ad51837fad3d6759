"""The playground in a browser: real clicks and keys, streamed answers. Oracle: the toy engine's words."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.serve.conftest import Live, Serve, eventually, make_prompt

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
expect.set_options(timeout=30_000)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser complained of, the page's policy included."""
    return []


@pytest.fixture
def page(browser: Browser, complaints: list[str]) -> Iterator[Page]:
    opened = browser.new_page(viewport={"width": 1200, "height": 800})
    opened.set_default_timeout(30_000)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    yield opened
    opened.close()


def words(of: str, count: int = 3) -> str:
    return "".join(f"{of}:0:{number} " for number in range(count))


def unlock(page: Page, live: Live) -> None:
    page.goto(live.url)
    page.get_by_label("API key").fill(live.secrets["ada"])
    page.get_by_role("button", name="Open").click()


def test_the_base_and_prompts_answer_side_by_side(serve: Serve, page: Page) -> None:
    live = serve(pace=0.05)
    unlock(page, live)
    page.get_by_role("button", name="summary").click()
    page.get_by_text("Options").click()
    page.get_by_label("Tokens at most").fill("3")
    page.get_by_label("Ask all of them").fill("one two")
    page.get_by_role("button", name="Ask", exact=True).click()
    answers = page.locator("article")
    expect(answers).to_have_count(4)
    for place, of in enumerate(["base", "ada/bard@2", "ada/poet@1", "tasks/summary@1"]):
        expect(answers.nth(place).locator(".answer")).to_have_text(words(of).strip())
        expect(answers.nth(place).locator(".figures")).to_contain_text("3 tokens")
    assert {job.item[0]["content"] for job in live.toy.jobs} == {"one two"}  # type: ignore[index]


def test_words_appear_as_they_come_and_escape_stops_them(serve: Serve, page: Page) -> None:
    live = serve(pace=0.4)
    unlock(page, live)
    page.get_by_label("Ask all of them").fill("one two")
    page.keyboard.press("Control+Enter")
    first = page.locator("article").first
    expect(first.locator(".answer")).to_contain_text("base:0:0")
    assert "base:0:40" not in first.inner_text()  # it writes some more than that, at 0.4 s
    page.keyboard.press("Escape")
    expect(first.locator(".figures")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    assert eventually(lambda: {job.id for job in live.toy.jobs} == live.toy.cancelled)


@pytest.mark.parametrize("width", [1200, 420])
def test_nothing_moves_when_the_load_becomes_known(serve: Serve, page: Page, width: int) -> None:
    live = serve(auth=False)
    page.set_viewport_size({"width": width, "height": 800})
    page.route("**/v1/load", lambda route: route.abort())
    page.goto(live.url)
    chip, gauge = page.get_by_role("button", name="summary"), page.get_by_text("Prompts in memory")
    expect(chip).to_be_visible()
    expect(gauge).to_have_count(0)
    place = chip.bounding_box()
    page.unroute("**/v1/load")
    expect(gauge).to_be_visible()
    assert chip.bounding_box() == place


def test_by_keyboard_alone(serve: Serve, page: Page) -> None:
    """Tab leads from the key to a prompt, to the question and to the button, and each can be worked there."""
    live = serve()
    page.goto(live.url)
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(live.secrets["ada"])
    page.keyboard.press("Enter")
    expect(page.get_by_label("Ask all of them")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="summary")).to_be_focused()
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="summary")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name="summary")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.type("one two")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".answer").last).to_contain_text("tasks/summary@1")


def test_a_card_tells_what_is_known(serve: Serve, page: Page, complaints: list[str]) -> None:
    live = serve(auth=False)
    metrics = {"loss": 1.0, "frozen_loss": 2.0, "steps": 20, "dev_curve": [[0, 2.0], [10, 1.5], [20, 1.0]]}
    live.store.publish("ada", "told", make_prompt(5), metrics=metrics)
    page.goto(live.url)
    for name in ("ada/bard", "poet"):
        page.get_by_role("button", name=name).click()  # put away
    page.get_by_role("button", name="told").click()
    card = page.locator("article").nth(1)
    card.get_by_text("About this prompt").click()
    expect(card.locator("dl")).to_contain_text("2.00 → 1.00")
    expect(card.locator("dl")).to_contain_text("2 virtual tokens")
    expect(card.locator("svg polyline")).to_have_attribute("points", "0,0 50,25 100,50")
    expect(page.get_by_text("Prompts in memory")).to_be_visible()
    assert complaints == []


def test_names_are_text_and_errors_are_told(serve: Serve, page: Page) -> None:
    live = serve(auth=False)
    live.store.publish("ada", "poet <img src=x onerror=alert(1)>", make_prompt(5))
    page.goto(live.url)
    page.get_by_role("button", name="poet <img src=x").click()
    expect(page.locator("h2").last).to_have_text("poet <img src=x onerror=alert(1)>")
    assert page.locator("main img").count() == 0
    page.get_by_label("Find a prompt").fill("summary+poet")
    page.keyboard.press("Enter")
    expect(page.locator("h2").last).to_have_text("summary+poet")
    page.get_by_label("Find a prompt").fill("nobody")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("put one away first")
    page.get_by_role("button", name="ada/bard").click()
    page.get_by_label("Find a prompt").fill("nobody")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("does not exist")
    page.get_by_label("Ask all of them").fill("word " * 60)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".answer.failed").first).to_contain_text("a shorter text")


def test_a_wrong_key(serve: Serve, page: Page) -> None:
    page.goto(serve().url)
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Open").click()
    expect(page.locator("#unlock-hint")).to_contain_text("valid API key")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off_and_all_can_be_read(serve: Serve, browser: Browser, scheme: str) -> None:
    """No sideways scrolling at 360 pixels; text and background differ by 4.5 to 1 or more (WCAG AA)."""
    opened = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)  # type: ignore[arg-type]
    opened.goto(serve(auth=False).url)
    opened.get_by_label("Ask all of them").fill("one two")
    opened.get_by_role("button", name="Ask", exact=True).click()
    expect(opened.locator(".figures").last).to_contain_text("tokens")
    assert opened.evaluate("() => document.documentElement.scrollWidth") <= 360
    pairs = [["body", "body"], [".hint", ".sheet"], [".answer", "article"], ["#send", "#send"], [".kind", "article"]]
    colours = opened.evaluate(
        "(pairs) => pairs.map(([text, behind]) => [getComputedStyle(document.querySelector(text)).color,"
        " getComputedStyle(document.querySelector(behind)).backgroundColor])",
        pairs,
    )
    opened.close()
    for text, behind in colours:
        assert contrast(text, behind) >= 4.5, (text, behind)


def contrast(one: str, other: str) -> float:
    """The ratio of two colours' luminances as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_nothing_comes_from_elsewhere(serve: Serve) -> None:
    client = serve().http(None)
    page = client.get("/")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    for path in ("/", "/page/page.css", "/page/page.js", "/page/icon.svg"):
        found = client.get(path)
        assert found.status_code == 200
        assert "://" not in found.text.replace("http://www.w3.org/2000/svg", "")
    assert client.get("/page/..%2fapp.py").status_code == 404
    assert client.get("/page/page.py").status_code == 404
