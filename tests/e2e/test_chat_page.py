"""The chat page in a real browser, on real workers: ask, read the answer as it comes, stop it, begin anew."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from cluster import PAIRS, Cluster, running
from pagewire.v1.inference_pb2 import GenerateRequest
from pagewire_bridge.answer_parser import AnswerFormat
from pagewire_bridge.reasoning import REASONING_FORMATS
from pagewire_cli.serve import demo_model
from playwright.async_api import Browser, Page, async_playwright, expect
from scripted_router import (
    STOP,
    Events,
    ScriptedRouter,
    accepted,
    delta,
    refuses,
    running_bridge,
    says,
    stalls_after,
    summary,
)

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ("--kv-cache-memory-bytes=16M", "--max-model-len=512", "--threads=1")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
# Pressed by the page itself: from here the key could come after the end of a short answer.
ESCAPE_AT_THE_FIRST_WORD = """() => new MutationObserver((_, observer) => {
  if (!document.querySelector("article.assistant pre")?.textContent) return;
  observer.disconnect();
  if (document.getElementById("stop").checkVisibility())
    document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
}).observe(document.querySelector("main"), {subtree: true, childList: true, characterData: true})"""

expect.set_options(timeout=30_000)  # of 5 s, in which a browser on a busy machine may not get to it

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not CHROMIUM, reason="no browser: install chromium, or name one in CHROMIUM"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    directory: Path = tmp_path_factory.mktemp("page")
    names = (*PAIRS, "--served-model-name=demo")
    made = Cluster(
        demo_model(), directory, worker_flags=FLAGS, router_flags=names, bridge_flags=["--root-path=/llm"],
        with_faults=True,
    )  # fmt: skip
    async with running(made) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        yield await playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET])


@pytest_asyncio.fixture(loop_scope="module")
async def page(cluster: Cluster, browser: Browser) -> AsyncIterator[Page]:
    """Shares nothing with another test's. Errors of the page, and requests to anywhere else, fail the test."""
    complaints: list[str] = []
    shown = await browser.new_page(base_url=cluster.base_url, viewport={"width": 900, "height": 640})
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    shown.on("request", lambda r: None if r.url.startswith(("data:", cluster.base_url)) else complaints.append(r.url))
    await shown.goto("/")
    yield shown
    await shown.close()
    assert not complaints


async def test_a_question_is_answered_and_accounted_for_with_the_keyboard_alone(page: Page) -> None:
    await expect(page.get_by_label("Model")).to_have_value("demo")
    await page.get_by_text("Settings").click()
    await page.get_by_label("Temperature").fill("0")
    await page.get_by_text("Settings").click()
    await page.get_by_label("Message").focus()
    await page.keyboard.type("What is the capital of Japan?")
    await page.keyboard.press("Enter")
    answer = page.locator("article.assistant").last
    await expect(answer.locator("pre")).to_have_text("The capital of Japan is Tokyo.")
    for words in ("tokens/s", "first token after", "from the cache", "prefill by prefill-", "decode by decode-", "KiB"):
        await expect(answer.locator("footer")).to_contain_text(words)
    await expect(page.get_by_label("Message")).to_be_focused()
    if path := os.environ.get("PAGEWIRE_SCREENSHOT"):
        await page.keyboard.type("Count from 3 to 9.")
        await page.keyboard.press("Enter")
        await expect(page.locator("article.assistant").last.locator("footer")).to_contain_text("tokens/s")
        await page.screenshot(path=path)


async def test_an_answer_is_stopped_with_escape_and_leaves_nothing_behind(page: Page, cluster: Cluster) -> None:
    await page.get_by_text("Settings").click()
    await page.get_by_label("Temperature").fill("2")  # wanders, so that it does not end by itself at once
    await page.get_by_label("Message").fill("Tell me a story about Mia and a fox at the river.")
    await page.evaluate(ESCAPE_AT_THE_FIRST_WORD)
    assert cluster.faults is not None
    slow = cluster.faults / "step:decode:delay"
    slow.write_text("times=1000 seconds=0.5")  # a short answer would be over before the key
    await page.keyboard.press("Enter")
    await expect(page.locator("article.assistant").last.locator("footer")).to_have_text("stopped")
    slow.unlink(missing_ok=True)
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    await cluster.settle()
    await page.get_by_role("button", name="New chat").click()
    await expect(page.locator("article")).to_have_count(0)


@pytest_asyncio.fixture(loop_scope="module")
async def scripted(browser: Browser) -> AsyncIterator[tuple[Page, ScriptedRouter]]:
    """The page of a bridge whose router says what it is told to."""
    async with running_bridge(answers=AnswerFormat(reasoning=REASONING_FORMATS["qwen3"])) as bridge:
        shown = await browser.new_page(base_url=bridge.url)
        await shown.goto("/")
        yield shown, bridge.router
        await shown.close()


async def test_a_new_chat_has_nothing_of_an_answer_that_it_ended(scripted: tuple[Page, ScriptedRouter]) -> None:
    page, router = scripted
    router.script = stalls_after(accepted(), delta("secret"))
    await page.get_by_label("Message").fill("old")
    await page.keyboard.press("Enter")
    await expect(page.locator("article.assistant pre")).to_have_text("secret")
    await page.get_by_role("button", name="New chat").click()
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    router.script = says(accepted(), delta("Hi", finish=STOP), summary())
    await page.get_by_label("Message").fill("new")
    await page.keyboard.press("Enter")
    await expect(page.locator("article.assistant pre")).to_have_text("Hi")
    assert [(m.role, m.content) for m in router.requests[-1].chat.messages] == [("user", "new")]


async def test_a_question_that_failed_is_asked_again_or_is_no_part_of_the_next(
    scripted: tuple[Page, ScriptedRouter],
) -> None:
    page, router = scripted
    told, foot = page.locator("article.assistant pre"), page.locator("article.assistant footer")
    router.script = refuses(RuntimeError("no"))
    await page.get_by_label("Message").fill("first")
    await page.keyboard.press("Enter")
    await expect(foot).to_contain_text("Try again")
    router.script = says(accepted(), delta("Hi", finish=STOP), summary())
    await page.get_by_role("button", name="Try again").click()
    await expect(told).to_have_text("Hi")
    await expect(page.locator("article")).to_have_count(2)
    router.script = says(accepted(), delta("half"))  # and no end
    await page.get_by_label("Message").fill("second")
    await page.keyboard.press("Enter")
    await expect(foot.last).to_contain_text("Try again")
    router.script = says(accepted(), delta("Ho", finish=STOP), summary())
    await page.get_by_label("Message").fill("third")
    await page.keyboard.press("Enter")
    await expect(told.last).to_have_text("Ho")
    asked = [(m.role, m.content) for m in router.requests[-1].chat.messages]
    assert asked == [("user", "first"), ("assistant", "Hi"), ("user", "third")]


async def test_a_thought_is_the_first_token(scripted: tuple[Page, ScriptedRouter]) -> None:
    page, router = scripted

    async def script(_request: GenerateRequest) -> Events:
        yield accepted()
        yield delta("<think>Hm")
        await asyncio.sleep(1)
        yield delta("</think>Hi", finish=STOP)
        yield summary()

    router.script = script
    await page.get_by_label("Message").fill("x")
    await page.keyboard.press("Enter")
    account = page.locator("article.assistant footer")
    await expect(account).to_contain_text("first token after")
    assert int((await account.inner_text()).split("first token after ")[1].split(" ms")[0]) < 1000


async def test_both_colour_schemes_are_readable(page: Page) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        colours[scheme] = await page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
    assert colours["light"] == ["rgb(27, 31, 36)", "rgb(255, 255, 255)"]
    assert colours["dark"] == ["rgb(230, 232, 235)", "rgb(20, 23, 26)"]


async def test_only_browsers_get_the_page(cluster: Cluster) -> None:
    assert (await cluster.http.get("/")).text == "Ollama is running"
    shown = await cluster.http.get("/", headers={"accept": "text/html,*/*"})
    assert shown.headers["content-type"].startswith("text/html") and "default-src 'self'" in str(shown.headers)
    assert (await cluster.http.get("/page/../app.py")).status_code == 404
    assert (await cluster.http.get("/page/other.js")).status_code == 404


async def test_under_a_prefix_the_page_finds_its_files_and_the_apis(page: Page) -> None:
    """With and without a slash at its end, however a proxy passes it on."""
    for path in ("/llm", "/llm/", "/"):
        await page.goto(path)
        await expect(page.get_by_label("Model")).to_have_value("demo")


async def test_swagger_ui_shows_every_api_and_tries_one_out(page: Page) -> None:
    await page.goto("/llm/docs")
    for api in ("OpenAI", "TGI", "Ollama", "Anthropic", "Server"):
        await expect(page.locator(f"#operations-tag-{api}")).to_be_visible()
    version = page.locator("#operations-Server-get_version")
    await version.get_by_role("button").first.click()
    await version.get_by_role("button", name="Execute").click()
    await expect(version.locator(".request-url")).to_contain_text("/llm/version")
    await expect(version.locator(".live-responses-table")).to_contain_text('"version"')
    await expect(version.locator(".live-responses-table")).to_contain_text("200")
