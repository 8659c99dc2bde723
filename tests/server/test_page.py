"""The page at /, in a browser."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from server_helpers import PATIENCE, FakeEngine, FakeSession, served, until

from ttt_e2e.server.engine.records import Source
from ttt_e2e.server.keys import Keys

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH"),
]
KEY = "a-long-key-for-the-page"
PHONES = [{"width": 360, "height": 740}, {"width": 390, "height": 844}]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # In containers tests run as root, for whom its sandbox does not work.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    sync_api.expect.set_options(timeout=1000 * PATIENCE)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


class Watched:
    """A page, and what its browser complains about, such as a script that the policy refuses."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        context = browser.new_context(**options)
        context.set_default_timeout(1000 * PATIENCE)
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else 0)
        self.page.goto(address)


def text_of(page: Any, selector: str) -> str:
    return page.locator(selector).inner_text()


def wait_for(page: Any, condition: Callable[[], object]) -> None:
    """`until`, for what routes and listeners of this test see: they are called while the page is waited for."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        page.wait_for_timeout(10)


def settle(page: Any, button: str = "#send") -> None:
    """Wait until a button can be used again, and the list of sessions is not made anew under a click."""
    sync_api.expect(page.locator(button)).to_be_enabled()
    page.evaluate("list()")  # those that were asked for before it come too late


def test_read_generate_export_and_delete(
    browser: Any, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ttt_e2e.server.api.sessions.EVENT_SECONDS", 0.0)
    file = tmp_path / "book.txt"
    file.write_text("Die Straße war naß. " * 30)
    with served(engine) as address:
        watched = Watched(browser, address, accept_downloads=True)
        page = watched.page
        page.set_input_files("#file", file)
        sync_api.expect(page.locator("#progress")).to_contain_text("Read: 120 tokens")
        settle(page, "#file")  # the stream has ended
        for line in ("#curve", "#mean"):
            points = [[float(number) for number in p.split(",")] for p in page.get_attribute(line, "points").split()]
            assert len(points) >= 3
            assert all(0 <= x <= 1000 and 0 <= y <= 200 for x, y in points)
            assert points == sorted(points)  # from left to right
        assert "120 tokens" in page.locator("svg title").text_content()
        assert page.evaluate("document.getElementById('bar').value") == 1
        assert text_of(page, "#sessions li").count("121 tokens read") == 1
        assert text_of(page, "#sessions strong") == "book.txt"
        (session,) = engine.all.values()
        assert session.text.startswith("Die Straße") and session.notebook == [("book.txt", file.read_text())]

        # Markup in a prompt is text.
        page.select_option("#mode", "text")
        page.fill("#prompt", "<img src=x onerror=alert(1)>")
        page.fill("#most", "5")
        page.check("#learn")
        page.click("#send")
        written = page.locator(".answer").first
        sync_api.expect(written).to_have_text("<img src=x onerror=alert(1)> w1ä w2ä w3ä w4ä w5ä")
        until(lambda: session.text.endswith("w5ä"))
        settle(page)

        with page.expect_download() as download:
            page.get_by_role("button", name="Export").click()
        assert Path(download.value.path()).read_bytes().startswith(b"session:Die")

        engine.hold_from = 8
        page.fill("#most", "16000")
        page.click("#send")
        sync_api.expect(written).to_contain_text(" w7")
        page.click("#stop-writing")
        until(lambda: engine.running == 0)
        settle(page)

        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Delete").click()
        page.wait_for_selector("#none:visible")
        assert not engine.all
        assert watched.complaints == []


def test_dropped_texts_are_read_or_refused(browser: Any, engine: FakeEngine) -> None:
    with served(engine) as address:
        watched = Watched(browser, address)
        drop = """content => {
            const data = new DataTransfer();
            data.items.add(new File([content], "dropped.txt"));
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
        }"""
        watched.page.evaluate(drop, "one two three")
        sync_api.expect(watched.page.locator("#progress")).to_contain_text("Read: 3 tokens")
        settle(watched.page, "#file")  # until then nothing else is read
        watched.page.evaluate(drop, "bad\0text")
        watched.page.wait_for_selector("#error:visible")
        assert "looks binary" in text_of(watched.page, "#error")
        (session,) = engine.all.values()
        assert session.text == "one two three"


def test_text_goes_to_the_selected_session(browser: Any, engine: FakeEngine, tmp_path: Path) -> None:
    files = [tmp_path / f"{word}.txt" for word in ("one", "two", "three")]
    for file in files:
        file.write_text(file.stem)
    with served(engine) as address:
        page = Watched(browser, address).page

        def read(file: Path) -> list[str]:
            before = sum(len(one.text) for one in engine.all.values())
            page.set_input_files("#file", file)
            until(lambda: sum(len(one.text) for one in engine.all.values()) > before)
            sync_api.expect(page.locator("#file")).to_be_enabled()
            return [one.text for one in engine.all.values()]

        assert read(files[0]) == ["one"]
        page.select_option("#into", "")  # a new session, whatever else is done before the text comes
        page.fill("#prompt", "And")
        page.fill("#most", "2")
        page.click("#send")
        sync_api.expect(page.locator(".answer").first).to_contain_text("w2")
        sync_api.expect(page.locator("#send")).to_be_enabled()
        assert read(files[1]) == ["one", "two"]
        assert read(files[2]) == ["one", "twothree"]


def test_lists_that_come_late_change_no_selection(browser: Any, engine: FakeEngine, tmp_path: Path) -> None:
    held: list[tuple[Any, Any]] = []  # lists that the page waits for: what it asked, and what was true then
    hold = True

    def held_or_not(route: Any) -> None:
        if hold and route.request.method == "GET":
            held.append((route, route.fetch()))
        else:
            route.continue_()

    with served(engine) as address:
        page = Watched(browser, address).page
        sync_api.expect(page.locator("#none")).to_be_visible()  # the first list is there

        def read(text: str) -> list[str]:
            file = tmp_path / "text.txt"
            file.write_text(text)
            page.set_input_files("#file", file)
            sync_api.expect(page.locator("#progress")).to_contain_text(f"Read: {len(text.split())} tokens")
            sync_api.expect(page.locator("#file")).to_be_enabled()
            return [one.text for one in engine.all.values()]

        page.route("**/v1/sessions", held_or_not)
        page.dispatch_event("#key", "change")  # asks for a list, of no sessions
        wait_for(page, lambda: len(held) == 1)
        assert read("a") == ["a"]
        assert read("b b") == ["ab b"]  # although no list with the session has come
        wait_for(page, lambda: len(held) == 3)
        hold = False
        assert read("c") == ["ab bc"]
        sync_api.expect(page.locator("#sessions li")).to_have_count(1)
        for route, answer in held:
            with page.expect_request_finished(lambda request, late=route.request: request == late):
                route.fulfill(response=answer)
        assert held[0][1].json()["data"] == []
        assert read("d d") == ["ab bcd d"]
        sync_api.expect(page.locator("#sessions li")).to_have_count(1)

        # The answer, too, is the session's that has just read.
        page.select_option("#into", "")
        hold = True
        assert read("e") == ["ab bcd d", "e"]
        wait_for(page, lambda: len(held) == 4)
        hold = False
        page.fill("#prompt", "And")
        with page.expect_request("**/v1/chat/completions") as asked:
            page.click("#send")
        assert asked.value.post_data_json["session"] == list(engine.all)[1]
        settle(page)

        late = "async () => { const late = list(); use('made since'); await late; return current; }"
        assert page.evaluate(late) == "made since"


def test_what_is_chosen_while_a_text_is_read_stays(
    browser: Any, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ttt_e2e.server.api.sessions.EVENT_SECONDS", 0.0)
    one, two = (FakeSession(f"sess-{name}", "local", name, notebook=[(name, name)]) for name in ("one", "two"))
    engine.all = {session.id: session for session in (one, two)}
    file = tmp_path / "text.txt"
    with served(engine) as address:
        page = Watched(browser, f"{address}/#sess-one").page
        sync_api.expect(page.locator("#sessions li")).to_have_count(2)

        def read_while(into: str, choose: Callable[[], object]) -> None:
            page.select_option("#into", into)
            file.write_text("word " * 12)
            engine.hold_from = 1
            page.set_input_files("#file", file)
            sync_api.expect(page.locator("#progress")).to_contain_text("0 % read")
            choose()
            engine.hold_from = math.inf
            sync_api.expect(page.locator("#progress")).to_contain_text("Read: 12 tokens")
            settle(page, "#file")

        read_while("sess-one", lambda: page.select_option("#into", ""))
        assert page.evaluate("[current, into]") == ["sess-one", ""] and page.input_value("#into") == ""
        read_while("sess-one", lambda: page.get_by_role("button", name="Use: two").click())
        assert page.evaluate("[current, into]") == ["sess-two", "sess-two"]
        read_while("", lambda: None)
        made = list(engine.all)[2]
        assert page.evaluate("[current, into]") == [made, made]


def test_an_answer_belongs_to_the_session_that_was_asked(browser: Any, engine: FakeEngine) -> None:
    one, two = (FakeSession(f"sess-{name}", "local", name, notebook=[(name, name)]) for name in ("one", "two"))
    engine.all = {session.id: session for session in (one, two)}
    with served(engine) as address:
        page = Watched(browser, f"{address}/#sess-one").page
        sync_api.expect(page.locator("#sessions li")).to_have_count(2)
        engine.hold_from = 3
        page.fill("#prompt", "Who?")
        page.fill("#most", "3")
        page.click("#send")
        sync_api.expect(page.locator(".answer")).to_have_text("w1ä w2ä")
        page.get_by_role("button", name="Use: two").click()
        sync_api.expect(page.locator(".answer")).to_have_count(0)
        engine.hold_from = math.inf
        settle(page)
        for name, count in (("one", 1), ("two", 0), ("one", 1)):
            page.get_by_role("button", name=f"Use: {name}").click()
            sync_api.expect(page.locator("[aria-current=true] strong")).to_have_text(name)
            sync_api.expect(page.locator(".answer")).to_have_count(count)


def test_a_question_waits_for_a_list_that_has_the_session(browser: Any, engine: FakeEngine) -> None:
    """Also if another list is asked for meanwhile: it may be the one that comes."""
    engine.all["sess-1"] = FakeSession("sess-1", "local", "text", notebook=[("text", "text")])
    held: list[Any] = []
    hold = True
    with served(engine) as address:
        page = Watched(browser, f"{address}/#sess-1").page
        sync_api.expect(page.locator("#sessions li")).to_have_count(1)
        page.route("**/v1/sessions", lambda route: held.append(route) if hold else route.continue_())
        page.evaluate("sessions = []")  # as if it had just read its first text
        page.fill("#prompt", "text?")
        with page.expect_request("**/v1/chat/completions") as asked:
            page.click("#send")
            wait_for(page, lambda: len(held) == 1)
            page.dispatch_event("#key", "change")
            wait_for(page, lambda: len(held) == 2)
            hold = False
            for route in held:
                route.continue_()
        assert asked.value.post_data_json["notebook"] is True
        settle(page)


def test_a_list_without_news_leaves_the_buttons_alone(browser: Any, engine: FakeEngine) -> None:
    """Else it would take away the button that is just being pressed, and the keyboard's focus."""
    engine.all["sess-1"] = FakeSession("sess-1", "local", "text", notebook=[("text", "text")])
    with served(engine) as address:
        page = Watched(browser, address).page
        page.get_by_role("button", name="Use: text").hover()
        page.mouse.down()
        page.evaluate("list()")
        page.mouse.up()
        sync_api.expect(page.locator("[aria-current=true]")).to_have_count(1)


def test_page_asks_for_a_key(browser: Any, engine: FakeEngine) -> None:
    with served(engine, keys=Keys({"me": KEY})) as address:
        page = Watched(browser, address).page
        page.wait_for_selector("#error:visible")
        assert "API key is missing" in text_of(page, "#error")
        page.fill("#key", KEY)
        page.press("#key", "Tab")
        page.wait_for_selector("#error", state="hidden")
        page.fill("#prompt", "Hello")
        page.fill("#most", "3")
        page.press("#most", "Enter")  # by keyboard alone
        sync_api.expect(page.locator(".answer")).to_have_text("w1ä w2ä w3ä")


def test_answers_show_passages_and_outlive_a_reload(browser: Any, engine: FakeEngine) -> None:
    async def known(slot: FakeSession, question: str, count: int = 3) -> tuple[str, list[Source]]:
        return f"[passages]{question}", [Source("moby.txt", 500, 540, 1000, "and then W2ä, w3ä -- w4ä <b>", 2.0)]

    engine.retrieve = known  # type: ignore[method-assign]
    engine.all["sess-1"] = FakeSession(
        "sess-1", "local", "Call me Ishmael.", notebook=[("moby.txt", "Call me Ishmael.")]
    )
    with served(engine) as address:
        watched = Watched(browser, address)
        page = watched.page
        page.get_by_role("button", name="Use: moby.txt").click()
        assert page.evaluate("location.hash") == "#sess-1"
        page.fill("#prompt", "Who?")
        page.fill("#most", "5")
        page.click("#send")
        for _ in range(2):
            sync_api.expect(page.locator(".answer")).to_have_text("w1ä w2ä w3ä w4ä w5ä")
            sync_api.expect(page.locator("mark")).to_have_text("w2ä w3ä w4ä")  # whatever stands between the words
            shown = text_of(page, "article")
            for told in ("Who?", "had read 4 tokens", "1 passage", "characters 500 to 540 of 1,000, 50 %", "w4ä <b>"):
                assert told in shown
            bar = page.locator(".place i").evaluate("one => [one.style.left, one.style.width]")
            assert bar == ["50%", "4%"]
            page.reload()
        assert engine.calls[-1].prompt.startswith("\nUser: [passages]Who?")

        page.uncheck("#notebook")
        page.click("#send")  # without a question: nothing is sent
        page.fill("#prompt", "Who?")
        page.click("#send")
        sync_api.expect(page.locator("article")).to_have_count(2)
        sync_api.expect(page.locator("#send")).to_be_enabled()
        assert "notebook" not in text_of(page, "article >> nth=0") and "From memory" in text_of(
            page, "article >> nth=0"
        )
        assert engine.calls[-1].prompt.startswith("\nUser: Who?")
        assert len(engine.calls) == 2 and watched.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_on_a_phone(browser: Any, engine: FakeEngine, scheme: str) -> None:
    engine.all["sess-1"] = FakeSession("sess-1", "local", "x", notebook=[("A" * 100 + ".txt", "x")])
    with served(engine) as address:
        page = Watched(browser, address, color_scheme=scheme).page
        sync_api.expect(page.locator("#sessions li")).to_have_count(1)
        for phone in PHONES:
            page.set_viewport_size(phone)
            assert page.evaluate("document.documentElement.scrollWidth") <= phone["width"]
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(ground.removeprefix("rgb(").split(",")[0]) < 128) == (scheme == "dark")
        fields = 'document.querySelectorAll("input, textarea, select, button")'
        unlabelled = f"[...{fields}].filter(one => !one.labels?.length && !one.textContent.trim()).map(one => one.id)"
        assert page.evaluate(unlabelled) == []
        small = f"""[...{fields}].map(one => one.type === "checkbox" ? one.labels[0] : one)
            .filter(one => one.offsetParent && one.offsetHeight < 44).map(one => one.id)"""
        assert page.evaluate(small) == []
