"""The Space in a real browser: moved, typed into, stopped, compared, reloaded, in both themes, on a desktop and on a phone; and under load."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_server.state import Fault

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
    return Desk(Chain.from_pretrained(shown), Limits(download=True, new_tokens=64, prompt_tokens=192))


@contextmanager
def open_to_visitors(desk):
    from cbd_hub.space.page import build_page, launch
    page = build_page(desk)
    _, address, _ = launch(page, host="127.0.0.1", block=False)
    yield address
    page.close()


@pytest.fixture(scope="module")
def served(desk):
    with open_to_visitors(desk) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
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
        page.wait_for_selector("#cbd-plot .mark-symbol")
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


def hovered(page, desk):
    """What the curve says under the pointer, at its first measured size in between."""
    point = next(point for point in desk.picker.points if point.strategy != "anchor")
    place = desk.picker.points.index(point)
    box = page.locator("#cbd-plot .pointed_marks path").nth(place).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 - 3, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    shows(page, "#vg-tooltip-element", f"{point.size:,}")
    return page.locator("#vg-tooltip-element").text_content()


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
    assert "± " in hovered(page, desk)
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
    shows(page, "#cbd-note", "stopped")
    page.wait_for_timeout(2500)
    assert page.locator("#cbd-note").inner_text().endswith("stopped")
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
    field(page, "prompt").fill("too long " * 40)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("tokens, more than").wait_for()
    page.get_by_role("tab", name="Side by side").click()
    pick(page, 2, "900B")
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("is outside the chain").wait_for()


def pick(page, place, size):
    chosen = page.locator(f"#cbd-size-{place} input")
    chosen.fill(size)
    chosen.press("Enter")
    chosen.press("Tab")


def test_sizes_side_by_side_a_chat_and_the_python_lines(view, desk):
    page = view()
    page.get_by_role("tab", name="Side by side").click()
    between = desk.picker.size((desk.chain.anchors[1].parameters + desk.chain.anchors[2].parameters) // 2)
    pick(page, 2, str(between))
    page.get_by_role("button", name="Compare").click()
    for place in (1, 2, 3):
        shows(page, f"#cbd-side-note-{place}", "perplexity")
        shows(page, f"#cbd-side-note-{place}", "of weights")
        assert field(page, f"side-{place}").input_value()
    assert {desk.picker.smallest, between, desk.picker.largest} <= set(desk.models.sizes)
    page.get_by_role("tab", name="Chat").click()
    field(page, "message").fill("which size?")
    page.get_by_role("button", name="Send").click()
    page.locator("#cbd-chat").get_by_text("which size?").wait_for()
    page.get_by_role("tab", name="In Python").click()
    shows(page, "#cbd-code", "CBDModel.from_chain")
    page.get_by_role("button", name="Prepare the checkpoint").click()
    shows(page, "#cbd-pack-note", "is ready")
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


def test_a_chain_that_cannot_be_reached_has_a_page_that_says_so(browser):
    from cbd_hub.space.page import launch, message_page
    page = message_page("org/<b>none</b> is no repo on the Hub; check the name")
    _, address, _ = launch(page, host="127.0.0.1", block=False)
    seen = browser.new_page(viewport=VIEWS["phone"])
    seen.goto(address)
    seen.get_by_text("org/<b>none</b> is no repo").wait_for(timeout=PATIENCE)
    looked_at(seen, "unreachable")
    seen.close()
    page.close()


@pytest.mark.slow
def test_a_full_queue_is_a_polite_refusal_and_who_waits_and_stops_is_not_served(browser, shown, monkeypatch):
    desk, seeds, step = Desk(Chain.from_pretrained(shown), Limits(waiting=1)), set(), Writer.step
    monkeypatch.setattr(Writer, "step", lambda writer: (seeds.add(writer.sampling.seed), time.sleep(0.2), step(writer)))
    with open_to_visitors(desk) as address:
        pages = [browser.new_context(viewport=VIEWS["desktop"]).new_page() for _ in range(3)]
        for seed, page in enumerate(pages):
            page.goto(address)
            page.get_by_role("button", name="How tokens are drawn").click()
            page.get_by_label("Seed").fill(str(seed))
            page.keyboard.press("Tab")
        for page, says in zip(pages, ("token", "queue", "")):
            page.get_by_role("button", name="Generate").click()
            shows(page, "#cbd-note", says)
        pages[2].get_by_text("This application is currently busy. Please try again.").wait_for(timeout=PATIENCE)
        pages[2].screenshot(path=ARTEFACTS / "busy.png")
        pages[1].screenshot(path=ARTEFACTS / "waiting.png")
        pages[1].get_by_role("button", name="Stop").first.click()
        pages[1].wait_for_timeout(500)
        pages[0].get_by_role("button", name="Stop").first.click()
        pages[0].wait_for_timeout(1500)
        assert seeds == {0}
        pages[2].get_by_role("button", name="Generate").click()
        shows(pages[2], "#cbd-note", "token")
        pages[2].close()
        _until(lambda: not any(entry.users for entry in desk.models._held.values()))


def _until(holds, seconds=20.0):
    """Who closes the page frees the worker too."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_chain_on_the_hub_is_shown_fetched_and_used(hub, shown, browser, tmp_path):
    Chain.from_pretrained(shown).push_to_hub("org/tiny")
    desk = Desk(Chain.from_pretrained("org/tiny", cache_dir=tmp_path / "cache"))
    with open_to_visitors(desk) as address:
        page = browser.new_page(viewport=VIEWS["desktop"])
        page.goto(address)
        shows(page, ".cbd-head", "org/tiny")
        shows(page, ".cbd-facts dl", "Download")
        assert not any(path.suffix == ".safetensors" for path in (tmp_path / "cache").rglob("models--org--tiny-*/**/*")), "no weight is fetched to look at it"
        page.get_by_role("button", name="Generate").click()
        shows(page, "#cbd-note", "of weights")
        page.get_by_role("tab", name="In Python").click()
        shows(page, "#cbd-code", f'revision="{desk.chain.files.revision}"')
        looked_at(page, "hub")
        hub.faults.append(Fault(match="resolve", status=404, times=1000))
        page.get_by_role("tab", name="Try it").click()
        page.get_by_role("button", name=f"{desk.chain.anchors[-1].name}, anchor").click()
        shows(page, ".cbd-facts h2", desk.chain.anchors[-1].name)
        page.get_by_role("button", name="Generate").click()
        shows(page, "#cbd-note", "the Hub cannot be reached")


@pytest.mark.slow
def test_twenty_visitors_for_two_minutes(shown):
    """No error but the polite one, memory bounded, and who stops frees the worker within a second: with room for 12 to wait and for two models of three."""
    chain = Chain.from_pretrained(shown)
    desk = Desk(chain, Limits(waiting=12, memory=4 * (chain.anchors[0].parameters + chain.anchors[1].parameters)))
    with open_to_visitors(desk) as served:
        _visited(desk, served)


def _visited(desk, served):
    seconds = float(os.environ.get("CBD_LOAD_SECONDS", "120"))
    started, peak, held, stepped, step = process_bytes(), 0, 0, {}, Writer.step
    sizes = [snap.name for snap in desk.picker.snaps if snap.kind == "anchor"] + [str(desk.picker.size((desk.picker.smallest + desk.picker.largest) // 2))]

    def watched(writer):
        stepped[str(writer.sampling.seed)] = time.monotonic()
        time.sleep(0.004)
        step(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "step", watched)
        with subprocess.Popen(
            [sys.executable, Path(__file__).with_name("run_visitors.py"), served, str(seconds), ",".join(sizes)], stdout=subprocess.PIPE, text=True
        ) as visitors:
            while visitors.poll() is None:
                peak, held = max(peak, process_bytes()), max(held, desk.models.bytes)
                time.sleep(0.1)
            found = json.loads(visitors.stdout.read())
    freed = [max(stepped.get(seed, 0.0) - asked, 0.0) for seed, asked in found["stopped"].items()]
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    (ARTEFACTS / "load.txt").write_text(
        f"{found['tally']} in {seconds:.0f} s; a turn took {found['turns'][len(found['turns']) // 2]:.1f} s at the middle and {found['turns'][-1]:.1f} s at most, "
        f"a look at a size {found['glances'][-1]:.2f} s at most; freed within {max(freed):.2f} s; {(peak - started) / 1e6:.0f} MB more at most\n"
    )
    assert not found["wrong"]
    assert found["tally"]["done"] > 20
    assert min(found["tally"].values()) > 5
    assert max(freed) < 1.0
    assert peak - started < 500e6
    assert held <= desk.limits.memory
    assert not any(entry.users for entry in desk.models._held.values())
