"""The playground in a real browser: `python -m pytest tests/browser`; see CONTRIBUTING.md for what it needs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from decausal.models.checkpoint import Converted
from decausal.sampling.token_texts import BROKEN
from tests.serving.running import Running, converted, running

SECONDS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    binary = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert binary, "no chromium: install it, or name it in the environment variable CHROMIUM"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def models() -> list[Converted]:
    return [converted(), converted(layout="causal")]


@pytest.fixture(scope="module")
def server(models: list[Converted]) -> Iterator[Running]:
    with running(models, is_source=(False, True)) as found:
        yield found


class Visit:
    """A page, and what it complained of or asked of others."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.page: Page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "request", lambda request: None if request.url.startswith((url, "data:")) else self._foreign(request.url)
        )
        self.page.goto(url)
        expect(self.page.locator("#model")).to_contain_text("tiny: bidirectional", timeout=SECONDS)

    def _foreign(self, url: str) -> None:
        self.foreign.append(url)

    def write(self, text: str, **fields: str) -> None:
        """Fills the form and has it written to the end."""
        self.page.locator("#text").fill(text)
        for name, value in fields.items():
            self.page.locator(f"#{name}").fill(value)
        self.page.locator("#write").click()
        expect(self.page.locator("#status")).to_contain_text("Done in", timeout=SECONDS)


@pytest.fixture
def visit(browser: Browser, server: Running, request: pytest.FixtureRequest) -> Iterator[Visit]:
    found = Visit(browser, server.url, **getattr(request, "param", {}))
    yield found
    assert found.complaints == []
    assert found.foreign == []
    found.page.close()


def test_gaps_are_filled_and_the_slider_goes_back_through_the_passes(visit: Visit, models: list[Converted]) -> None:
    from decausal.sampling.filling.infilling import infill

    page = visit.page
    page.locator("#schedule").select_option("num_steps")
    visit.write("x = [[6]]\ny = 2", **{"schedule-value": "3"})
    pane = page.locator("#pane-model")
    wanted = infill(models[0], "x = ", "\ny = 2", 6, num_steps=3)
    expect(pane.locator(".kept")).to_have_count(6)
    pieces = [models[0].tokenizer.decode([token]) for token in wanted.ids]
    pieces[0] = pieces[0].removeprefix(" ")  # the space that was given
    assert pane.locator(".kept").all_text_contents() == pieces
    expect(pane.locator(".figures")).to_contain_text("6 tokens in 3 passes (2.00 a pass)")
    expect(page.locator("#pane-source .kept")).to_have_count(6)
    expect(page.locator("#pane-source .figures")).to_contain_text("6 tokens in 6 passes")
    for steps, count in [(0, 0), (1, 2), (2, 4), (6, 6)]:
        page.locator("#pass").fill(str(steps))
        expect(pane.locator(".kept")).to_have_count(count)
        assert pane.locator(".given").all_text_contents() == ["x = ", "\ny = 2"]
    page.locator("#play").click()
    expect(page.locator("#play")).to_have_accessible_name("Pause")
    expect(page.locator("#pass-name")).to_have_text("pass 6 of 6", timeout=SECONDS)


def test_a_gap_of_unknown_length_is_inserted_and_its_length_is_found(visit: Visit, models: list[Converted]) -> None:
    from decausal.sampling.filling.infilling import infill

    page = visit.page
    page.locator("#text").fill("x = ")
    page.locator("#gap").click()
    expect(page.locator("#text")).to_have_value("x = [[?]]")
    visit.write("x = [[?]]\ny = 2")
    wanted = infill(models[0], "x = ", "\ny = 2", None, seed=0)
    pieces = [models[0].tokenizer.decode([token]) for token in wanted.ids]
    pieces[0] = pieces[0].removeprefix(" ")
    assert page.locator("#pane-model .kept").all_text_contents() == pieces
    expect(page.locator("#pane-model .figures")).to_contain_text(
        f"{wanted.num_forwards} with all lengths that were tried"
    )
    page.locator("#pass").fill("0")
    assert page.locator("#pane-model .page > span").all_text_contents() == ["x = ", "?", "\ny = 2"]


def test_tokens_are_coloured_by_confidence_or_by_order(visit: Visit) -> None:
    page = visit.page
    visit.write("x = [[6]]\n")
    colours = lambda: page.locator("#pane-model .kept").evaluate_all(  # noqa: E731
        "spans => spans.map(span => getComputedStyle(span).backgroundColor)"
    )
    by_confidence = colours()
    assert len(set(by_confidence)) > 1
    page.locator("#colour").select_option("order")
    assert colours() != by_confidence
    page.locator("#colour").select_option("none")
    assert set(colours()) == {"rgba(0, 0, 0, 0)"}


def test_everything_is_done_with_the_keyboard_alone(visit: Visit) -> None:
    page = visit.page
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type("import ")
    page.keyboard.press("Tab")
    expect(page.locator("#gap")).to_be_focused()
    page.locator("#max_tokens").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("5")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("Done in", timeout=SECONDS)
    page.locator("#pass").focus()
    page.keyboard.press("Home")
    expect(page.locator("#pass")).to_have_attribute("aria-valuetext", "pass 0 of 5")
    page.keyboard.press("End")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.locator("#pane-model .page")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#pane-model .token")).to_contain_text("confidence")
    first = page.locator("#pane-model .token").inner_text()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#pane-model .token")).to_have_text(first)


@pytest.mark.parametrize(
    "visit",
    [
        {"viewport": {"width": 360, "height": 640}, "has_touch": True},
        {"viewport": {"width": 360, "height": 640}, "color_scheme": "dark"},
        {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"},
    ],
    indirect=True,
    ids=["narrow", "narrow and dark", "still"],
)
def test_nothing_is_cut_off_and_everything_can_be_read(visit: Visit) -> None:
    page = visit.page
    visit.write("_" * 45 + "[[8]] more")
    width = page.viewport_size["width"]
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    for button in page.locator("button:visible, input:visible, select:visible").all():
        box = button.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    for selector in ("#model", "#status", ".hint:visible >> nth=0", ".figures >> nth=0"):
        assert _contrast(page, selector) >= 4.5, selector


def test_every_control_has_a_name(visit: Visit) -> None:
    visit.write("x = [[3]]\n")
    unnamed = visit.page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button, [tabindex]")]
            .filter(e => e.checkVisibility())
            .filter(e => !(e.labels?.length || e.ariaLabel || e.textContent.trim()))
            .map(e => e.outerHTML)"""
    )
    assert unnamed == []


def test_what_the_server_refuses_is_reported_and_the_page_goes_on(browser: Browser, server: Running) -> None:
    visit = Visit(browser, server.url)
    visit.page.locator("#text").fill("x [[90]]")
    visit.page.locator("#write").click()
    expect(visit.page.locator("#error")).to_contain_text("at most 64", timeout=SECONDS)
    visit.write("x [[6]]")
    expect(visit.page.locator("#error")).to_be_hidden()
    assert all("status of 400" in complaint for complaint in visit.complaints)
    visit.page.close()


def test_escape_stops_and_frees_the_row(visit: Visit, server: Running, models: list[Converted]) -> None:
    hook = models[0].model.base_model.register_forward_pre_hook(lambda *call: time.sleep(0.2))
    page = visit.page
    page.locator("#with-source").uncheck()
    page.locator("#schedule").select_option("num_steps")
    page.locator("#schedule-value").fill("40")
    page.locator("#text").fill("x [[40]]")
    page.locator("#write").click()
    expect(page.locator("#pane-model .kept")).not_to_have_count(0, timeout=SECONDS)
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Stopped.")
    server.wait_until_idle()
    hook.remove()


def test_block_models_alone_offer_to_speculate(visit: Visit, browser: Browser) -> None:
    from decausal.sampling.generate import generate

    expect(visit.page.locator("#speculative")).to_be_hidden()
    model = converted(layout="block", block_size=4)
    wanted = generate(model, "x = ", max_new_tokens=9, speculative=True)
    with running([model]) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.locator("#speculative").check(timeout=SECONDS)
        page.locator("#text").fill("x = ")
        page.locator("#max_tokens").fill("9")
        page.locator("#write").click()
        figures = page.locator("#pane-model .figures")
        expect(figures).to_contain_text(f"{len(wanted.ids)} tokens in {wanted.num_forwards} passes", timeout=SECONDS)
        page.close()


def test_what_became_of_drafts_is_reported(browser: Browser) -> None:
    from decausal.sampling.generate import generate

    model = converted(layout="block", block_size=4, sampler={"speculative": True, "draft": "linear"})
    drafts = generate(model, "x = ", max_new_tokens=9).drafts
    with running([model]) as server:
        page = browser.new_page()
        page.goto(server.url)
        expect(page.locator("#speculative")).to_be_checked(timeout=SECONDS)
        page.locator("#text").fill("x = ")
        page.locator("#max_tokens").fill("9")
        page.locator("#write").click()
        reported = f"{drafts.tokens_per_pass:.2f} tokens each; drafts right: {drafts.acceptances[0]:.2f}"
        expect(page.locator("#status")).to_contain_text(reported, timeout=SECONDS)
        expect(page.locator("#status")).to_contain_text("(linear 4)")
        page.close()


def test_a_key_is_asked_for_where_the_server_has_one(browser: Browser, models: list[Converted]) -> None:
    with running(models[:1], api_key="secret") as server:
        page = browser.new_page()
        page.goto(server.url)
        expect(page.locator("#key")).to_be_focused(timeout=SECONDS)
        page.locator("#key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_contain_text("tiny: bidirectional", timeout=SECONDS)
        page.close()


def _contrast(page: Page, selector: str) -> float:
    """Contrast of an element's text against the nearest background after it (WCAG 2)."""
    return page.locator(selector).evaluate(
        """element => {
            const channels = colour => colour.match(/[\\d.]+/g).map(Number);
            const luminance = colour => channels(colour).slice(0, 3).map(c => c / 255)
                .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
                .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
            let after = element;
            while (channels(getComputedStyle(after).backgroundColor)[3] === 0) after = after.parentElement;
            const pair = [getComputedStyle(element).color, getComputedStyle(after).backgroundColor].map(luminance);
            return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
        }"""
    )


def test_right_to_left_text_stays_whole_while_it_is_written(visit: Visit) -> None:
    page = visit.page
    page.locator("#schedule").select_option("num_steps")
    visit.write("مرحبا [[4]] طويل [[3]] סוף", **{"schedule-value": "3", "temperature": "3"})
    assert page.locator("#text").evaluate("field => getComputedStyle(field).direction") == "rtl"
    pane = page.locator("#pane-model")
    assert pane.locator(".page").evaluate("pane => getComputedStyle(pane).direction") == "rtl"
    for number in range(3):
        page.locator("#pass").fill(str(number))
        texts = pane.locator(".page > span").all_text_contents()
        assert BROKEN not in "".join(texts)
        assert "".join(pane.locator(".given").all_text_contents()).split() == ["مرحبا", "طويل", "סוף"]


def test_a_single_pass_is_called_so(visit: Visit) -> None:
    visit.page.locator("#schedule").select_option("num_steps")
    visit.write("x = [[1]]\n", **{"schedule-value": "1"})
    expect(visit.page.locator("#status")).to_contain_text("Done in 1 pass.")
    expect(visit.page.locator("#pane-model .figures")).to_contain_text("1 token in 1 pass (1.00 a pass)")


def test_a_gap_of_hundreds_of_digits_is_an_error(visit: Visit) -> None:
    page = visit.page
    page.locator("#text").fill(f"x = [[{'9' * 400}]]\n")
    page.locator("#write").click()
    expect(page.locator("#error")).to_contain_text("a gap of 999999999… (400 digits) tokens is not accepted")
    expect(page.locator("#result")).to_be_hidden()


@pytest.mark.parametrize("visit", [{"viewport": {"width": 390, "height": 740}, "has_touch": True}], indirect=True)
def test_on_a_phone_the_result_is_brought_into_view(visit: Visit) -> None:
    visit.write("x = [[6]]\n")
    expect(visit.page.locator("#pane-model .page")).to_be_in_viewport(timeout=SECONDS)
