"""A browser with the chat page of a test server."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_engine import FakeEngine, byte_tokenizer
from serving import Server

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the package playwright drives the browser"
)

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
MARKS = [
    pytest.mark.long,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"
    ),
]
AXE = Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js"))

SPECIAL = byte_tokenizer().special
REPLY = ".message.assistant .bubble"
DONE = ".message.assistant:not(.streaming)"


def last_words(request, sample):
    """The user's last message."""
    ids = list(request.prompt)
    start = len(ids) - ids[::-1].index(SPECIAL.user_start)
    return ids[start:-2]


@contextmanager
def launched():
    """A browser. One per module: Playwright's event loop would disturb tests of asyncio."""
    with playwright.sync_playwright() as driver:
        # Chromium's own sandbox does not run as root, which CI is.
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@contextmanager
def opened(
    browser, reply=last_words, *overrides, size=(1100, 800), scheme="light", key=None, **engine
):
    """(page, server) in a new browser profile; the page may only load from the server."""
    settings = {"max_length": 4096, **engine}
    with Server(FakeEngine(reply, **settings), "chat_turns=true", *overrides, key=key) as server:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme=scheme,
            reduced_motion="reduce",  # nothing is half visible
        )
        page = context.new_page()
        page.set_default_timeout(60_000)
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "dialog", lambda dialog: (faults.append(f"dialog {dialog.message}"), dialog.dismiss())
        )
        page.on(
            "request",
            lambda request: (
                request.url.startswith(
                    (f"http://127.0.0.1:{server.port}/", f"blob:http://127.0.0.1:{server.port}/")
                )
                or faults.append(request.url)
            ),
        )
        page.goto(f"http://127.0.0.1:{server.port}/")
        yield page, server
        assert faults == []
        context.close()


def say(page, text, replies=1):
    """Send a message and wait until the page has `replies` complete replies."""
    page.fill("#input", text)
    page.press("#input", "Enter")
    page.locator(DONE).nth(replies - 1).wait_for(state="attached")


def menu(page, entry):
    """Choose from the menu of the open chat."""
    page.click("#chat-options")
    page.locator("#chat-menu").get_by_text(entry).click()
