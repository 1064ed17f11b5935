"""The chat page in a browser: replies, Markdown, formulas, settings, small screens, accessibility,
and no injected code. test_page_chats.py has what the page does with chats.
"""

import itertools
import threading

import pytest
from browser import AXE, DONE, MARKS, REPLY, SPECIAL, last_words, launched, opened, say
from fake_engine import byte_tokenizer
from serving import wait_until

pytestmark = MARKS

TOKENIZER = byte_tokenizer()


def chatter(request, sample):
    """An endless reply."""
    return itertools.cycle(b"blah ")


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


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
        page.locator(DONE).nth(1).wait_for(state="attached")
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


def test_tasks_and_headings(browser):
    text = "## Two\n\n#### Four\n\n- [x] done *it*\n- [ ] to do\n- [link](https://example.org)\n\n## Two"
    with opened(browser) as (page, _):
        say(page, text)
        bubble = page.locator(REPLY)
        assert bubble.locator("li.task").all_inner_texts() == [" done it", " to do"]
        boxes = bubble.get_by_role("checkbox")
        assert [box.is_checked() for box in boxes.all()] == [True, False]
        assert all(box.is_disabled() for box in boxes.all())
        tags = "nodes => nodes.map(node => node.localName)"
        assert bubble.locator(":is(h3, h4, h5, h6)").evaluate_all(tags) == ["h3", "h4", "h3"]


FORMULAS = {
    r"x^2": "<msup><mi>x</mi><mn>2</mn></msup>",
    r"a_{ij}'": "<msubsup><mi>a</mi><mrow><mi>i</mi><mi>j</mi></mrow><mo>′</mo></msubsup>",
    r"\frac12": "<mfrac><mn>1</mn><mn>2</mn></mfrac>",
    r"\sqrt[3]{x}": "<mroot><mi>x</mi><mn>3</mn></mroot>",
    r"\alpha \leq 1.5": "<mrow><mi>α</mi><mo>≤</mo><mn>1.5</mn></mrow>",
    r"\mathbb{R}\mathbf{v}": "<mrow><mi>ℝ</mi><mi>𝐯</mi></mrow>",
    r"\text{if } x": "<mrow><mtext>if&nbsp;</mtext><mi>x</mi></mrow>",
    r"\sum_{i}^n": '<munderover><mo movablelimits="true">∑</mo><mi>i</mi><mi>n</mi></munderover>',
    r"\left.\frac{a}{b}\right]": '<mrow><mo stretchy="true" form="prefix"></mo><mfrac><mi>a</mi>'
    '<mi>b</mi></mfrac><mo stretchy="true" form="postfix">]</mo></mrow>',
    r"\begin{bmatrix}1&2\\3&4\end{bmatrix}": '<mrow><mo stretchy="true" form="prefix">[</mo><mtable'
    ' class=""><mtr><mtd class="math-center"><mn>1</mn></mtd><mtd class="math-center"><mn>2</mn></mtd>'
    '</mtr><mtr><mtd class="math-center"><mn>3</mn></mtd><mtd class="math-center"><mn>4</mn></mtd></mtr>'
    '</mtable><mo stretchy="true" form="postfix">]</mo></mrow>',
    r"\text{<b>}": "<mtext>&lt;b&gt;</mtext>",
    "": "<mrow></mrow>",
}
UNKNOWN_FORMULAS = [
    r"\href{javascript:window.hacked=1}{x}",
    r"\frac{1}",
    r"{x",
    r"x}",
    r"\left( x",
    r"\begin{pmatrix} x",
    r"\begin{tikzpicture}x\end{tikzpicture}",
    r"\__proto__ x",
    r"\constructor",
    r"\hat" * 5000,
    "{" * 3000 + "}" * 3000,
    "x" * 10_000,
]


def test_formulas_become_mathml(browser):
    with opened(browser) as (page, _):
        convert = """async (source) => {
          const { renderMath } = await import("/static/math.js");
          const node = renderMath(source, false);
          return node && [node.namespaceURI, node.innerHTML];
        }"""
        namespace = "http://www.w3.org/1998/Math/MathML"
        for source, expected in FORMULAS.items():
            assert page.evaluate(convert, source) == [namespace, expected], source
        for source in UNKNOWN_FORMULAS:
            assert page.evaluate(convert, source) is None, source[:80]


def test_formulas_in_text(browser):
    text = r"""Inline \(a*b*c\) and $x_1$, not $5 or $10, not $HOME/$USER, `$code$`, \*plain\*.

\[
\begin{aligned} a &= b \\ &= c \end{aligned}
\]

Then:
$$y$$
- in a list: \[z\]

Unknown \(\foo{x}\) stays; so does what has not ended: \(a + b, \[c"""
    with opened(browser, step_tokens=32) as (page, _):
        say(page, text)
        bubble = page.locator(REPLY)
        sources = "nodes => nodes.map(node => [node.getAttribute('alttext'), node.getAttribute('display')])"
        aligned = "\\begin{aligned} a &= b \\\\ &= c \\end{aligned}"
        assert bubble.locator("math").evaluate_all(sources) == [
            ["a*b*c", "inline"],
            ["x_1", "inline"],
            [aligned, "block"],
            ["y", "block"],
            ["z", "block"],
        ]
        assert bubble.locator("code").all_text_contents() == ["$code$", r"\(\foo{x}\)"]
        first, last = bubble.locator("p").first, bubble.locator("p").last
        assert "not $5 or $10, not $HOME/$USER, $code$, *plain*." in first.inner_text()
        assert last.inner_text().endswith(r"what has not ended: \(a + b, \[c")


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
    r"$\text{<img src=x onerror=window.hacked=1>}$",
    r"$$\begin{matrix}<script>window.hacked=1</script>\end{matrix}$$",
    r"\(\href{javascript:window.hacked=1}{x}\) \(<img src=x onerror=window.hacked=1>\)",
    "- [x] <img src=x onerror=window.hacked=1>",
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
            page.locator(DONE).wait_for(state="attached")
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
        page.locator(".failure").get_by_text("240").wait_for()  # the context


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


def test_a_table_on_a_phone_scrolls(browser):
    words = ("internationalization", "characteristically", "straightforwardness", "wavelength")
    text = f"| {' | '.join(words)} |\n|-|-|-|-|\n| {' | '.join(words)} |"
    with opened(browser, size=(360, 700), step_tokens=32) as (page, _):
        say(page, text)
        lines = """cells => cells.map((cell) => {
          const range = document.createRange();
          range.selectNodeContents(cell);
          return range.getClientRects().length;
        })"""
        assert page.locator(f"{REPLY} :is(th, td)").evaluate_all(lines) == [1] * 8
        table = page.locator(f"{REPLY} .table")
        assert table.evaluate("node => node.scrollWidth > node.clientWidth")
        assert page.evaluate("document.querySelector('#scroller').scrollWidth") <= 360
        page.locator(f"{REPLY} .table").focus()  # and by keyboard
        page.keyboard.press("ArrowRight")
        wait_until(lambda: table.evaluate("node => node.scrollLeft") > 0)


ENDINGS = [
    "Only a paragraph",
    "Some text\n\n- and\n- a list",
    "```python\nx = 1\n```",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "Math: $$x^2$$",
]


@pytest.mark.parametrize("size", [(1100, 500), (360, 500)], ids=["desktop", "phone"])
def test_nothing_moves_when_streaming_ends(browser, size):
    layout = """() => [document.querySelector("#scroller").scrollTop,
      ...[...document.querySelectorAll(".message, .bubble, .bubble *, #composer")].map((node) =>
        JSON.stringify(node.getBoundingClientRect()))]"""
    is_shown = """(text) => {
      const body = document.createElement("div");
      body.append(window.bodyOf([{ type: "text", text }]));
      return document.querySelector(".assistant .bubble")?.innerHTML === body.innerHTML;
    }"""
    texts, gates = [], [threading.Event() for _ in ENDINGS]
    for ending in ENDINGS:
        text = f"{'A line that fills the page. ' * 40}\n\n{ending}"
        texts.append("!" * (-len(text) % 4) + text)  # whole steps, so that all of it is shown

    def reply(request, sample):
        index = int(bytes(last_words(request, sample)))
        yield from texts[index].encode()
        gates[index].wait(60)

    frames = "new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))"
    with opened(browser, reply, "max_new_tokens=4000", size=size) as (page, _):
        page.evaluate(
            "import('/static/messages.js').then((module) => { window.bodyOf = module.bodyOf; })"
        )
        for index, (text, gate) in enumerate(zip(texts, gates, strict=True)):
            page.keyboard.press("Control+Shift+o")
            try:
                page.fill("#input", str(index))
                page.press("#input", "Enter")
                page.wait_for_function(is_shown, arg=text)
                before = page.evaluate(layout)
            finally:
                gate.set()
            page.locator(DONE).wait_for(state="attached")
            page.evaluate(frames)
            assert page.evaluate(layout) == before, text[-30:]


def test_the_whole_page_by_keyboard(browser):
    with opened(browser) as (page, _):
        page.keyboard.type("typed at once")
        page.keyboard.press("Enter")
        page.locator(DONE).wait_for(state="attached")
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


EVERYTHING = r"""### Heading

Text with `code`, *emphasis*, a [link](https://example.org) and \(x^2\).

$$\frac{1}{2}$$

- [x] done
- item

| a | b |
|---|---|
| 1 | 2 |

> quoted

##### Lower

```python
x = "text"  # a comment
```"""

VIOLATIONS = """async () => {
  const { violations, passes } = await axe.run();
  return [passes.length, violations.map((rule) => [rule.id, ...rule.nodes.map((node) => node.html)])];
}"""


def check_accessibility(page, state):
    passes, violations = page.evaluate(VIOLATIONS)
    assert violations == [], state
    assert passes > 15, state


@pytest.mark.skipif(
    not AXE.is_file(),
    reason="no axe-core here: npm install axe-core, and AXE_CORE=<folder>/node_modules/axe-core/axe.min.js",
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1100, 800), (360, 700)], ids=["desktop", "phone"])
def test_accessibility(browser, scheme, size):
    def reply(request, sample):
        said = bytes(last_words(request, sample))
        return itertools.cycle(b"blah ") if said == b"endless" else said

    settings = {"size": size, "scheme": scheme, "max_length": 1 << 20}
    with opened(browser, reply, "max_new_tokens=1000000", **settings) as (page, server):
        page.evaluate(AXE.read_text("utf-8"))
        check_accessibility(page, "empty")
        say(page, EVERYTHING)
        page.get_by_role("button", name="Regenerate").click()
        page.locator(".branches").wait_for()
        page.locator(DONE).wait_for(state="attached")
        check_accessibility(page, "reply")
        page.click("#chat-options")
        check_accessibility(page, "menu of the chat")
        page.locator("#chat-menu").get_by_text("Rename").click()
        check_accessibility(page, "renaming")
        page.keyboard.press("Escape")
        page.click("#model")
        check_accessibility(page, "model")
        page.keyboard.press("Escape")
        if size[0] < 760:
            page.click("#open-sidebar")
            page.locator("#search").wait_for()
        page.fill("#search", "quoted")
        check_accessibility(page, "search")
        page.click("#open-settings")
        check_accessibility(page, "settings")
        page.keyboard.press("Escape")
        page.set_input_files(
            "#files", [{"name": "a.txt", "mimeType": "text/plain", "buffer": b"text"}]
        )
        page.locator("#attachments").get_by_text("4 tokens").wait_for()
        check_accessibility(page, "attached file")
        say(page, "with a file", 2)
        page.get_by_role("button", name="Edit and continue from here").last.click()
        check_accessibility(page, "editing")
        page.keyboard.press("Escape")
        server.engine.step_seconds = 0.05
        page.fill("#input", "endless")
        page.press("#input", "Enter")
        page.locator(".streaming .bubble").get_by_text("blah").wait_for()
        check_accessibility(page, "streaming")
        server.engine.fails = True
        page.locator(".failure").wait_for()
        check_accessibility(page, "failure")
