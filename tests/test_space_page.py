"""The Space in a real browser: moved, typed into, stopped, compared, reloaded, in both themes, on a desktop and on a phone; and under load."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from cbd_hub import Chain
from cbd_hub.space.desk import Desk, process_bytes
from cbd_hub.space.limits import Limits
from cbd_hub.space.writing import Writer


pytest.importorskip("gradio", reason="the Space's tests need gradio: pip install 'cbd-hub[dev]'")
playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright: pip install 'cbd-hub[dev]'")
BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARTEFACTS = Path(__file__).parent.parent / "artefacts" / "space"
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here; apt-get install chromium, or name one in CHROMIUM")
VIEWS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
PATIENCE = 60_000  # milliseconds on a machine that does much else


@pytest.fixture(scope="module")
def desk(shown):
    return Desk(Chain.from_pretrained(shown), Limits(download=True, new_tokens=64, prompt_tokens=200))


@pytest.fixture(scope="module")
def served(desk):
    from cbd_hub.space.page import build_page, launch
    page = build_page(desk)
    _, address, _ = launch(page, host="127.0.0.1", block=False)
    yield address
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def view(browser, served):
    """Opens the page; the console must stay clean."""
    contexts, complaints = [], []

    def show(kind="desktop", theme="light", query="", address=None):
        context = browser.new_context(viewport=VIEWS[kind], color_scheme=theme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address or f"{served}?__theme={theme}{query}")
        page.wait_for_selector("#cbd-plot .main-svg")
        page.wait_for_function("document.querySelector('#cbd-link textarea, #cbd-link input').value.includes('size=')")
        return page

    yield show
    for context in contexts:
        context.close()
    assert not complaints


def heading(page):
    return page.locator(".cbd-facts h2").inner_text()


def shows(page, selector, text):
    page.wait_for_function("([at, text]) => document.querySelector(at)?.textContent.includes(text)", arg=[selector, text])


def field(page, name):
    return page.locator(f"#cbd-{name} textarea, #cbd-{name} input[type=text]").first


def link(page, size):
    page.wait_for_function("size => document.querySelector('#cbd-link textarea, #cbd-link input').value.includes(`size=${size}&`)", arg=str(size))
    return field(page, "link").input_value()


def test_the_size_is_picked_by_slider_mark_and_budget_and_the_link_reopens_it(view, desk):
    page = view()
    assert desk.models.sizes == [], "the first view loads no model"
    slider = page.locator("#cbd-slider input[type=range]")
    slider.focus()
    page.keyboard.press("Home")
    smallest, largest = desk.chain.anchors[-1], desk.chain.anchors[0]
    shows(page, ".cbd-facts h2", smallest.name)
    shows(page, ".cbd-facts dl", f"{smallest.parameters:,}")
    page.get_by_role("button", name=f"{largest.name}, anchor").click()
    shows(page, ".cbd-facts h2", largest.name)
    shows(page, "#cbd-plot", f"your size: {largest.name}")
    budget = 2 * (desk.chain.anchors[1].parameters + 10)
    field(page, "budget").fill(f"{budget}B")
    page.keyboard.press("Enter")
    shows(page, ".cbd-facts dl", f"{desk.chain.anchors[1].parameters:,}")
    field(page, "budget").fill("3B")
    page.keyboard.press("Enter")
    page.get_by_text("hold no size of this chain").wait_for()
    field(page, "prompt").fill("one small & <b>model</b>")
    page.wait_for_function("document.querySelector('#cbd-link textarea, #cbd-link input').value.includes('small')")
    address = link(page, desk.chain.anchors[1].parameters)
    again = view(address=address)
    shows(again, ".cbd-facts h2", desk.chain.anchors[1].name)
    assert field(again, "prompt").input_value() == "one small & <b>model</b>"


def test_it_writes_stops_at_once_and_writes_again(view, desk, monkeypatch):
    page = view()
    page.get_by_role("button", name="Generate").click()
    shows(page, "#cbd-note", "tokens per second")
    shows(page, "#cbd-note", "of weights")
    assert len(field(page, "text").input_value()) > len(field(page, "prompt").input_value())
    steps, step = [], Writer.step
    monkeypatch.setattr(Writer, "step", lambda writer: (steps.append(time.monotonic()), time.sleep(0.15), step(writer)))
    page.get_by_role("button", name="Generate").click()
    while len(steps) < 8:
        page.wait_for_timeout(50)
    page.get_by_role("button", name="Stop").first.click()
    stopped = time.monotonic()
    page.wait_for_timeout(2500)
    assert max(steps) - stopped < 1.0
    assert len(steps) < 60
    assert not any(entry.users for entry in desk.models._held.values())
    monkeypatch.setattr(Writer, "step", step)
    page.get_by_role("button", name="Generate").click()
    shows(page, "#cbd-note", "tokens per second")


def test_a_refusal_is_a_message(view):
    page = view()
    field(page, "prompt").fill(" ")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("the prompt is empty").wait_for()


def test_sizes_side_by_side_a_chat_and_the_python_lines(view, desk):
    page = view()
    page.get_by_role("tab", name="Side by side").click()
    page.get_by_role("button", name="Compare").click()
    for place in (1, 2, 3):
        shows(page, f"#cbd-side-note-{place}", "perplexity")
        shows(page, f"#cbd-side-note-{place}", "of weights")
        assert field(page, f"side-{place}").input_value()
    page.get_by_role("tab", name="Chat").click()
    field(page, "message").fill("which size?")
    page.get_by_role("button", name="Send").click()
    page.locator("#cbd-chat").get_by_text("which size?").wait_for()
    page.get_by_role("tab", name="In Python").click()
    shows(page, "#cbd-code", "CBDModel.from_chain")
    page.get_by_role("button", name="Prepare the checkpoint").click()
    with page.expect_download() as found:
        page.locator("#cbd-download").click()
    assert found.value.suggested_filename.endswith(".zip")


def looked_at(page, name):
    """A view without sideways scrolling and without what axe-core calls serious; a picture of it is kept."""
    from axe_playwright_python.sync_playwright import Axe
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(400)
    page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    found = [rule for rule in Axe().run(page).response["violations"] if rule["impact"] in ("serious", "critical")]
    assert not found, [(rule["id"], [(node["html"][:160], node["failureSummary"][-200:]) for node in rule["nodes"][:4]]) for rule in found]


@pytest.mark.parametrize(("kind", "theme"), [("desktop", "light"), ("phone", "dark")])
def test_it_can_be_read_by_everybody(view, kind, theme):
    looked_at(view(kind, theme), f"{kind}-{theme}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_tab_can_be_read_by_everybody(view, kind, theme):
    page = view(kind, theme)
    page.get_by_role("button", name="The same as a table").click()
    page.get_by_role("button", name="How tokens are drawn").click()
    page.get_by_role("button", name="Generate").click()
    shows(page, "#cbd-note", "of weights")
    looked_at(page, f"{kind}-{theme}-try")
    for tab in ("Chat", "Side by side", "In Python"):
        if not page.get_by_role("tab", name=tab).first.is_visible():
            page.locator(".overflow-menu button").first.click()
            page.locator(".overflow-dropdown").get_by_text(tab).click()
        else:
            page.get_by_role("tab", name=tab).first.click()
        if tab == "Side by side":
            page.get_by_role("button", name="Compare").click()
            shows(page, "#cbd-side-note-3", "perplexity")
        looked_at(page, f"{kind}-{theme}-{tab.lower().replace(' ', '-')}")


@pytest.mark.slow
def test_twenty_visitors_for_two_minutes(desk, served):
    """No error but the polite one, memory bounded, and who stops frees the worker within a second."""
    from gradio_client import Client
    seconds = float(os.environ.get("CBD_LOAD_SECONDS", "120"))
    end, started = time.monotonic() + seconds, process_bytes()
    tally, wrong, stopped, stepped = {"done": 0, "busy": 0, "stopped": 0}, [], {}, {}
    sizes = [snap.name for snap in desk.picker.snaps if snap.kind == "anchor"] + [str(desk.default)]
    step = Writer.step

    def visitor(number):
        client, turn = Client(served, verbose=False, httpx_kwargs={"timeout": 60}), 0
        while time.monotonic() < end:
            turn += 1
            seed = 100 * turn + number
            try:
                job = client.submit(sizes[(number + turn) % len(sizes)], f"visitor {number} says", 0.8, 0.9, 48, seed, api_name="/generate")
                if number % 4 == 0:
                    while seed not in stepped and not job.done():
                        time.sleep(0.01)
                    stopped[seed] = time.monotonic()
                    job.cancel()
                    tally["stopped"] += 1
                else:
                    job.result(timeout=240)
                    tally["done"] += 1
                client.predict("max", api_name="/describe")
            except Exception as error:
                if "busy" in str(error).lower() or "queue is full" in str(error).lower():
                    tally["busy"] += 1
                    time.sleep(0.5)
                else:
                    wrong.append(repr(error)[:300])

    def watched(writer):
        stepped[writer.sampling.seed] = time.monotonic()
        time.sleep(0.004)
        step(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "step", watched)
        threads = [threading.Thread(target=visitor, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        peak = started
        while any(thread.is_alive() for thread in threads):
            peak = max(peak, process_bytes())
            time.sleep(0.2)
    freed = [max(stepped.get(seed, 0.0) - asked, 0.0) for seed, asked in stopped.items()]
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    (ARTEFACTS / "load.txt").write_text(f"{tally} in {seconds:.0f} s, freed within {max(freed):.2f} s, {(peak - started) / 1e6:.0f} MB more at most\n")
    assert not wrong
    assert tally["done"] > 20
    assert max(freed) < 1.0
    assert peak - started < 500e6
    assert not any(entry.users for entry in desk.models._held.values())
