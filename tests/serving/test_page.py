"""The page in a real browser: what people see, by keyboard, on a phone, with ids that are markup, and when things fail.

Needs Playwright for Python and a Chromium or Chrome; skipped, with the reason, where either is missing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serving.test_bounds import broken
from tests.serving.test_looks import Logged
from tests.serving.test_server import Served, serving

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT_MS = 15_000
MARKUP = '<img src=x onerror="document.title=1">/é'  # a user id that is markup, and has a slash


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One of this machine, or the one that `playwright install chromium` has put in its place."""
    with playwright.sync_playwright() as tools:
        path = next(filter(None, map(shutil.which, BROWSERS)), None)
        if path is None and not Path(tools.chromium.executable_path).exists():
            pytest.skip("needs a Chromium or Chrome: python -m playwright install chromium, or the system's package")
        found = tools.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("page"), num_layers=1) as found:
        event = {"user": MARKUP, "item": 3, "at": "2026-01-02T03:04:05Z", "action": "b"}
        assert found.post("/v1/events", {"events": [event]}).status_code == 200
        yield found


@contextmanager
def opened(browser: Any, served: Served, place: str = "", **options: Any) -> Iterator[Any]:
    """A tab at a place of the page; nothing may have gone wrong in it, and no other host been asked, when it closes."""
    context = browser.new_context(**({"viewport": {"width": 1440, "height": 900}} | options))
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if "Content Security" in message.text else None)
    page.on("request", lambda asked: asked.url.startswith(served.running.url) or problems.append(asked.url))
    page.goto(f"{served.running.url}/ui{place}")
    try:
        yield page
        assert not problems
    finally:
        context.close()


def test_a_user_is_picked_and_the_ranking_explained(browser, served):
    with opened(browser, served) as page:
        page.locator(".users a", has_text="anna").click()
        page.locator("h1", has_text="anna").wait_for()
        assert page.title() == "anna · VISTA"
        rows = page.locator(".ranking button")
        rows.nth(2).wait_for()
        shown = [(row.locator(".name").inner_text(), row.locator(".num").inner_text()) for row in rows.all()]
        at = re.search(r"as of (\S+ \S+) UTC", page.locator("main").inner_text())
        assert at
        rows.nth(1).click()
        why = page.locator(".why")
        why.locator("h2", has_text=shown[1][0]).wait_for()
        assert shown[1][1] in why.inner_text()
        assert re.fullmatch(rf".*#user=anna&item={shown[1][0]}", page.url)
        scores = [float(score) for _, score in shown]
        assert scores == sorted(scores, reverse=True)
        why.locator(".traces > li").first.wait_for()
        text = why.inner_text()
        for part in ("without the summary", "without recent events", "summary tokens", "of it traced"):
            assert part in text, part
        assert "older events are in the tokens as sums" in page.locator("main").inner_text()


def test_what_is_shown_is_what_the_endpoints_say(browser, served):
    with opened(browser, served, "#user=anna&item=7") as page:
        with page.expect_response("**/v1/explain") as answer:
            page.reload()
        (found,) = (one for one in answer.value.json()["candidates"] if str(one["item"]) == "7")
        why = page.locator(".why")
        why.locator("h2 .name", has_text=re.compile("^7$")).wait_for()
        weights = found["attention"]
        shares = [sum(weights["tokens"]), sum(weights["recent_events"]), weights["itself"]]
        shown = why.locator("section .legend b").all_inner_texts()
        assert shown == [f"{share * 100:.1f} %" for share in shares]
        rows = why.locator("tbody tr").all_inner_texts()
        for row, scores in zip(rows, found["scores_without"].values(), strict=True):
            assert f"{scores['click']:.3f}" in row
        assert f"{found['scores']['like']:.3f}" in why.locator("header").inner_text()


def test_a_deep_link_leads_to_an_item_below_the_best(browser, served):
    worst = served.post("/v1/rank", {"user": "anna", "candidates": list(range(40))}).json()["candidates"][-1]["item"]
    with opened(browser, served, f"#user=anna&item={worst}") as page:
        page.locator(".why h2 .name", has_text=str(worst)).wait_for()
        assert page.locator(".ranking [aria-pressed=true]").inner_text().find("asked for") > 0
        page.go_back() if page.evaluate("history.length") > 2 else page.goto(f"{served.running.url}/ui#user=7")
        page.locator("h1", has_text="7").wait_for()


def test_ids_that_are_markup_are_text(browser, served):
    with opened(browser, served) as page:
        page.get_by_label("User id").fill(MARKUP)
        page.keyboard.press("Enter")
        page.locator("h1", has_text="<img src=x").wait_for()
        page.locator("tbody td.when", has_text="2026-01-02 03:04").wait_for()
        assert page.locator("main img").count() == 0
        assert page.title().startswith("<img")


def test_a_user_who_is_not_there_is_a_cold_start(browser, served):
    with opened(browser, served, "#user=nobody") as page:
        page.locator(".notice", has_text="cold start").wait_for()
        page.locator(".ranking button").first.wait_for()


def test_older_events_come_when_asked_for(browser, served):
    served.running.service._histories = Logged(served.run)  # type: ignore[assignment]
    try:
        with opened(browser, served, "#user=anna") as page:
            rows = page.locator("tbody td.when")
            rows.nth(19).wait_for()
            assert rows.count() == 20
            page.get_by_role("button", name="Show older events").click()
            rows.nth(39).wait_for()
            page.get_by_role("button", name="Show older events").wait_for(state="detached")
            assert rows.count() == 40
            page.locator("main", has_text="every summarized event is known").wait_for()
    finally:
        served.running.service._histories = None


def test_the_keyboard_is_enough(browser, served):
    with opened(browser, served) as page:
        page.locator(".users a").first.wait_for()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.closest('.users') !== null"):
                break
        page.keyboard.press("Enter")
        page.locator(".ranking button").nth(1).focus()
        page.keyboard.press("Space")
        assert page.locator(".ranking button").nth(1).get_attribute("aria-pressed") == "true"


def test_nothing_is_wider_than_the_window(browser, served):
    with opened(browser, served, "#user=anna") as page:
        page.locator(".why .traces").wait_for()
        page.locator("tbody td.when").first.wait_for()
        for view in ("", "#operator"):
            if view:
                page.goto(f"{served.running.url}/ui{view}")
                page.locator(".charts svg").first.wait_for()
            for width in (360, 768, 1600):
                page.set_viewport_size({"width": width, "height": 800})
                assert page.evaluate("document.documentElement.scrollWidth") <= width


CONTRAST = """() => {
  const rgb = (color) => (color.match(/[\\d.]+/g) ?? []).map(Number);
  const linear = (v) => (v <= 10 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4);
  const light = (c) => { const [r, g, b] = c.map(linear); return .2126 * r + .7152 * g + .0722 * b; };
  const below = (node) => {
    for (; node; node = node.parentElement) {
      const c = rgb(getComputedStyle(node).backgroundColor);
      if (c.length === 3) return c;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("body *")].filter((node) => node.offsetParent && [...node.childNodes]
    .some((child) => child.nodeType === 3 && child.textContent.trim())).map((node) => {
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(below(node))].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), node.tagName + "." + node.className + " " + node.textContent.slice(0, 30)];
  }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_and_controls_have_names(browser, served, scheme):
    with opened(browser, served, "#user=anna", color_scheme=scheme) as page:
        page.locator(".why .traces").wait_for()
        assert page.evaluate(CONTRAST) == []
        nameless = page.evaluate(
            "() => [...document.querySelectorAll('main input, main select, main button')]"
            ".filter((c) => !(c.labels?.length || c.ariaLabel || c.textContent.trim())).length"
        )
        assert nameless == 0
        assert page.locator("svg[role=img]:not([aria-label])").count() == 0
        page.emulate_media(reduced_motion="reduce")
        page.goto(f"{served.running.url}/ui#operator")
        page.locator(".charts svg").first.wait_for()
        assert page.evaluate(CONTRAST) == []


def test_the_operator_sees_the_numbers_of_the_metrics(browser, served):
    with opened(browser, served, "#operator") as page:
        page.locator(".charts svg").first.wait_for()
        for _ in range(5):
            served.post("/v1/rank", {"user": "anna", "candidates": [1, 2]})
        page.locator(".panel", has_text="Freshness since the start").locator(
            "td.num", has_text=re.compile("[1-9]")
        ).first.wait_for()
        text = page.locator("main").inner_text()
        assert served.run.version in text
        assert "published" in text
        page.get_by_label("Endpoint").select_option("rank")
        page.locator(".panel", has_text="Latency").locator("b", has_text=re.compile(" m?s$")).first.wait_for()


def test_what_fails_is_said_and_can_be_tried_again(browser, served, monkeypatch):
    with opened(browser, served) as page:
        with monkeypatch.context() as patch:
            patch.setattr(type(served.store), "scan", broken)
            page.reload()
            page.get_by_role("alert").filter(has_text="the store does not answer").wait_for()
        page.get_by_role("button", name="Try again").click()
        page.locator(".users a").first.wait_for()


def test_a_token_is_asked_for_and_kept_in_the_tab(browser, tmp_path):
    with serving(tmp_path, token=b"secret") as served, opened(browser, served) as page:
        page.locator("dialog[open]").wait_for()
        page.get_by_label("Bearer token").fill("wrong")
        page.keyboard.press("Enter")
        page.locator("#token-problem", has_text="refused").wait_for()
        page.get_by_label("Bearer token").fill("secret")
        page.get_by_role("button", name="Go on").click()
        page.locator(".users a").first.wait_for()
        page.reload()
        page.locator(".users a").first.wait_for()
        assert page.locator("dialog[open]").count() == 0


def test_ids_of_64_bits_stay_exact(browser, served):
    with opened(browser, served) as page:
        read = "async (text) => JSON.stringify((await import('./ui/api.js')).parse(text))"
        text = '{"a": 9223372036854775807, "b": "x: 1234567890123456789,", "c": 0.12345678901234567, "d": [-3, 1e20]}'
        found = json.loads(page.evaluate(read, text))
        assert found == {
            "a": "9223372036854775807", "b": "x: 1234567890123456789,", "c": 0.12345678901234567, "d": [-3, 1e20],
        }  # fmt: skip


def test_quantiles_and_rates_of_the_charts(browser, served):
    """Of the text as Prometheus's library writes it: one and three observations in two buckets, and a restart."""
    texts = [
        'x_bucket{e="a",le="1.0"} 1.0\nx_bucket{e="a",le="3.0"} 1.0\nx_bucket{e="a",le="+Inf"} 1.0\nn_total 5.0\n',
        'x_bucket{e="a",le="1.0"} 2.0\nx_bucket{e="a",le="3.0"} 5.0\nx_bucket{e="a",le="+Inf"} 5.0\nn_total 2.0\n',
    ]
    script = """async (texts) => { const m = await import('./ui/metrics.js');
      const [a, b] = texts.map(m.parseMetrics);
      const seen = m.observed(a, b, "x", {e: "a"});
      return [seen.map((one) => one.number), m.quantile(seen, .25), m.quantile(seen, .625), m.quantile([], .5),
        m.growth(a, b, "n_total")]; }"""
    with opened(browser, served) as page:
        assert page.evaluate(script, texts) == [[1, 3, 0], 1, 2, None, 2]
