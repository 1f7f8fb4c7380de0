"""Tests the endpoint's web page in a real browser, with a running endpoint."""

import functools
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from deploy.settings import Arguments
from pipelines.demo.serving import free_port
from tests.support.api import KEY_HASHES, KEYS
from tests.support.endpoint import over_http, running_endpoint
from tests.support.readme import text_of

REMEDY = "run make soak-deps"
sync_api = pytest.importorskip("playwright.sync_api", reason=f"playwright is missing; {REMEDY}")
expect = sync_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.soak,
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason=f"neither chromium nor chromium-browser is on PATH; {REMEDY}"),
]


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, *_):
        pass


WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 360, "height": 740}
# Chromium logs every failed request, including those that the page handles.
FAILED_REQUEST = re.compile(
    r"Failed to load resource: (the server responded with a status of [45]\d\d|net::ERR_FAILED)"
)
PIXELS = """async (image) => {
  const context = new OffscreenCanvas(64, 64).getContext("2d");
  context.drawImage(await createImageBitmap(image), 0, 0);
  return Array.from(context.getImageData(0, 0, 64, 64).data);
}"""


@pytest.fixture(scope="module")
def page_url():
    # Small batches, so that many images come in several.
    with running_endpoint({"max_batch_size": 4}) as endpoint:
        yield f"{endpoint.url.rstrip('/')}/"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, page_url):
    """A function that opens the page in a new browser context.

    At teardown, checks that the page contacted no other host and logged no error.
    """
    contexts, urls, console = [], [], []

    def open_it(fragment="", *, address=None, before=None, viewport=WIDE, **options):
        contexts.append(browser.new_context(viewport=viewport, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: urls.append(request.url))
        page.on("console", lambda line: console.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: console.append(str(error)))
        if before:
            before(page)
        page.goto((address or page_url) + fragment)
        return page

    yield open_it
    for context in contexts:
        context.close()
    hosts = {urlsplit(url).hostname for url in urls if urlsplit(url).scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}
    assert [text for text in console if not FAILED_REQUEST.match(text)] == []


@pytest.fixture
def page(open_page):
    page = open_page()
    expect(page.locator("#fact-model")).not_to_be_empty()
    return page


def generated(page):
    """Waits until generation has finished; returns the visible images."""
    expect(page.locator("#result .tile img").first).to_be_visible()
    expect(page.locator("#generate")).to_have_text("Generate")
    return page.locator("#result .tile img")


def natural_sizes(images):
    return images.evaluate_all(
        "images => Promise.all(images.map(image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])))"
    )


def refuse_once(page, path, status, code, message, retry_after):
    """Answers the next request for a path with an error. Later requests reach the endpoint."""
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    page.route(
        f"**/{path}",
        lambda route: route.fulfill(status=status, headers={"Retry-After": retry_after}, json={"error": error}),
        times=1,
    )


def test_clicking_generate_shows_images_and_their_timing(page, tmp_path):
    page.fill("#seed", "7.0")  # a whole number in another notation
    page.fill("#num-images", "3")
    page.click("#generate")
    images = generated(page)
    assert natural_sizes(images) == [[64, 64]] * 3
    expect(page.locator(".result-head")).to_contain_text("seeds 7 to 9")
    assert images.first.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"  # enlarged 3 times
    for name in ("queue", "model", "decode", "encode", "server", "round trip"):
        expect(page.locator(".timing")).to_have_text(re.compile(rf"{name} \d+(\.\d)? ms"))
    expect(page.locator("#status")).to_have_text(re.compile(r"3 images of .+ in .+ milliseconds"))
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_the_first_of_many_images_is_shown_before_the_last_is_made(page):
    page.fill("#num-images", "16")
    page.fill("#steps", "64")
    page.evaluate("""() => {
      window.seen = [];
      new MutationObserver(() => window.seen.push([
        document.querySelectorAll("#result .tile img").length,
        document.querySelectorAll("#result .unfinished").length,
        document.querySelectorAll("#result .arriving").length,
      ])).observe(document.querySelector("#result"), { childList: true, subtree: true });
    }""")
    page.click("#generate")
    assert natural_sizes(generated(page)) == [[64, 64]] * 16
    seen = page.evaluate("window.seen")
    print("shown, unfinished, empty:", seen)
    assert any(images < 16 and empty > 0 for images, _, empty in seen)  # some are shown, and others still to come
    assert any(unfinished > 0 for _, unfinished, _ in seen)
    expect(page.locator(".result-head")).to_contain_text("64 steps")


def test_typing_part_of_a_class_name_and_enter_selects_the_class(page):
    box = page.locator("#class")
    box.focus()  # selects the current text
    page.keyboard.type("angl")
    expect(box).to_have_attribute("aria-expanded", "true")
    expect(page.locator("#class-list [role=option]")).to_have_count(1)
    box.press("Enter")
    expect(box).to_have_value("triangle (9)")
    expect(box).to_have_attribute("aria-expanded", "false")
    box.press("Enter")
    assert generated(page).first.get_attribute("alt").startswith("triangle, seed ")


def test_arrow_keys_select_a_class_and_escape_closes_the_list(page):
    box = page.locator("#class")
    box.fill("s")
    rows = page.locator("#class-list [role=option]")
    expect(rows.nth(0)).to_contain_text("square")
    box.press("ArrowDown")
    assert box.get_attribute("aria-activedescendant") == rows.nth(1).get_attribute("id")
    box.press("Escape")
    expect(page.locator("#class-list")).to_be_hidden()
    box.press("ArrowDown")
    box.press("ArrowDown")
    box.press("Enter")
    expect(box).to_have_value("star (8)")


def test_step_counts_are_compared_side_by_side_with_their_timing(page):
    page.focus("#tab-generate")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-steps")).to_have_attribute("aria-selected", "true")
    page.fill("#seed", "7")
    page.keyboard.press("Enter")
    images = generated(page)
    assert natural_sizes(images) == [[64, 64]] * 3
    assert page.locator(".column h3").all_text_contents() == ["1 step", "2 steps", "4 steps"]
    for column in page.locator(".column").all():
        expect(column.locator(".figure.server")).to_have_text(re.compile(r"server \d+(\.\d)? ms"))
    assert len({box["y"] for box in (image.bounding_box() for image in images.all())}) == 1


def test_interpolation_shows_a_strip_and_a_slider(page):
    page.click("#tab-interpolate")
    page.fill("#seed", "7")
    page.fill("#seed-end", "9")
    page.fill("#num-frames", "5")
    page.click("#generate")
    generated(page)
    assert natural_sizes(page.locator("#strip img")) == [[64, 64]] * 5
    shown = page.locator(".stage figure:visible img")
    expect(page.locator("#scrub-value")).to_have_text("1 of 5 · weight 0.00")
    first = shown.get_attribute("src")
    page.focus("#scrub")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#scrub-value")).to_have_text("2 of 5 · weight 0.25")
    expect(shown).to_have_count(1)
    assert shown.get_attribute("src") != first


def test_invalid_seed_shows_an_error_next_to_its_field_and_can_be_corrected(page):
    page.fill("#seed", "-1")
    page.keyboard.press("Enter")
    error = page.locator("#seed-error")
    expect(error).to_be_visible()
    expect(error).to_have_attribute("role", "alert")
    expect(page.locator("#seed")).to_have_attribute("aria-invalid", "true")
    assert "seed-error" in page.get_attribute("#seed", "aria-describedby")
    expect(page.locator("#seed")).to_be_focused()
    page.fill("#seed", "1")
    page.keyboard.press("Enter")
    generated(page)
    expect(error).to_be_empty()
    assert page.get_attribute("#seed", "aria-invalid") is None


def test_comparing_without_a_step_count_shows_an_error_next_to_the_choices(page):
    page.click("#tab-steps")
    for steps in (1, 2, 4):
        page.uncheck(f"#compare-{steps}", force=True)
    page.click("#generate")
    expect(page.locator("#compare-error")).to_have_text("Choose at least one number of steps.")


def test_unknown_class_shows_an_error_next_to_its_field(page):
    page.fill("#class", "unicorn")
    page.keyboard.press("Enter")
    expect(page.locator("#class-error")).to_contain_text("unicorn")
    expect(page.locator("#class")).to_have_attribute("aria-invalid", "true")
    page.fill("#class", "heart")
    page.click("#generate")
    assert generated(page).first.get_attribute("alt").startswith("heart")


def test_a_seed_above_javascripts_largest_integer_is_sent_exactly(page):
    page.fill("#seed", str(2**62 - 1))
    page.fill("#num-images", "1")
    with page.expect_request("**/v1/images/generations") as sent:
        page.click("#generate")
    assert sent.value.post_data_json["seed"] == 2**62 - 1
    assert str(2**62 - 1) in generated(page).first.get_attribute("alt")


def test_a_link_reproduces_the_result(page, open_page):
    page.fill("#class", "ring")
    page.keyboard.press("Enter")
    page.fill("#num-images", "2")
    page.click("#generate")
    generated(page)
    fragment = f"#{urlsplit(page.url).fragment}"
    other = open_page(fragment)
    assert generated(other).count() == 2
    assert generated(other).nth(1).get_attribute("alt") == generated(page).nth(1).get_attribute("alt")
    ours, theirs = (generated(each).nth(1).evaluate(PIXELS) for each in (page, other))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1


def test_the_history_restores_an_earlier_result(page):
    page.fill("#num-images", "1")
    for seed in ("3", "4"):
        page.fill("#seed", seed)
        page.click("#generate")
        expect(page.locator(".result-head")).to_contain_text(f"seed {seed}")
    expect(page.locator("#history li")).to_have_count(1)
    page.click("#history button")
    expect(page.locator(".result-head")).to_contain_text("seed 3")
    expect(page.locator("#seed")).to_have_value("3")


def test_an_image_can_be_enlarged_and_downloaded(page):
    page.fill("#class", "star")
    page.keyboard.press("Enter")
    page.fill("#seed", "5")
    page.fill("#num-images", "2")
    page.click("#generate")
    generated(page)
    page.click("#result .tile >> nth=0")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#viewer-caption")).to_contain_text("seed 6")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "star-seed-6-steps-1.png"
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()


def test_a_request_to_a_busy_endpoint_is_retried_after_retry_after(page):
    refuse_once(page, "v1/images/generations", 429, "overloaded", "The queue is full.", "1")
    page.click("#generate")
    expect(page.locator("#form-error")).to_have_text("The queue is full. Trying again in 1 s.")
    generated(page)
    expect(page.locator("#problem")).to_be_hidden()


def test_page_opened_before_the_endpoint_is_ready_retries_and_generates_nothing(open_page):
    page = open_page(before=lambda page: refuse_once(page, "v1/models", 503, "not_ready", "The model is loading.", "1"))
    expect(page.locator("#form-error")).to_have_text("The model is loading. Trying again in 1 s.")
    expect(page.locator("#fact-model")).not_to_be_empty()
    expect(page.locator("#problem")).to_be_hidden()
    expect(page.locator("#result img")).to_have_count(0)


def test_a_broken_connection_is_reported_and_can_be_retried(page):
    page.route("**/v1/images/generations", lambda route: route.abort(), times=1)
    page.click("#generate")
    expect(page.locator("#form-error")).to_contain_text("cannot be reached")
    page.click("#retry")
    generated(page)


def test_the_page_asks_for_an_api_key_and_sends_it(open_page):
    error = {"message": "An API key is required.", "type": "auth", "param": None, "code": "invalid_api_key"}

    def guard(page):
        def answer(route):
            if route.request.headers.get("authorization") == "Bearer secret":
                route.continue_()
            else:
                route.fulfill(status=401, json={"error": error})

        page.route(re.compile("/(v1|classes|version)"), answer)

    page = open_page(before=guard)
    expect(page.locator("#api-key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#api-key-error")).to_contain_text("An API key is required.")
    page.fill("#api-key", "secret")
    page.keyboard.press("Enter")
    generated(page)


def test_guidance_and_previews_are_offered_only_if_the_model_supports_them(page, open_page):
    expect(page.locator("#guidance")).to_be_hidden()

    def guided(page):
        def answer(route):
            listed = route.fetch().json()
            listed["data"][0].update(supports_guidance=True, guidance_scale=1.5, has_previews=True)
            route.fulfill(json=listed)

        page.route("**/v1/models", answer)

    other = open_page(before=guided)
    expect(other.locator("#guidance-scale")).to_have_value("1.5")
    expect(other.locator("#preview")).to_be_visible()
    other.fill("#guidance-end", "0.7")
    with other.expect_request("**/v1/images/generations") as sent:
        other.click("#generate")
    body = sent.value.post_data_json
    assert (body["guidance_scale"], body["guidance_interval"]) == (1.5, [0, 0.7])


def test_the_code_snippets_contain_the_request(page, page_url):
    page.fill("#class", "star")
    page.keyboard.press("Enter")
    page.fill("#seed", "7")
    page.click("#snippets summary")
    code = page.locator("#snippet-code")
    expect(code).to_contain_text(f"curl {page_url}generate")
    expect(code).to_contain_text('"seed": 7')
    page.click("#tab-python")
    expect(code).to_contain_text(f'base_url="{page_url}v1"')
    compile(code.text_content(), "snippet", "exec")


@pytest.mark.parametrize("mode", ["generate", "steps", "interpolate"])
def test_a_phone_screen_does_not_scroll_sideways(open_page, mode):
    page = open_page(f"#mode={mode}&class=8&seed=7&to=9&n=5&frames=8", viewport=PHONE)
    generated(page)
    page.click("#snippets summary")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_a_dark_color_scheme_changes_the_colors(open_page):
    def brightness(scheme):
        page = open_page(color_scheme=scheme)
        style = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        return [sum(int(part) for part in re.findall(r"\d+", text)[:3]) for text in style]

    (light_paper, light_ink), (dark_paper, dark_ink) = brightness("light"), brightness("dark")
    assert light_paper > 600 > 200 > light_ink
    assert dark_paper < 200 < 600 < dark_ink


def test_guidance_works_on_an_endpoint_with_api_keys(open_page, guided_folder):
    arguments = Arguments(model=str(guided_folder), api_keys=KEY_HASHES)
    with over_http(arguments) as address:
        page = open_page(address=f"{address}/")
        expect(page.locator("#api-key")).to_be_focused()
        page.keyboard.type(KEYS["alice"])
        page.keyboard.press("Enter")
        expect(page.locator("#guidance-scale")).to_have_value("1")  # the model's own scale
        page.fill("#class", "star")
        page.keyboard.press("Enter")
        page.fill("#guidance-scale", "0.5")
        page.click("#generate")
        expect(page.locator("#guidance-scale-error")).to_have_text("A number from 1, please.")
        page.fill("#guidance-scale", "2.5")
        page.click("#generate")
        generated(page)
        page.context.close()


def test_the_docs_page_loads_nothing_from_other_hosts(open_page):
    page = open_page("docs")
    expect(page.locator(".opblock-post").first).to_contain_text("/v1/images/generations")


def test_the_documented_page_of_another_origin_shows_an_image(open_page, generator_folder, tmp_path):
    [example] = re.findall(r"```html\n(.*?)```", text_of("docs/how-to/serve.md"), flags=re.DOTALL)
    port = free_port(0)
    other = f"http://127.0.0.1:{port}"  # really served: Chromium lets no page of the internet call this machine
    arguments = Arguments(model=str(generator_folder), api_keys=KEY_HASHES, cors_origins=[other])
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with over_http(arguments) as address, ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page_text = example.replace("http://127.0.0.1:8000", address).replace("KEY", KEYS["alice"])
        (tmp_path / "index.html").write_text(f'<link rel="icon" href="data:,">{page_text}')
        lines = []
        page = open_page(
            address=f"{other}/", before=lambda page: page.on("console", lambda line: lines.append(line.text))
        )
        expect(page.locator("#picture")).to_have_attribute("src", re.compile("^blob:"))
        assert natural_sizes(page.locator("#picture")) == [[64, 64]]
        assert [line.split(";")[0] for line in lines] == ["queue"]
        page.context.close()
        server.shutdown()
