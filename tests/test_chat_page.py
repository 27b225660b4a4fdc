import importlib.util
import json
import shutil

import httpx2
import pytest

from tests.serving import ENDLESS, NAME, STOP, serve, until, write_model

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("Chromium or playwright is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = write_model(tmp_path_factory.mktemp("model"))
    # The page leaves sampling to the server; the likeliest answer is one that can be compared.
    usual = {"temperature": 0, "eos_token_id": sorted(STOP)}
    (directory / "generation_config.json").write_text(json.dumps(usual))
    return directory


@pytest.fixture(scope="module")
def served(directory):
    with serve(directory, context=256) as served:
        yield served


@pytest.fixture
def page(browser):
    """A page whose errors fail the test."""
    context = browser.new_context()
    page = context.new_page()
    wrong = []
    # A browser tells of every answer that is an error, however well it is dealt with.
    told = "Failed to load resource"
    page.on("console", lambda said: said.text.startswith(told) or wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    assert wrong == []
    context.close()


def with_fields(**fields):
    """Adds fields to what the page asks."""

    def change(route):
        route.continue_(post_data=json.dumps(route.request.post_data_json | fields))

    return change


def ask(served, messages, **fields):
    body = {"model": NAME, "messages": messages} | fields
    answer = httpx2.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
    return answer.json()["choices"][0]["message"]["content"]


def test_an_answer_is_that_of_the_api(page, served):
    page.route("**/v1/chat/completions", with_fields(max_tokens=40))
    page.goto(served.url)
    page.get_by_role("heading", name=NAME).wait_for()
    said = []
    for question in ("Hi", "2 < 3 & <b>bold</b>"):
        page.get_by_label("Message").fill(question)
        page.get_by_label("Message").press("Enter")
        page.get_by_role("button", name="Send").and_(page.locator(":enabled")).wait_for()
        said.append({"role": "user", "content": question})
        said.append({"role": "assistant", "content": ask(served, said, max_tokens=40)})
    shown = page.locator("article p").all()
    assert [each.text_content() for each in shown] == [each["content"] for each in said]


def test_a_message_that_failed_can_be_sent_again(page, served):
    asked = []

    def refuse(route):
        asked.append(route.request.post_data_json["messages"])
        route.fulfill(status=429, json={"error": {"message": "the queue is full"}})

    page.route("**/v1/chat/completions", refuse)
    page.goto(served.url)
    page.get_by_role("heading", name=NAME).wait_for()
    for _ in range(2):
        page.get_by_label("Message").fill("Hi")
        page.get_by_label("Message").press("Enter")
        page.get_by_text("the queue is full").wait_for()
        page.get_by_role("button", name="Send").and_(page.locator(":enabled")).wait_for()
        assert page.get_by_label("Message").input_value() == "Hi"
    assert asked == [[{"role": "user", "content": "Hi"}]] * 2


def test_an_answer_can_be_stopped(page, directory):
    with serve(directory) as served:
        page.goto(served.url)
        page.route("**/v1/chat/completions", with_fields(**ENDLESS))
        page.get_by_label("Message").fill("Hi")
        page.get_by_role("button", name="Send").click()
        page.locator("article.assistant p").wait_for()
        until(lambda: served.metric("glm5_running") == 1)
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()
        until(lambda: served.metric("glm5_running") == 0)
        assert page.locator("article.assistant p").text_content()
        page.get_by_role("button", name="New chat").click()
        assert page.locator("article").count() == 0
        assert page.get_by_role("button", name="Stop").is_disabled()


def test_reasoning_is_folded(page, served):
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    page.route("**/v1/chat/completions", with_fields(max_tokens=40, **thinking))
    page.goto(served.url)
    page.get_by_label("Message").fill("Hi")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("The answer was cut").wait_for()
    thoughts = page.locator("details p")
    assert not thoughts.is_visible()
    page.get_by_text("Reasoning").click()
    assert thoughts.is_visible() and thoughts.text_content()


def test_the_page_asks_for_a_key_and_keeps_it(browser, directory):
    with serve(directory, key="secret") as served:
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.url)
        page.get_by_text("The API key is missing or wrong", exact=False).wait_for()
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").press("Tab")
        page.get_by_role("heading", name=NAME).wait_for()
        page.reload()
        page.get_by_role("heading", name=NAME).wait_for()
        context.close()


def test_nothing_foreign_runs_in_the_page(served):
    response = httpx2.get(served.url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "http://" not in response.text and "https://" not in response.text
    assert "innerHTML" not in response.text
