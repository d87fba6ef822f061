"""The chat page in a real browser, against a real server; `make test-ui` makes the environment for it."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.browser,
    # Gradio 6.31 on the newest FastAPI and Pillow
    pytest.mark.filterwarnings("default"),
]

PICTURES = Path(__file__).parent.parent.parent / "examples" / "pictures"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Without these, a browser asks for its maker's servers, and one that runs as root does not start.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@contextmanager
def server(*options: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mmtool", "serve", "--port", str(port), "--web_ui", "true", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise AssertionError(process.stderr.read())
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(browser) -> Iterator[str]:
    with server() as found:
        yield found


@pytest.fixture
def page(browser, address):
    opened = browser.new_page(viewport={"width": 1000, "height": 760})
    opened.set_default_timeout(30_000)
    opened.goto(f"{address}/ui/")
    opened.wait_for_selector("textarea")
    yield opened
    opened.close()


def ask(page, question: str, *pictures: str) -> None:
    if pictures:
        shown = page.locator("button[aria-label='Remove this file'], .thumbnail-item").first
        for beat in range(60):
            if beat % 20 == 0:  # Gradio draws its input anew when an answer ends; a choice in that moment is lost
                with page.expect_file_chooser() as chooser:  # the button waits until the page takes files
                    page.get_by_label("Upload a file").click()
                chooser.value.set_files([PICTURES / name for name in pictures])
            page.wait_for_timeout(500)
            if shown.is_visible():
                break
        assert shown.is_visible()
    page.locator("textarea").first.fill(question)
    page.get_by_label("Submit").click()


def wait_for_metrics(address: str, reached: Callable[[int, dict[str, int]], bool]) -> None:
    """Wait until ``reached`` is true of how many answers wait, and how many have ended by reason."""
    deadline = time.monotonic() + 30
    while True:
        text = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode()
        ended = {
            reason: int(count) for reason, count in re.findall(r'answers_total{finish_reason="(\w+)"} (\d+)', text)
        }
        if reached(int(re.search(r"^mmtool_requests_waiting (\d+)", text, re.MULTILINE)[1]), ended):
            return
        assert time.monotonic() < deadline, text
        time.sleep(0.1)


def answered(page, text: str) -> None:
    page.locator(".bot.message", has_text=text).last.wait_for()


def test_a_person_asks_about_a_picture_in_two_turns(page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    ask(page, "How many shapes are there?", "shapes.png")
    answered(page, "3")
    ask(page, "What colour is the star?")
    answered(page, "green")
    foreign = [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]
    assert not foreign


def test_clear_forgets_the_conversation(page) -> None:
    ask(page, "What is the sum?", "sum.png")
    answered(page, "27 + 45 = 72")
    page.get_by_label("Clear").click()
    page.locator(".bot.message").first.wait_for(state="detached")
    ask(page, "What is the sum?")
    page.locator(".bot.message").first.wait_for()
    assert "72" not in page.locator(".bot.message").first.inner_text()


def test_what_cannot_be_answered_is_said_and_the_conversation_goes_on(page, tmp_path) -> None:
    ask(page, "How many shapes are there?", "shapes.png")
    answered(page, "3")
    page.get_by_label("Submit").wait_for()
    ask(page, "How many shapes are there?" * 400)
    answered(page, "but the model takes 2048")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    page.get_by_label("Submit").wait_for()
    ask(page, "What is it?", str(broken))
    answered(page, "Cannot open image")
    page.get_by_label("Submit").wait_for()
    ask(page, "What colour is the star?")
    answered(page, "The star is green.")


def test_stop_ends_an_answer_and_another_question_can_be_asked(browser) -> None:
    with server("--max_num_seqs", "1") as address:
        page = browser.new_page()
        page.set_default_timeout(30_000)
        page.goto(f"{address}/ui/")
        page.get_by_label("Submit").wait_for()
        body = {"messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True, "max_tokens": 2000, "n": 4}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions",
            json.dumps({**body, "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as other:  # one of its four has the only place
            other.readline()
            ask(page, "Who are you?")
            wait_for_metrics(address, lambda waiting, ended: waiting + sum(ended.values()) == 4)
            page.get_by_label("Stop").click()
            page.get_by_label("Submit").wait_for()
            wait_for_metrics(address, lambda waiting, ended: ended.get("cancelled") == 1)
        ask(page, "What is the sum?", "sum.png")
        answered(page, "27 + 45 = 72")
        page.close()


def test_it_fits_a_phone(browser, address) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto(f"{address}/ui/")
    page.wait_for_selector("textarea")
    ask(page, "How many shapes are there?", "shapes.png")
    answered(page, "3")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()


def test_the_settings_reach_the_model(page) -> None:
    page.get_by_text("System prompt and sampling").click()
    page.get_by_label("number input for Most new tokens").fill("2")
    page.keyboard.press("Tab")
    ask(page, "How many shapes are there?", "shapes.png")
    page.locator(".bot.message").first.wait_for()
    page.wait_for_timeout(1000)
    assert page.locator(".bot.message").first.inner_text().strip() == "There are"


def test_the_address_without_a_slash_leads_to_the_page(browser, address) -> None:
    page = browser.new_page()
    page.goto(f"{address}/ui")
    page.wait_for_selector("textarea")
    assert page.url == f"{address}/ui/"
    page.close()


def test_files_of_the_server_are_out_of_reach(address, tmp_path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes((PICTURES / "sum.png").read_bytes())
    for path in (str(secret), "http://127.0.0.1:9/x.png", "/etc/hostname"):
        file = {"path": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
        call = {"data": [{"text": "What is it?", "files": [file]}], "fn_index": 0, "session_hash": "x"}
        for kind in ("application/json", "text/plain"):
            request = urllib.request.Request(
                f"{address}/ui/gradio_api/queue/join", json.dumps(call).encode(), {"Content-Type": kind}
            )
            with pytest.raises(urllib.error.HTTPError, match="400"):
                urllib.request.urlopen(request, timeout=30)
        with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
            urllib.request.urlopen(f"{address}/ui/gradio_api/file={path}", timeout=30)


def test_with_api_keys_the_page_asks_for_one(browser) -> None:
    with server("--api_key", "sesame") as address:
        page = browser.new_page()
        page.set_default_timeout(30_000)
        page.goto(f"{address}/ui/")
        for password, expected in (("wrong", "Incorrect"), ("sesame", None)):
            page.get_by_label("username").fill("me")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            if expected:
                page.get_by_text(expected).first.wait_for()
        page.get_by_label("Submit").wait_for()
        ask(page, "What is the sum?", "sum.png")
        answered(page, "27 + 45 = 72")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/ui/config", timeout=30)
        page.close()
