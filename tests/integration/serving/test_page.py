"""The web page in a real Chromium, on a desk and on a phone, against a real server."""

import base64
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from tests.integration.serving_servers import RunningServer, running_server, write_config
from tests.unit.serving.conftest import KEY

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine"),
]

SIZES = {"desk": {"width": 1200, "height": 900}, "phone": {"width": 390, "height": 844}}
TEXTS = ["zlib is a compression library 🙂 for <b>everyone</b>.", "A game with cards & dice."]
WAIT_MS = 120_000
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("page")
    engine = {"backend": "native", "device": "cpu", "cache_gib": 0.2}
    with running_server(write_config(folder, engine=engine)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=SIZES)
def page(request: Any, browser: Browser, server: RunningServer) -> Iterator[Page]:
    """The page as it opens with the key in the browser's own prompt; nothing may go elsewhere."""
    context = browser.new_context(
        viewport=SIZES[request.param],
        has_touch=request.param == "phone",
        http_credentials={"username": "me", "password": KEY},
    )
    opened = context.new_page()
    opened.set_default_timeout(WAIT_MS)
    problems: list[str] = []
    opened.on("console", lambda message: note(message.text, problems))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on(
        "request",
        lambda asked: problems.append(asked.url) if not is_own(asked.url, server) else None,
    )
    opened.goto(server.url)
    yield opened
    width = opened.evaluate("document.documentElement.scrollWidth")
    assert width <= SIZES[request.param]["width"], "it must not scroll sideways"
    if folder := os.environ.get("SCREENSHOTS"):
        name = f"{request.node.originalname}-{request.param}.png"
        opened.screenshot(path=str(Path(folder) / name), full_page=True)
    assert problems == []
    context.close()


def note(text: str, problems: list[str]) -> None:
    """Keep what the browser complains of, but for a refusal that the page shows."""
    if not text.startswith("Failed to load resource"):
        problems.append(text)


def is_own(url: str, server: RunningServer) -> bool:
    return url.startswith((server.url, "data:", "blob:"))


def ask(page: Page, kind: str, texts: list[str] = TEXTS) -> None:
    page.get_by_label("Task").select_option(label=kind)
    page.get_by_label("Documents").fill("\n---\n".join(texts))
    if kind == "classify":
        page.get_by_label("Labels").fill("games\nlibs\nscience")
    if kind == "extract":
        page.get_by_label("Fields").fill("name\npurpose")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text(f"{len(texts)} documents in")


def test_a_class_is_shown_with_the_probability_of_every_label(page: Page) -> None:
    ask(page, "classify")
    cards = page.locator("article")
    expect(cards).to_have_count(2)
    shown = [
        text.strip() for text in cards.first.locator(".score span:first-child").all_inner_texts()
    ]
    assert sorted(shown) == ["games", "libs", "science"]
    shares = cards.first.locator(".score span:last-child").all_inner_texts()
    assert sum(float(share.removesuffix(" %")) for share in shares) == pytest.approx(100, abs=0.2)
    expect(cards.first.locator(".score.best")).to_have_count(1)
    expect(cards.first.locator(".source")).to_have_text(TEXTS[0])


def test_evidence_is_marked_where_it_stands_in_the_text(page: Page) -> None:
    ask(page, "extract")
    cards = page.locator("article")
    for card, text in zip(cards.all(), TEXTS, strict=True):
        values = dict(zip(*[iter(card.locator("td").all_inner_texts())] * 2, strict=True))
        marked = {
            mark.get_attribute("title"): mark.inner_text() for mark in card.locator("mark").all()
        }
        assert card.locator(".source").inner_text() == text, "markup in a document is text"
        for path, words in marked.items():
            assert values[path.removeprefix("/")].strip() == words.strip()
            assert words in text


def test_rows_are_downloaded_as_json_and_as_parquet(page: Page) -> None:
    ask(page, "summarize")
    with page.expect_download() as told:
        page.get_by_role("button", name="JSON").click()
    rows = json.loads(Path(told.value.path()).read_text())
    with page.expect_download() as told:
        page.get_by_role("button", name="Parquet").click()
    table = pq.read_table(io.BytesIO(Path(told.value.path()).read_bytes()))
    assert [row["summary"] for row in rows] == table["summary"].to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok"]


def test_dropped_files_are_taken_and_a_mistake_is_said(page: Page) -> None:
    files = [
        {"name": "a.txt", "mimeType": "text/plain", "buffer": b"first"},
        {"name": "b.jsonl", "mimeType": "text/plain", "buffer": b'{"text": "second"}\n'},
    ]
    page.locator("#files").set_input_files(files)
    expect(page.get_by_label("Documents")).to_have_value("first\n---\nsecond")
    page.get_by_label("Task").select_option(label="classify")
    page.get_by_label("Labels").fill("only one")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("needs at least 2")


def test_the_page_is_not_shown_without_the_key(browser: Browser, server: RunningServer) -> None:
    wrong = base64.b64encode(b"me:wrong").decode()
    for headers in ({}, {"Authorization": f"Basic {wrong}"}):
        context = browser.new_context(extra_http_headers=headers)
        with pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"):
            context.new_page().goto(server.url)
        context.close()
