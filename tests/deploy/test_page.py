"""The page in a real browser: Debian's Chromium without a window."""

import json
import re
import shutil
import urllib.parse

import pytest

from deploy.schema import Arguments
from deploy.security import hash_key
from tests.endpoint import over_http, running_endpoint

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page is not tested: playwright is missing; `make soak-deps` installs it"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.soak,
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="the page is not tested: no Chromium; `make soak-deps` installs it"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def url():
    with running_endpoint({"max_images": 16, "max_steps": 16}) as endpoint:
        yield endpoint.url


@pytest.fixture
def open_page(browser, url):
    """Opens the page, and sees in the end that nothing came from elsewhere and nothing complained."""
    contexts, requests, complaints = [], [], []

    def start(address=url, path="/", **options):
        context = browser.new_context(viewport={"width": 1200, "height": 850}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address + path)
        return page

    yield start
    for context in contexts:
        context.close()
    hosts = {urllib.parse.urlsplit(request).hostname for request in requests if not request.startswith("data:")}
    assert hosts == {"127.0.0.1"}
    # Chromium writes a line for each answer that is no success, or fails; those are what some tests are about.
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []


def choose(page, text):
    page.fill("#class", text)
    page.wait_for_selector("#class-list li[role=option]")
    page.keyboard.press("Enter")


def natural_sizes(page, selector):
    return page.eval_on_selector_all(
        selector, "images => images.map(image => [image.naturalWidth, image.naturalHeight])"
    )


def test_a_click_leads_to_images(open_page):
    page = open_page()
    page.wait_for_selector("text=64 × 64")
    choose(page, "star")
    page.fill("#seed", "7")
    page.click("#go")
    page.wait_for_selector(".result")
    assert natural_sizes(page, ".result img") == [[64, 64]] * 4
    assert page.inner_text(".result figcaption >> nth=3") == "seed 10"
    timing = page.inner_text(".timing")
    assert re.search(r"\d+ ms here and back, .* queue .* network .* decoder .* encoding", timing)
    assert "class=star" in page.url
    page.click(".result figure button >> nth=1")
    assert page.is_visible("#viewer")
    assert natural_sizes(page, "#viewer-image") == [[64, 64]]
    page.click("#viewer-use")
    assert page.input_value("#seed") == "8"


def test_a_class_is_found_by_typing_and_chosen_by_the_keyboard(open_page):
    page = open_page()
    page.wait_for_selector("text=64 × 64")
    page.focus("#class")
    page.keyboard.type("ar")
    page.wait_for_selector("#class-list li")
    names = page.eval_on_selector_all("#class-list li span:first-child", "spans => spans.map(span => span.textContent)")
    assert names == ["arrow", "heart", "square", "star"]
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    active = page.get_attribute("#class", "aria-activedescendant")
    assert page.inner_text(f"#{active} span >> nth=0") == "star"
    page.keyboard.press("Enter")
    assert page.input_value("#class") == "star"
    assert page.get_attribute("#class", "aria-expanded") == "false"
    page.keyboard.press("Enter")  # and again sends the form
    page.wait_for_selector(".result img")
    choose(page, "d0000003")
    assert page.input_value("#class") == "cross"
    page.fill("#class", "zebra")
    assert page.inner_text("#class-list") == "no class is called that"
    page.keyboard.press("Escape")
    assert page.is_hidden("#class-list")


def test_steps_stand_side_by_side_with_their_times(open_page):
    page = open_page(path="/#mode=steps&class=star&seed=7")
    page.wait_for_selector("text=64 × 64")
    page.click("#go")
    page.wait_for_selector(".result")
    captions = page.eval_on_selector_all(".result figcaption", "all => all.map(one => one.textContent)")
    assert [re.fullmatch(r"(\d) steps? · [\d.]+ m?s", caption)[1] for caption in captions] == ["1", "2", "4"]
    sources = page.eval_on_selector_all(".result img", "images => images.map(image => image.src)")
    assert len(set(sources)) == 3


def test_a_strip_leads_from_one_seed_to_another(open_page):
    page = open_page()
    page.wait_for_selector("text=64 × 64")
    page.click("#tab-interpolate")
    choose(page, "star")
    page.fill("#seed", "1")
    page.fill("#seed-end", "2")
    page.fill("#count", "5")
    page.click("#go")
    page.wait_for_selector(".strip")
    assert natural_sizes(page, ".strip img") == [[64, 64]] * 5
    strip = page.eval_on_selector_all(".strip img", "images => images.map(image => image.src)")
    page.focus(".scrub input")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.get_attribute(".scrub img", "src") == strip[3]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("seed", "-1", "greater than or equal to 0"),
        ("seed", "seven", "valid integer"),
        ("class", "unicorn", "unknown class 'unicorn'"),
        ("count", "17", "at most 16 here"),
        ("steps", "0", "greater than or equal to 1"),
    ],
)
def test_a_bad_input_leads_to_a_message_beside_its_field_and_the_page_goes_on(open_page, field, value, words):
    page = open_page(path="/#class=star&seed=7&n=1")
    page.wait_for_selector("text=64 × 64")
    good = page.input_value(f"#{field}")
    page.fill(f"#{field}", value)
    page.click("#go")
    page.wait_for_selector(f"#{field}[aria-invalid=true]")
    assert words in page.inner_text(f"#{field}-problem")
    assert page.get_attribute(f"#{field}", "aria-describedby") == f"{field}-problem"
    page.fill(f"#{field}", good)
    assert page.inner_text(f"#{field}-problem") == ""
    page.click("#go")
    page.wait_for_selector(".result img")


def test_no_class_no_server_and_a_full_one_are_told(open_page):
    page = open_page()
    page.wait_for_selector("text=64 × 64")
    page.click("#go")
    assert page.inner_text("#class-problem") == "Choose a class first."
    choose(page, "star")
    answers = [
        {
            "status": 429,
            "headers": {"retry-after": "1"},
            "body": json.dumps({"error": {"message": "full", "param": None}}),
        }
    ]
    page.route(
        "**/v1/images/generations", lambda route: route.fulfill(**answers.pop()) if answers else route.continue_()
    )
    page.click("#go")
    page.wait_for_selector("text=full. Trying again in 1 s.")
    page.wait_for_selector(".result img")  # by itself
    page.unroute("**/v1/images/generations")
    page.route("**/v1/images/generations", lambda route: route.abort())
    page.click("#go")
    page.wait_for_selector("text=cannot be reached")
    page.unroute("**/v1/images/generations")


def test_a_locked_endpoint_asks_for_its_key(open_page, guided_folder):
    arguments = Arguments(model=str(guided_folder), api_keys={"me": hash_key("the-key")})
    with over_http(arguments) as address:
        page = open_page(address)
        page.wait_for_selector("text=wants an API key")
        page.fill("#class", "star")
        page.fill("#key", "wrong")
        page.click("#go")
        page.wait_for_selector("text=not known here")
        page.fill("#key", "the-key")
        page.click("#go")
        page.wait_for_selector(".result img")
        assert page.is_hidden("#key-field")
        assert page.input_value("#guidance-scale") == "1"  # this model takes guidance, and says which is its own
        page.fill("#guidance-scale", "0.5")
        page.click("#go")
        page.wait_for_selector("#guidance-scale[aria-invalid=true]")
        page.context.close()


def test_the_page_fits_a_phone_and_the_dark(open_page, tmp_path):
    page = open_page(path="/#class=star&seed=7&n=8", device_scale_factor=1)
    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_selector("text=64 × 64")
    page.click("#go")
    page.wait_for_selector(".result img")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = open_page(color_scheme="dark")
    assert dark.evaluate("getComputedStyle(document.body).backgroundColor") != light


def test_snippets_ask_for_what_the_form_says(open_page, url):
    page = open_page(path="/#class=star&seed=7&n=2&steps=4")
    page.wait_for_selector("text=64 × 64")
    page.click("#code summary")
    curl = page.inner_text("#curl")
    assert f"{url}/v1/images/generations" in curl
    body = json.loads(re.search(r"-d '(.*)'", curl, re.DOTALL)[1])
    assert body == {"prompt": "star", "n": 2, "seed": 7, "num_inference_steps": 4}
    python = page.inner_text("#python")
    compile(python, "snippet", "exec")
    assert f'base_url="{url}/v1"' in python


def test_the_interface_page_works_without_other_hosts(open_page):
    page = open_page(path="/docs")
    page.wait_for_selector(".opblock-post")
    assert "/v1/images/generations" in page.inner_text(".opblock-post >> nth=0")
