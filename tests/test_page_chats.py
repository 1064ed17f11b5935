"""What the chat page does with chats: branches, several at once, search, files, a busy server."""

import itertools
import json
import re
import threading

import pytest
from browser import DONE, MARKS, REPLY, last_words, launched, menu, opened, say
from fake_engine import byte_tokenizer
from serving import wait_until

pytestmark = MARKS

TOKENIZER = byte_tokenizer()
COUNT = ".branches span"


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


def numbered():
    """Replies "reply 1", "reply 2", ..."""
    numbers = itertools.count(1)
    return lambda request, sample: f"reply {next(numbers)}".encode()


def last_prompt(server):
    return TOKENIZER.decode(server.engine.requests[-1].prompt)


# ---- Branches -----------------------------------------------------------------------------------


def test_answers_to_one_message_are_branches(browser):
    with opened(browser, numbered()) as (page, server):
        say(page, "one")
        say(page, "two", 2)
        page.get_by_role("button", name="Regenerate").first.click()
        page.locator(REPLY).get_by_text("reply 3").wait_for()
        assert page.locator(REPLY).all_text_contents() == ["reply 3"]
        assert server.engine.requests[2].prompt == server.engine.requests[0].prompt
        say(page, "three", 2)
        assert "reply 3" in last_prompt(server) and "two" not in last_prompt(server)
        page.get_by_role("button", name="Previous answer").click()
        # The first answer comes with what followed it.
        assert page.locator(REPLY).all_text_contents() == ["reply 1", "reply 2"]
        assert page.locator(COUNT).all_text_contents() == ["1 / 2"]
        page.keyboard.press("Enter")  # the arrow keeps the focus; before the first is the last
        assert page.locator(REPLY).all_text_contents() == ["reply 3", "reply 4"]
        page.keyboard.press("Enter")
        page.reload()
        assert page.locator(REPLY).all_text_contents() == ["reply 1", "reply 2"]
        assert page.locator(COUNT).all_text_contents() == ["1 / 2"]


def test_an_edited_message_is_a_branch(browser):
    with opened(browser) as (page, server):
        say(page, "one")
        say(page, "two", 2)
        page.locator(".message.user").first.hover()
        page.get_by_role("button", name="Edit and continue from here").first.click()
        page.locator(".edit textarea").fill("changed")
        page.locator(".edit").get_by_text("Send").click()
        page.locator(REPLY).get_by_text("changed").wait_for()
        assert page.locator(".message").count() == 2
        assert page.locator("#title").text_content() == "changed"
        assert "one" not in last_prompt(server)
        page.locator(DONE).wait_for(state="attached")
        page.press("#input", "ArrowUp")
        assert page.locator(".edit textarea").input_value() == "changed"
        page.keyboard.press("Escape")
        assert page.locator(".edit").count() == 0
        page.get_by_role("button", name="Previous version").click()
        assert page.locator(REPLY).all_text_contents() == ["one", "two"]


def test_trying_again_keeps_the_partial_answer(browser):
    texts = iter([itertools.cycle(b"part "), b"whole"])
    with opened(browser, lambda request, sample: next(texts), step_seconds=0.01) as (page, server):
        page.fill("#input", "hi")
        page.press("#input", "Enter")
        page.locator(REPLY).get_by_text("part part").wait_for()
        server.engine.fails = True
        page.locator(".failure").get_by_text("the engine failed").wait_for()
        partial = page.locator(REPLY).text_content()
        page.locator(".failure").get_by_text("Try again").click()
        page.locator(REPLY).get_by_text("whole").wait_for()
        assert page.locator(".failure").count() == 0
        page.locator(DONE).wait_for(state="attached")
        page.get_by_role("button", name="Previous answer").click()
        assert page.locator(REPLY).text_content() == partial
        assert page.locator(".failure").is_visible()
        page.reload()
        assert page.locator(REPLY).text_content() == partial


FORMER_CHAT = {
    "id": "4f6c",
    "title": "hello",
    "updated": 1_750_000_000_000,
    "messages": [
        {"role": "user", "text": "hello"},
        {
            "role": "assistant",
            "parts": [
                {"type": "text", "text": "It is "},
                {"type": "python", "text": "6*7"},
                {"type": "python_output", "text": "42"},
            ],
            "finish": "stop",
            "stats": "12 tokens · 30/s",
        },
        {"role": "user", "text": "and then?"},
        {"role": "assistant", "parts": [], "error": "The connection was lost.", "dropped": 2},
    ],
}


def test_chats_of_the_former_page_load(browser):
    """It saved messages without branches."""
    with opened(browser) as (page, server):
        page.evaluate(
            "chat => localStorage.setItem('maxnano.chat.4f6c', chat)", json.dumps(FORMER_CHAT)
        )
        page.evaluate("localStorage.setItem('maxnano.chat.x', '{broken')")
        page.evaluate("""localStorage.setItem('maxnano.settings', '{"temperature": 1.5}')""")
        page.reload()
        assert page.locator("#conversations .open").all_text_contents() == ["hello"]
        assert page.locator(".message.user .bubble").all_text_contents() == ["hello", "and then?"]
        assert page.locator(".tool .result").text_content() == "42"
        assert page.locator(".stats").first.text_content() == "12 tokens · 30/s"
        assert "first 2 messages" in page.locator(".note").text_content()
        page.locator(".failure").get_by_text("Try again").click()
        page.locator(REPLY).get_by_text("and then?").wait_for()
        assert page.locator(COUNT).text_content() == "2 / 2"
        assert "hello<|user_end|><|assistant_start|>It is <|python_start|>6*7" in last_prompt(
            server
        )
        assert server.engine.requests[-1].temperature == 1.5


# ---- Several chats ------------------------------------------------------------------------------


def test_other_chats_stay_usable_while_one_streams(browser):
    gate = threading.Event()

    def reply(request, sample):
        said = bytes(last_words(request, sample))
        if said != b"slow":
            yield from said
            return
        while not gate.is_set():
            yield from b"wait "
        yield from b"end"

    limits = {"max_length": 1 << 30, "step_seconds": 0.01}
    with opened(browser, reply, "max_new_tokens=1000000", **limits) as (page, server):
        page.fill("#input", "slow")
        page.press("#input", "Enter")
        page.locator(".streaming .bubble").get_by_text("wait wait").wait_for()
        page.keyboard.press("Control+Shift+o")
        say(page, "quick")
        say(page, "quick again", 2)
        page.get_by_role("button", name="Regenerate").last.click()
        page.locator(COUNT).get_by_text("2 / 2").wait_for()
        page.locator(DONE).nth(1).wait_for(state="attached")
        assert page.locator(REPLY).all_text_contents() == ["quick", "quick again"]
        assert page.locator("#conversations .dot").count() == 1 and server.engine.running == 1
        page.keyboard.press("Alt+ArrowDown")
        page.locator(".streaming .bubble").get_by_text("wait wait").wait_for()
        assert page.locator("#stop").is_visible() and not page.locator("#send").is_visible()
        gate.set()
        page.locator(DONE).wait_for(state="attached")
        assert page.locator(REPLY).text_content().endswith("wait end")
        assert page.locator("#conversations .dot").count() == 0
        page.reload()
        assert page.locator("#conversations li").count() == 2


def test_each_chat_keeps_its_draft(browser):
    with opened(browser) as (page, _):
        say(page, "one")
        page.fill("#input", "draft of one")
        page.keyboard.press("Control+Shift+o")
        assert page.locator("#input").input_value() == ""
        page.fill("#input", "draft of a new chat")
        page.keyboard.press("Control+Shift+o")
        assert page.locator("#input").input_value() == "draft of a new chat"
        page.click("#conversations .open")
        assert page.locator("#input").input_value() == "draft of one"


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
        menu(page, "Delete")
        assert page.locator("#conversations li").count() == 1
        page.get_by_role("button", name="Undo").click()
        assert page.locator("#conversations li").count() == 2
        assert page.locator(REPLY).text_content() == "first chat"
        page.evaluate("localStorage.setItem('maxnano.settings', '7')")
        page.reload()
        assert page.locator("#conversations li").count() == 2


def test_two_tabs_show_the_same_chats(browser):
    with opened(browser) as (page, _):
        say(page, "first")
        with page.context.expect_page() as opening:
            page.evaluate("open(location.href)")
        other = opening.value
        other.wait_for_load_state("networkidle")  # its modules run
        say(other, "second", 2)
        page.locator(REPLY).get_by_text("second").wait_for()
        menu(other, "Delete")
        page.locator("#welcome").wait_for()


def test_chats_are_renamed(browser):
    with opened(browser) as (page, _):
        say(page, "a question")
        menu(page, "Rename")
        page.locator("#rename-title").fill("My <b>name</b>")
        page.keyboard.press("Enter")
        assert page.locator("#title").text_content() == "My <b>name</b>"
        page.get_by_role("button", name="Edit and continue from here").click()
        page.locator(".edit textarea").fill("another question")
        page.keyboard.press("Enter")
        page.locator(REPLY).get_by_text("another question").wait_for()
        page.reload()
        assert page.locator("#conversations .open").all_text_contents() == ["My <b>name</b>"]
        menu(page, "Rename")
        page.locator("#rename-title").fill("not saved")
        page.locator("#rename").get_by_text("Cancel").click()
        assert page.locator("#title").text_content() == "My <b>name</b>"


def test_search_finds_titles_and_messages_of_all_branches(browser):
    with opened(browser, numbered()) as (page, _):
        say(page, "fruit and vegetables")
        page.get_by_role("button", name="Regenerate").click()
        page.locator(COUNT).get_by_text("2 / 2").wait_for()
        page.keyboard.press("Control+Shift+o")
        say(page, "ships")
        page.keyboard.press("Control+k")
        page.keyboard.type("REPLY 1")
        assert page.locator("#conversations mark").all_text_contents() == ["reply 1"]
        assert page.locator("#search-result").text_content() == "1 chat found"
        page.click("#conversations .open")
        assert page.locator(REPLY).text_content() == "reply 1"
        for query, titles in (
            ("egetab", ["fruit and vegetables"]),
            ("reply", ["ships", "fruit and vegetables"]),
            ("nothing", []),
            ("(", []),
            ("", ["ships", "fruit and vegetables"]),
        ):
            page.fill("#search", query)
            assert page.locator("#conversations .open > span").all_text_contents() == titles


def test_the_sidebar_stays_hidden(browser):
    with opened(browser) as (page, _):
        page.click("#close-sidebar")
        assert not page.locator("#sidebar").is_visible()
        assert page.locator("main").bounding_box()["width"] == 1100
        page.reload()
        assert not page.locator("#sidebar").is_visible()
        page.click("#open-sidebar")
        assert page.locator("#sidebar").is_visible()
        assert not page.locator("#open-sidebar").is_visible()


# ---- Files --------------------------------------------------------------------------------------


def saved(page, act):
    """(name, text) of the file that the page saves."""
    with page.expect_download() as download:
        act()
    return download.value.suggested_filename, download.value.path().read_text("utf-8")


def upload(page, selector, **files):
    contents = [
        {"name": name, "mimeType": "text/plain", "buffer": content}
        for name, content in files.items()
    ]
    page.set_input_files(selector, contents)


def test_chats_are_exported_and_imported(browser):
    with opened(browser, numbered()) as (page, _):
        say(page, "What is *it*? 😀")
        page.get_by_role("button", name="Regenerate").click()
        page.locator(COUNT).get_by_text("2 / 2").wait_for()
        page.locator(DONE).wait_for(state="attached")
        name, text = saved(page, lambda: menu(page, "Save as Markdown"))
        assert name == "what-is-it.md"
        assert text == "# What is *it*? 😀\n\n## You\n\nWhat is *it*? 😀\n\n## Model\n\nreply 2\n"
        single = saved(page, lambda: menu(page, "Save as JSON"))
        assert single[0] == "what-is-it.json"
        page.keyboard.press("Control+Shift+o")
        say(page, "another")
        page.click("#open-settings")
        name, everything = saved(page, lambda: page.click("#export-all"))
        assert name == "maxnano-chats.json" and len(json.loads(everything)["chats"]) == 2
        upload(page, "#import-file", x=everything.encode())
        page.locator("#toast").get_by_text("These chats are here already.").wait_for()
        assert page.locator("#conversations li").count() == 2
    with opened(browser) as (page, server):  # another browser
        upload(page, "#import-file", x=everything.encode())
        page.locator("#toast").get_by_text("Imported 2 chats").wait_for()
        page.reload()
        titles = page.locator("#conversations .open").all_text_contents()
        assert titles == ["another", "What is *it*? 😀"]
        page.keyboard.press("Alt+ArrowDown")
        assert page.locator(COUNT).text_content() == "2 / 2"
        say(page, "go on", 2)
        assert "reply 2<|assistant_end|>" in last_prompt(server)
        # The chat has grown: what is imported now becomes a chat beside it.
        upload(page, "#import-file", x=single[1].encode())
        page.locator("#toast").get_by_text("Imported 1 chat").wait_for()
        assert page.locator("#conversations li").count() == 3


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xff", "The file is not JSON."),
        (b"[1]", "The file is not an export of chats."),
        (
            b'{"format": "maxnano-chats", "chats": [{"id": "x", "messages": [7]}]}',
            "The file has no chat that can be read.",
        ),
    ],
    ids=["bytes", "other", "broken"],
)
def test_other_files_are_not_imported(browser, content, message):
    with opened(browser) as (page, _):
        upload(page, "#import-file", x=content)
        page.locator("#toast").get_by_text(message).wait_for()
        assert page.locator("#conversations li").count() == 0


def test_text_files_are_attached(browser):
    with opened(browser, max_length=1000) as (page, server):
        files = {
            "notes.md": "a ``` b\nü\n".encode(),
            "image.png": b"\x89PNG\0",
            "long": b"a" * 1001,
        }
        upload(page, "#files", **files)
        page.locator("#toast").get_by_text("image.png is not a text file.").wait_for()
        page.locator(".too-large").get_by_text("1,001 tokens, more than the context").wait_for()
        page.get_by_role("button", name="Remove long").click()
        say(page, "Read this.")
        expected = "Read this.\n\nnotes.md:\n````\na ``` b\nü\n````<|user_end|>"
        assert expected in last_prompt(server)
        assert page.locator("#attachments li").count() == 0
        page.reload()
        assert page.locator(".message.user .bubble").text_content() == "Read this."
        page.locator(".file summary").get_by_text("notes.md").click()
        assert page.locator(".file pre").inner_text() == "a ``` b\nü\n"
        page.get_by_role("button", name="Edit and continue from here").click()
        page.locator(".edit textarea").fill("Read again.")
        page.keyboard.press("Enter")
        page.locator(COUNT).get_by_text("2 / 2").wait_for()
        page.locator(DONE).wait_for(state="attached")
        assert expected.replace("this", "again") in last_prompt(server)
        page.keyboard.press("Control+Shift+o")
        upload(page, "#files", **{"alone.txt": b"alone"})
        page.locator("#attachments li").wait_for()
        page.click("#send")
        page.locator(DONE).wait_for(state="attached")
        assert page.locator("#title").text_content() == "alone.txt"


# ---- The server ---------------------------------------------------------------------------------


def test_a_busy_server_is_tried_again(browser):
    def reply(request, sample):
        said = last_words(request, sample)
        return itertools.cycle(b"x") if bytes(said) == b"hi" else said

    limits = {"slots": 1, "max_length": 1 << 30, "step_seconds": 0.01}
    words = ("serve_queue=0", "max_new_tokens=1000000")
    with opened(browser, reply, *words, **limits) as (page, server):
        with server.streaming():
            page.fill("#input", "patience")
            page.press("#input", "Enter")
            text = page.locator(".countdown span").text_content()
            assert re.fullmatch(r"The server is busy\. Trying again in \d+ s\.", text)
            page.click("#stop")
            page.locator(".stats").get_by_text("stopped").wait_for()
            page.get_by_role("button", name="Regenerate").click()
            page.locator(".countdown").wait_for()
            page.get_by_role("button", name="Try now").click()
            page.locator(".countdown").wait_for()
        page.locator(REPLY).get_by_text("patience").wait_for()
        page.locator(DONE).wait_for(state="attached")
        assert page.locator(".countdown").count() == 0 and page.locator(".failure").count() == 0
        wait_until(lambda: server.engine.running == 0)


def test_the_model_and_the_context_used(browser):
    with opened(browser) as (page, server):
        page.click("#model")
        facts = page.locator("#model-facts")
        values = dict(
            zip(
                facts.locator("dt").all_text_contents(),
                facts.locator("dd").all_text_contents(),
                strict=True,
            )
        )
        assert values == {
            "Run": "tiny",
            "Stage": "pretraining",
            "Training step": "2,100",
            "Parameters": "36.7M",
            "Context": "4,096 tokens",
        }
        assert not page.locator("#model-choice").is_visible()
        page.keyboard.press("Escape")
        assert not page.locator("#context").is_visible()
        for turn, text in enumerate(("hello", "more"), start=1):
            say(page, text, turn)
            used = len(server.engine.requests[-1].prompt) + len(text)
            assert page.locator("#context").text_content() == f"{used} / 4,096 tokens"
        assert page.locator("#context-meter").evaluate("meter => meter.value / meter.max") == (
            pytest.approx(used / 4096)
        )
        page.keyboard.press("Control+Shift+o")
        assert not page.locator("#context").is_visible()


def test_one_of_several_models_is_chosen(browser):
    with opened(browser) as (page, _):
        models = [
            {"id": name, "chat": True, "max_model_len": 512, "defaults": {"temperature": heat}}
            for name, heat in (("first", 0.5), ("second", 0.25))
        ]
        page.route("**/v1/models", lambda route: route.fulfill(json={"data": models}))
        page.reload()
        page.locator("#model").get_by_text("first").wait_for()
        page.click("#model")
        page.select_option("#model-picker", "second")
        page.reload()
        page.locator("#model").get_by_text("second").wait_for()
        page.fill("#input", "hi")
        with page.expect_request("**/v1/chat/completions") as request:
            page.press("#input", "Enter")
        body = request.value.post_data_json
        assert (body["model"], body["temperature"]) == ("second", 0.25)
