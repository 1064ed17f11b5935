"""The chat page in a browser: conversations, settings, small screens, and no injected code."""

import itertools
import shutil
from contextlib import contextmanager

import pytest
from fake_engine import FakeEngine, byte_tokenizer
from serving import Server, wait_until

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the package playwright drives the browser"
)

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"
    ),
]

TOKENIZER = byte_tokenizer()
SPECIAL = TOKENIZER.special
REPLY = ".message.assistant .bubble"


def last_words(request, sample):
    """The user's last message."""
    ids = list(request.prompt)
    start = len(ids) - ids[::-1].index(SPECIAL.user_start)
    return ids[start:-2]


def chatter(request, sample):
    """An endless reply."""
    return itertools.cycle(b"blah ")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # Chromium's own sandbox does not run as root, which CI is.
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@contextmanager
def opened(browser, reply=last_words, *overrides, size=(1100, 800), key=None, **engine):
    """(page, server) in a new browser profile; the page may only load from the server."""
    settings = {"max_length": 4096, **engine}
    with Server(FakeEngine(reply, **settings), "chat_turns=true", *overrides, key=key) as server:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]})
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
                request.url.startswith(f"http://127.0.0.1:{server.port}/")
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
    page.locator(".message.assistant .actions").nth(replies - 1).wait_for(state="attached")


def test_talking(browser):
    with opened(browser) as (page, server):
        assert page.locator("#model").text_content() == "tiny"
        say(page, "hello **you** 😀")
        assert page.locator(REPLY).text_content() == "hello you 😀"
        assert page.locator(f"{REPLY} strong").text_content() == "you"
        assert page.locator(".message.user .bubble").text_content() == "hello **you** 😀"
        assert page.title() == "hello **you** 😀 · MaxNano"
        page.fill("#input", "two")
        page.press("#input", "Shift+Enter")
        page.type("#input", "lines")
        page.click("#send")
        page.locator(".message.assistant .actions").nth(1).wait_for(state="attached")
        assert page.locator(REPLY).nth(1).inner_text().split("\n") == ["two", "lines"]
        assert "tokens" in page.locator(".stats").nth(1).text_content()
        prompt = TOKENIZER.decode(server.engine.requests[-1].prompt)
        assert "<|assistant_start|>hello **you** 😀<|assistant_end|><|user_start|>two" in prompt


def test_stop_keeps_what_came_and_frees_the_slot(browser):
    with opened(browser, chatter, max_length=1 << 30, step_seconds=0.01) as (page, server):
        for stop in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
            page.fill("#input", "go on for ever")
            page.press("#input", "Enter")
            page.locator(".streaming .bubble").get_by_text("blah blah").wait_for()
            assert server.engine.running == 1
            stop()
            page.locator(".stats").get_by_text("stopped").last.wait_for()
            wait_until(lambda: server.engine.running == 0)
        assert page.locator(REPLY).count() == 2


def test_regenerate_and_edit(browser):
    with opened(browser) as (page, server):
        say(page, "one")
        say(page, "two", 2)
        page.locator(".message.assistant").last.hover()
        page.get_by_role("button", name="Regenerate").last.click()
        wait_until(lambda: len(server.engine.requests) == 3)
        assert server.engine.requests[1].prompt == server.engine.requests[2].prompt
        page.locator(".message.assistant .actions").nth(1).wait_for(state="attached")
        page.locator(".message.user").first.hover()
        page.get_by_role("button", name="Edit and continue from here").first.click()
        page.locator(".edit textarea").fill("changed")
        page.locator(".edit").get_by_text("Send").click()
        page.locator(REPLY).get_by_text("changed").wait_for()
        assert (
            page.locator(".message").count() == 2
            and page.locator("#title").text_content() == "changed"
        )
        assert "one" not in TOKENIZER.decode(server.engine.requests[-1].prompt)
        page.locator(".message.assistant .actions").wait_for(state="attached")
        page.press("#input", "ArrowUp")
        assert page.locator(".edit textarea").input_value() == "changed"
        page.keyboard.press("Escape")
        assert page.locator(".edit").count() == 0


def test_conversations_are_kept(browser):
    with opened(browser) as (page, _):
        say(page, "first chat")
        page.keyboard.press("Control+Shift+o")
        assert page.locator("#welcome").is_visible()
        say(page, "second chat")
        page.reload()
        assert page.locator(".message").count() == 2
        titles = page.locator("#conversations .open").all_text_contents()
        assert titles == ["second chat", "first chat"]
        page.keyboard.press("Alt+ArrowDown")
        assert page.locator(REPLY).text_content() == "first chat"
        page.get_by_role("button", name="Delete “first chat”").click()
        assert page.locator("#conversations li").count() == 1
        page.get_by_role("button", name="Undo").click()
        assert (
            page.locator("#conversations li").count() == 2
            and page.locator(REPLY).text_content() == "first chat"
        )
        page.evaluate("localStorage.setItem('maxnano.chat.x', '{broken')")
        page.evaluate("localStorage.setItem('maxnano.settings', '7')")
        page.reload()
        assert page.locator("#conversations li").count() == 2


def test_settings_reach_the_server(browser):
    with opened(browser) as (page, server):
        say(page, "a")
        page.click("#open-settings")
        page.locator("#temperature").fill("1.25")
        page.locator("#top_k").fill("7")
        page.locator("#max_tokens").fill("33")
        page.locator("#system").fill("Be brief.")
        page.get_by_label("Dark").check()
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_label("Light").check()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        page.get_by_role("button", name="Done").click()
        page.reload()
        say(page, "b", 2)
        first, second = server.engine.requests
        assert (first.temperature, first.top_k, first.max_tokens) == (0.6, 50, 512)
        assert (second.temperature, second.top_k, second.max_tokens) == (1.25, 7, 33)
        assert "<|user_start|>Be brief.\n\na<|user_end|>" in TOKENIZER.decode(second.prompt)
        page.click("#open-settings")
        page.click("#reset")
        page.keyboard.press("Escape")
        say(page, "c", 3)
        assert server.engine.requests[-1].temperature == 0.6


def test_calls_of_the_tool_are_shown(browser):
    reply = [
        *b"It is ",
        SPECIAL.python_start,
        *b"6*7",
        SPECIAL.python_end,
        SPECIAL.output_start,
        *b"42",
        SPECIAL.output_end,
        *b", **so**.",
    ]
    with opened(browser, lambda request, sample: reply) as (page, server):
        say(page, "?")
        assert page.locator(f"{REPLY} p").count() == 1
        assert page.locator(".tool .call").text_content() == "6*7"
        assert page.locator(".tool .result").text_content() == "42"
        assert page.locator(f"{REPLY} strong").text_content() == "so"
        say(page, "again?", 2)  # and the model sees them as it wrote them
        prompt = list(server.engine.requests[-1].prompt)
        assert any(prompt[i : i + len(reply)] == reply for i in range(len(prompt)))


def test_markdown(browser):
    text = """# Title

Some *soft*, **strong**, ~~old~~ and `code <b>` with a [link](https://example.org/a_b) & https://example.org/x_y.
snake_case_name stays, 2 * 3 * 4 too.

- one
  1. inner
  2. more
- two

> quoted
> > deeper

| a | b |
|---|--:|
| 1 | 2 |

```python
print("<script>")  # hi
```
---
~~~
unclosed *fence*"""
    with opened(browser) as (page, _):
        say(page, text)
        bubble = page.locator(REPLY)

        def texts(selector):
            return bubble.locator(selector).all_text_contents()

        assert texts("h3") == ["Title"] and texts("em") == ["soft"] and texts("del") == ["old"]
        assert texts("p code") == ["code <b>"] and texts("ul > li > ol > li") == ["inner", "more"]
        assert texts("a") == ["link", "https://example.org/x_y"]
        assert bubble.locator("a").first.get_attribute("rel") == "noopener noreferrer nofollow"
        assert "snake_case_name stays, 2 * 3 * 4 too." in bubble.inner_text()
        assert texts("blockquote blockquote") == ["deeper"] and texts("td.end") == ["2"]
        assert texts("pre") == ['print("<script>")  # hi', "unclosed *fence*"]
        assert texts(".t-string") == ['"<script>"'] and texts(".t-comment") == ["# hi"]
        assert bubble.locator("hr").count() == 1


XSS = [
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "<svg onload=window.hacked=1></svg>",
    "<svg><script>window.hacked=1</script></svg>",
    "<iframe src=javascript:parent.hacked=1></iframe>",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "<a href=javascript:window.hacked=1>x</a>",
    "[x](javascript:window.hacked=1)",
    "[x](JaVaScRiPt:window.hacked=1)",
    "[x](java\tscript:window.hacked=1)",
    "[x](data:text/html,<script>parent.hacked=1</script>)",
    "[x](vbscript:window.hacked=1)",
    "![x](javascript:window.hacked=1)",
    "![x](https://evil.example/pixel.png)",
    '<https://evil.example/"onmouseover=window.hacked=1>',
    '[x](https://evil.example/"onmouseover="window.hacked=1)',
    "```html\n<script>window.hacked=1</script>\n```",
    '```"><img src=x onerror=window.hacked=1>\nx\n```',
    "`<img src=x onerror=window.hacked=1>`",
    "| <img src=x onerror=window.hacked=1> |\n|---|\n| <script>window.hacked=1</script> |",
    "<style>@import 'https://evil.example/x.css'</style><link rel=stylesheet href=https://evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'><base href=https://evil.example>",
    "<form action=https://evil.example><button id=send autofocus onfocus=window.hacked=1>",
    "\ue000\ue001 {{constructor.constructor('window.hacked=1')()}} ${window.hacked=1}",
]


FOUND = """() => [
  window.hacked ?? null,
  location.href,
  document.querySelectorAll('#thread :is(script,img,iframe,style,link,meta,base,form,object,embed)').length,
  [...document.querySelectorAll('body *')].filter((node) =>
    [...node.attributes].some((attribute) => /^on/i.test(attribute.name))).length,
]"""


def test_no_text_becomes_code(browser):
    """In the user's message, the chat's title, the reply, a tool call, and after a reload."""
    assert len(XSS) >= 20

    def reply(request, sample):
        said = last_words(request, sample)
        return [*said, *b"\n\n", SPECIAL.python_start, *said, SPECIAL.python_end, *said]

    with opened(browser, reply, step_tokens=64, max_length=1 << 16) as (page, _):
        for index, text in enumerate(XSS):
            page.keyboard.press("Control+Shift+o")
            page.fill("#input", text)
            page.click("#send")
            page.locator(".message.assistant .actions").wait_for(state="attached")
            for node in page.locator("#thread a").all():
                assert node.get_attribute("href").startswith("https://"), text
            page.locator(REPLY).hover()
            if index % 6 == 5:
                page.reload()
            assert page.evaluate(FOUND) == [None, page.url, 0, 0], text
        assert page.locator("#conversations li").count() == len(XSS)
        html = "document.querySelector('#title').innerHTML = '<b>x</b>'"
        assert (
            page.evaluate(f"() => {{ try {{ {html} }} catch (error) {{ return error.name }} }}")
            == "TypeError"
        )


def test_a_full_context_leaves_out_turns(browser):
    with opened(
        browser, lambda request, sample: b"b" * 30, "max_new_tokens=64", max_length=240
    ) as (page, server):
        for turn in range(4):
            say(page, f"{turn} " + "a" * 30, turn + 1)
        assert "first 2 messages were dropped" in page.locator(".note").text_content()
        prompt = TOKENIZER.decode(server.engine.requests[-1].prompt)
        assert "1 aaa" in prompt and "0 aaa" not in prompt
        page.fill("#input", "x" * 500)
        page.press("#input", "Enter")
        page.locator(".failure").get_by_text("do not fit").wait_for()


def test_errors_can_be_tried_again(browser):
    with opened(browser) as (page, server):
        server.engine.fails = True
        page.fill("#input", "hi")
        page.press("#input", "Enter")
        page.locator(".failure").get_by_text("the engine failed").wait_for()
        page.locator(".failure").get_by_text("Try again").click()
        page.locator(REPLY).get_by_text("hi").wait_for()
        assert page.locator(".failure").count() == 0


def test_a_key_is_asked_for(browser):
    with opened(browser, key="a-key-of-sixteen-or-more") as (page, _):
        page.locator("#notice").get_by_text("API key").wait_for()
        page.click("#open-settings")
        page.fill("#key", "a-key-of-sixteen-or-more")
        page.get_by_role("button", name="Done").click()
        page.locator("#model").get_by_text("tiny").wait_for()
        say(page, "hi")
        assert page.locator(REPLY).text_content() == "hi"


def test_a_phone(browser):
    text = (
        "`"
        + "x" * 200
        + "`\n\n```\n"
        + "y" * 300
        + "\n```\n|a|b|c|d|\n|-|-|-|-|\n|"
        + "z" * 99
        + "|2|3|4|"
    )
    with opened(browser, size=(360, 700)) as (page, _):
        say(page, text)
        assert page.evaluate("document.scrollingElement.scrollWidth") == 360
        assert page.evaluate("document.querySelector('#scroller').scrollWidth") <= 360
        assert not page.locator("#sidebar").is_visible()
        page.click("#open-sidebar")
        page.locator("#conversations .open").wait_for(state="visible")
        page.keyboard.press("Escape")
        page.locator("#sidebar").wait_for(state="hidden")
        assert page.locator("#send").bounding_box()["width"] >= 40


def test_the_whole_page_by_keyboard(browser):
    with opened(browser) as (page, _):
        page.keyboard.type("typed at once")
        page.keyboard.press("Enter")
        page.locator(".message.assistant .actions").wait_for(state="attached")
        reached = set()
        for _ in range(20):
            page.keyboard.press("Tab")
            reached.add(
                page.evaluate(
                    "document.activeElement.ariaLabel || document.activeElement.textContent.trim()"
                )
            )
        assert {
            "New chat",
            "typed at once",
            "Settings",
            "Edit and continue from here",
            "Regenerate",
            "Message",
        } <= reached
        page.locator("#open-settings").focus()
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "input"
