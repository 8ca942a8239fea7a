"""The page /verify, saved as a file and opened in a Chromium without network."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests import servers
from tests.verifiers import forged_books, forged_papers
from tests.verifiers.draws import ANCHOR, KINDS, proofs_of
from tests.verifiers.forging import NO_PROOF
from tests.verifiers.test_forgeries import made
from tombola.producers.gateway import verify_page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_PACKAGES = ("chromium",)
CHROMIUM_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
)
EXPECT_TIMEOUT_MS = 60_000
MANY = 1_000
DRAWS = 5

# The first test may have to install Chromium.
pytestmark = [pytest.mark.process, pytest.mark.timeout(servers.INSTALL_TIMEOUT_S + 180)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    binary = next(filter(None, map(shutil.which, CHROMIUM)), None) or servers._binary(CHROMIUM[0], CHROMIUM_PACKAGES)
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=binary, args=CHROMIUM_ARGUMENTS) as launched,
    ):
        yield launched


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """The saved page. Whatever it says to the console, or asks of the network, fails the test."""
    saved = tmp_path / "verify.html"
    saved.write_bytes(verify_page.page())
    context = browser.new_context(offline=True)
    context.set_default_timeout(EXPECT_TIMEOUT_MS)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda it: said.append(it.text))
    page.on("pageerror", lambda it: said.append(str(it)))
    page.on("request", lambda it: said.append(it.url) if it.url != saved.as_uri() else None)
    page.goto(saved.as_uri())
    yield page
    context.close()
    assert said == []


def choose(page: Page, folder: Path, texts: list[str]) -> None:
    """Choose these proofs, and wait until all are checked."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number}.json" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
    page.set_input_files("#proofs", files)
    expect(page.locator("#state")).to_have_text(re.compile("^Checked:"), timeout=EXPECT_TIMEOUT_MS * 5)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_each_kind_are_proven(page: Page, kind: str, tmp_path: Path) -> None:
    choose(page, tmp_path / "proofs", [it.encode().decode() for it in proofs_of(kind, DRAWS)])
    expect(page.locator("#state")).to_have_text(f"Checked: {DRAWS} proven.")
    expect(page.locator("article.proven")).to_have_count(DRAWS)
    expect(page.locator("li.claim:not(.proven)")).to_have_count(0)


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_draws_of_each_kind_are_proven(page: Page, kind: str, tmp_path: Path) -> None:
    choose(page, tmp_path / "proofs", [it.encode().decode() for it in proofs_of(kind, MANY)])
    expect(page.locator("#state")).to_have_text(f"Checked: {MANY} proven.")


def test_every_forgery_is_refused(page: Page, tmp_path: Path) -> None:
    """Those that the proof alone gives away: what a player kept is another test's."""
    forgeries = [it for it in (*forged_papers.forgeries, *forged_books.forgeries) if not made(it)[1]]
    choose(page, tmp_path / "proofs", [made(it)[0] for it in forgeries])
    count = sum(it.claim == NO_PROOF for it in forgeries)
    expect(page.locator("article.false")).to_have_count(len(forgeries))
    expect(page.locator("article:has-text('This file is no proof of a draw')")).to_have_count(count)


def test_a_player_reads_what_is_wrong(page: Page, tmp_path: Path) -> None:
    [fields] = [json.loads(it.encode()) for it in proofs_of("ten-pull", 1)]
    fields["result"] = fields["result"].replace('"prize_amount":"', '"prize_amount":"1')
    choose(page, tmp_path / "proofs", [json.dumps(fields)])
    expect(page.locator("article h2")).to_contain_text("✗ False")
    wrong = page.locator("li.claim.false")
    expect(wrong.first).to_contain_text("The result is not what the ledger says.")
    expect(page.locator("li.claim.proven")).not_to_have_count(0)


def test_what_is_known_from_elsewhere_is_compared(page: Page, tmp_path: Path) -> None:
    [proof] = proofs_of("ten-pull", 1)
    page.locator("summary").click()
    page.get_by_label("The published anchor").fill(ANCHOR.hex())
    page.get_by_label("Receipts that you kept").fill(f"{proof.receipts.accepted}\n{proof.receipts.settled}\n")
    choose(page, tmp_path / "proofs", [proof.encode().decode()])
    expect(page.locator("article")).to_contain_text("What you kept says the same as this proof.")
    page.get_by_label("The published anchor").fill("ab" * 32)
    page.get_by_label("The published anchor").blur()
    expect(page.locator("li.claim.false")).to_contain_text("another anchor than the one you gave")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Page, scheme: str, tmp_path: Path) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    [good] = proofs_of("ten-pull", 1)
    fields = json.loads(good.encode())
    bad = json.dumps(fields | {"result": "x"})
    still_open = json.dumps(fields | {"books": None})
    choose(page, tmp_path / "proofs", [good.encode().decode(), bad, still_open, "{}"])
    page.locator("summary").click()
    # The page's own policy keeps axe out as a script element; the browser's protocol lets it in.
    results = Axe().run(page)
    assert results.response["passes"], "axe looked at nothing"
    assert results.violations_count == 0, results.generate_report()


def test_the_page_can_be_worked_by_keyboard(page: Page) -> None:
    seen = []
    for _ in range(3):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert seen[:2] == ["proofs", "SUMMARY"], seen


def test_the_policy_names_no_network_and_fits_the_page() -> None:
    text = verify_page.page().decode()
    assert f'content="{verify_page.policy()}"' in text
    assert "default-src 'none'" in verify_page.policy()
    assert "unsafe" not in verify_page.policy()
    assert "{{" not in text
    assert text.count("</script") == 1  # no part of a script ends it
