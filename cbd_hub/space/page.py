"""The page: what `Desk` does, in Gradio."""

from __future__ import annotations

import functools
import inspect
import shutil
import tempfile
from collections.abc import Callable, Iterator
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import api

from cbd_hub.errors import CBDError
from cbd_hub.sizes import format_size
from cbd_hub.space import render
from cbd_hub.space.desk import Desk, Written
from cbd_hub.space.facts import BYTES
from cbd_hub.space.figure import curve_figure
from cbd_hub.space.writing import Sampling


PROMPT = "The history of the city begins"
TEXT = (
    "The river rises in the hills to the north and flows past the old town, where a stone bridge was built in the twelfth century. "
    "For many years the bridge was the only crossing, and the market that grew beside it made the town rich."
)
_ONE_AT_A_TIME = "models"
# Marks set the slider through its number field, as typing would.
_MARKS_JS = """
element.addEventListener('click', event => {
  const mark = event.target.closest('[data-value]');
  const field = document.querySelector('#cbd-slider input[type=number]');
  if (!mark || !field) return;
  Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(field, mark.dataset.value);
  field.dispatchEvent(new Event('input', {bubbles: true}));
  field.dispatchEvent(new Event('blur', {bubbles: true}));
});
"""
_LINK_JS = """(size, prompt) => {
  const link = new URL(window.location.href);
  link.searchParams.set('size', size);
  link.searchParams.set('prompt', prompt || '');
  window.history.replaceState(window.history.state, '', link);
  return link.href;
}"""
# Gradio's own colours of buttons miss the contrast of 4.5 that people with weak sight need.
_CONTRAST = {
    "button_primary_background_fill": "*primary_600", "button_primary_background_fill_hover": "*primary_700", "button_primary_background_fill_dark": "*primary_600",
    "button_cancel_background_fill": "#b91c1c", "button_cancel_background_fill_hover": "#991b1b", "button_cancel_background_fill_dark": "#b91c1c",
    "body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300", "block_label_text_color": "*neutral_600", "block_title_text_color": "*neutral_700",
}
_HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1"><script>document.documentElement.lang = "en"</script>'


def polite(act: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose refusals are shown to the visitor as a message."""
    if inspect.isgeneratorfunction(act):
        @functools.wraps(act)
        def stream(*arguments: Any, **named: Any) -> Iterator[Any]:
            try:
                yield from act(*arguments, **named)
            except CBDError as error:
                raise gr.Error(str(error), title="Not done", print_exception=False) from None
        return stream

    @functools.wraps(act)
    def once(*arguments: Any, **named: Any) -> Any:
        try:
            return act(*arguments, **named)
        except CBDError as error:
            raise gr.Error(str(error), title="Not done", print_exception=False) from None
    return once


def build_page(desk: Desk) -> gr.Blocks:
    """The page of a chain."""
    return _Page(desk).build()


class _Page:
    """The page's handlers and parts."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.picker, self.scale = desk, desk.picker, desk.picker.scale
        self.dtype = str(desk.models.dtype).removeprefix("torch.")
        self.turn: dict[str, Any] = {"concurrency_id": _ONE_AT_A_TIME, "concurrency_limit": desk.limits.workers, "time_limit": desk.limits.seconds + 30}
        self.own: dict[str, Any] = {"api_visibility": "private"}

    # what the page's events call

    def shown(self, value: float) -> tuple[Any, ...]:
        """The size of a place of the slider: its numbers, the curve, the Python lines, and its name for links."""
        try:
            facts = self.picker.facts(self.picker.at(value))
        except CBDError as error:
            return render.refusal(error), gr.skip(), gr.skip(), gr.skip()
        return render.facts_card(facts, self.picker), curve_figure(self.picker, facts), self.picker.snippet(facts.parameters), str(facts.parameters)

    def budgeted(self, budget: str, dtype: str) -> tuple[Any, ...]:
        """The slider at the largest size that fits."""
        try:
            size = self.picker.fits(budget, dtype)
        except CBDError as error:
            return gr.skip(), render.refusal(error)
        return gr.update(value=self.scale.value(size)), f'<p class="cbd-status" role="status">The largest size that fits into {escape(budget.strip())} in {dtype}: <b>{format_size(size)}</b></p>'

    def opened(self, request: gr.Request) -> tuple[Any, ...]:
        """The page as a link has it."""
        size, prompt = self.desk.opened(dict(request.query_params))
        return (gr.update(value=self.scale.value(size)), prompt or PROMPT, *self.shown(self.scale.value(size)))

    def written(self, value: float, prompt: str, temperature: float, top_p: float, tokens: float, seed: float) -> Iterator[tuple[str, str]]:
        """A continuation with its state."""
        for state in self.desk.generate(self.picker.at(value), prompt, _sampling(temperature, top_p, tokens, seed)):
            yield prompt + state.text, render.status(state, self.dtype)

    def chatted(self, value: float, message: str, history: list[Any], temperature: float, top_p: float, tokens: float, seed: float) -> Iterator[tuple[Any, ...]]:
        """A chat with one more turn."""
        turns = [{"role": turn["role"], "content": _plain(turn["content"])} for turn in history] + [{"role": "user", "content": message}]
        for state in self.desk.chat(self.picker.at(value), turns, _sampling(temperature, top_p, tokens, seed)):
            yield [*turns, {"role": "assistant", "content": state.text or "…"}], "", render.status(state, self.dtype)

    def compared(
        self, first: str, second: str, third: str | None, prompt: str, text: str, temperature: float, top_p: float, tokens: float, seed: float
    ) -> Iterator[tuple[Any, ...]]:
        """Two or three sizes at the same time."""
        sizes = [self.picker.size(wish) for wish in (first, second, third) if wish]
        for states in self.desk.compare(sizes, prompt, _sampling(temperature, top_p, tokens, seed), text):
            by_size: dict[int, Written] = {state.size: state for state in states}
            texts, notes = [], []
            for wish in (first, second, third):
                state = by_size.get(self.picker.size(wish)) if wish else None
                texts.append("" if state is None else prompt + state.text if state.text else "")
                notes.append(render.status(state, self.dtype))
            yield (*texts, *notes)

    def packed(self, value: float) -> Any:
        """The checkpoint of a size, in Gradio's own folder of files to send."""
        with self.desk.checkpoint(self.picker.at(value)) as archive:
            kept = Path(tempfile.mkdtemp(prefix="cbd-", dir=self._cache())) / archive.name
            shutil.move(archive, kept)
        return gr.update(value=str(kept), visible=True, label=f"Download {kept.name}")

    def _cache(self) -> str:
        from gradio.utils import get_upload_folder
        Path(get_upload_folder()).mkdir(parents=True, exist_ok=True)
        return get_upload_folder()

    # what programs call: names and arguments of the API and of the MCP tools

    def register(self) -> None:
        """Register the functions for ``gradio_client`` and MCP."""
        desk = self.desk

        def sizes() -> dict[str, Any]:
            """List the chain's anchors and recommended sizes, with the measured curve."""
            return {
                "chain": desk.chain.name, "snaps": [vars(snap) for snap in desk.picker.snaps], "curve": [vars(point) for point in desk.picker.points],
                "chat": desk.chats, "new_tokens": desk.limits.new_tokens, "prompt_tokens": desk.limits.prompt_tokens,
            }

        def describe(size: str) -> dict[str, Any]:
            """Say what a size such as "117M" is: parameters, layers, bytes in memory and to download, expected loss. Loads nothing.

            Args:
                size: Parameters wanted, such as "117M", or "min" or "max".
            """
            return desk.picker.facts(size).data()

        def largest(memory: str, dtype: str = "float32") -> dict[str, Any]:
            """Find the largest size whose weights fit into a memory such as "512MB".

            Args:
                memory: Bytes, such as "512MB" or "1.5GiB".
                dtype: float32, bfloat16 or int8.
            """
            return desk.picker.facts(desk.picker.fits(memory, dtype)).data()

        def snippet(size: str) -> str:
            """Give the Python lines that make a size.

            Args:
                size: Parameters wanted, such as "117M".
            """
            return desk.picker.snippet(size)

        def generate(size: str, prompt: str, temperature: float = 0.0, top_p: float = 1.0, new_tokens: int = 64, seed: int = 0) -> Iterator[dict[str, Any]]:
            """Continue a prompt with a model of a size; streams, and the last answer holds tokens per second and memory.

            Args:
                size: Parameters wanted, such as "117M".
                prompt: Text to continue.
                temperature: 0 takes the likeliest token each time.
                top_p: Nucleus, 0.01 to 1.
                new_tokens: Most tokens to write.
                seed: Of the draws.
            """
            for state in desk.generate(size, prompt, _sampling(temperature, top_p, new_tokens, seed)):
                yield {**state.data(), "state": state.state}

        def chat(size: str, message: str, temperature: float = 0.0, top_p: float = 1.0, new_tokens: int = 64, seed: int = 0) -> Iterator[dict[str, Any]]:
            """Answer one message with a model of a size, where its tokenizer has a chat template; streams.

            Args:
                size: Parameters wanted, such as "117M".
                message: What the user says.
                temperature: 0 takes the likeliest token each time.
                top_p: Nucleus, 0.01 to 1.
                new_tokens: Most tokens to write.
                seed: Of the draws.
            """
            for state in desk.chat(size, [{"role": "user", "content": message}], _sampling(temperature, top_p, new_tokens, seed)):
                yield {**state.data(), "state": state.state}

        def compare(
            sizes: str, prompt: str, text: str = "", temperature: float = 0.0, top_p: float = 1.0, new_tokens: int = 64, seed: int = 0
        ) -> Iterator[list[dict[str, Any]]]:
            """Let two or three sizes answer one prompt, with speed and perplexity of a text; streams.

            Args:
                sizes: Two or three sizes with commas between them, such as "64M,99M,135M".
                prompt: Text to continue.
                text: Text whose perplexity is measured; none where empty.
                temperature: 0 takes the likeliest token each time.
                top_p: Nucleus, 0.01 to 1.
                new_tokens: Most tokens to write.
                seed: Of the draws.
            """
            wishes = [wish for wish in sizes.split(",") if wish.strip()]
            for states in desk.compare(wishes, prompt, _sampling(temperature, top_p, new_tokens, seed), text):
                yield [{**state.data(), "state": state.state} for state in states]

        glances: list[Callable[..., Any]] = [sizes, describe, largest, snippet]
        for glance in glances:
            api(polite(glance), api_name=glance.__name__, queue=False)
        works: list[Callable[..., Any]] = [generate, compare, *([chat] if desk.chats else [])]
        for work in works:
            api(polite(work), api_name=work.__name__, **self.turn)

    # the page

    def build(self) -> gr.Blocks:
        """Lay it out and join its parts to the handlers."""
        start = self.scale.value(self.desk.default)
        with gr.Blocks(title=f"{self.desk.chain.name}: pick a size", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.HTML(render.headline(self.picker), elem_classes="cbd-head")
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    self.slider = gr.Slider(
                        self.scale.low, self.scale.high, value=start, step=self.scale.step, label=f"Size ({self.scale.unit} parameters)", elem_id="cbd-slider",
                        buttons=[],
                    )
                    gr.HTML(render.marks(self.picker.snaps, self.scale), js_on_load=_MARKS_JS, elem_id="cbd-marks")
                    facts, figure, lines, exact = self.shown(start)
                    card = gr.HTML(facts)
                    with gr.Row(equal_height=True):
                        budget = gr.Textbox(label="Will it run in this memory?", placeholder="512MB", max_lines=1, scale=3, min_width=150, elem_id="cbd-budget")
                        dtype = gr.Dropdown(list(BYTES), value="bfloat16", label="Weights in", scale=2, min_width=120)
                        fit = gr.Button("Fit", scale=1, min_width=70)
                    fitted = gr.HTML(render.status(None))
                with gr.Column(scale=6, min_width=320):
                    gr.HTML("<h2>Size against quality</h2>", elem_classes="cbd-title")
                    plot = gr.Plot(figure, label="Loss over size", show_label=False, elem_id="cbd-plot")
                    with gr.Accordion("The same as a table", open=False):
                        gr.HTML(render.measured_table(self.picker.points))
            with gr.Tabs():
                with gr.Tab("Try it"):
                    self.prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, max_length=self.desk.limits.characters, elem_id="cbd-prompt")
                    write, stop_writing = self._buttons("Generate")
                    text = gr.Textbox(label="Continuation", lines=5, interactive=False, buttons=["copy"], elem_id="cbd-text")
                    note = gr.HTML(render.status(None), elem_id="cbd-note")
                chat = self._chat_tab() if self.desk.chats else None
                side = self._side_tab()
                with gr.Tab("In Python"):
                    code = gr.Code(lines, language="python", label="Python", interactive=False, buttons=["copy"], elem_id="cbd-code")
                    if self.desk.limits.download:
                        pack = gr.Button("Prepare the checkpoint")
                        got = gr.DownloadButton("Download", visible=False, elem_id="cbd-download")
                        pack.click(polite(self.packed), self.slider, got, **self.own, **self.turn)
            with gr.Accordion("How tokens are drawn", open=False):
                knobs = self._knobs()
            link = gr.Textbox(label="Link to this size and prompt", interactive=False, buttons=["copy"], max_lines=1, elem_id="cbd-link")
            exact_size = gr.Textbox(exact, visible=False)

            outputs = [card, plot, code, exact_size]
            glance: dict[str, Any] = {"queue": False, "show_progress": "hidden", **self.own}
            opening = page.load(self.opened, None, [self.slider, self.prompt, *outputs], **glance)
            opening.then(None, [exact_size, self.prompt], link, js=_LINK_JS, **glance)
            self.slider.change(self.shown, self.slider, outputs, trigger_mode="always_last", **glance)
            gr.on([fit.click, budget.submit, dtype.change], self.budgeted, [budget, dtype], [self.slider, fitted], **glance)
            gr.on([exact_size.change, self.prompt.change], None, [exact_size, self.prompt], link, js=_LINK_JS, **glance)
            self._run(polite(self.written), [self.slider, self.prompt, *knobs], [text, note], write, stop_writing, [self.prompt.submit])
            if chat is not None:
                talk, message, said, ask, stop, clear = chat
                self._run(polite(self.chatted), [self.slider, message, talk, *knobs], [talk, message, said], ask, stop, [message.submit])
                clear.click(lambda: ([], ""), None, [talk, message], **glance)
            self._run(polite(self.compared), [*side[0], side[1], side[2], *knobs], [*side[3], *side[4]], side[5], side[6], [])
            self.register()
        page.queue(max_size=self.desk.limits.waiting, default_concurrency_limit=self.desk.limits.workers)
        return page

    def _run(self, act: Any, inputs: list[Any], outputs: list[Any], button: gr.Button, stop: gr.Button, also: list[Any]) -> None:
        """Let a button start a turn, and another stop it."""
        event = gr.on([button.click, *also], act, inputs, outputs, show_progress="minimal", trigger_mode="once", **self.own, **self.turn)
        stop.click(None, None, None, cancels=[event], **self.own)

    @staticmethod
    def _buttons(name: str) -> tuple[gr.Button, gr.Button]:
        with gr.Row():
            start = gr.Button(name, variant="primary", scale=2, min_width=120)
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
        return start, stop

    def _knobs(self) -> list[Any]:
        most = self.desk.limits.new_tokens
        with gr.Row():
            return [
                gr.Slider(0, 2, value=0.7, step=0.05, label="Temperature", info="0 takes the likeliest token each time", min_width=200, buttons=[]),
                gr.Slider(0.05, 1, value=0.95, step=0.05, label="Top-p", min_width=200, buttons=[]),
                gr.Slider(1, most, value=min(64, most), step=1, label="Length (new tokens)", min_width=200, buttons=[]),
                gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120),
            ]

    def _chat_tab(self) -> tuple[Any, ...]:
        with gr.Tab("Chat"):
            talk = gr.Chatbot(label="Chat", height=320, elem_id="cbd-chat")
            message = gr.Textbox(label="Message", max_length=self.desk.limits.characters, elem_id="cbd-message")
            ask, stop = self._buttons("Send")
            clear = gr.Button("Clear", size="sm")
            return talk, message, gr.HTML(render.status(None)), ask, stop, clear

    def _side_tab(self) -> tuple[Any, ...]:
        names = [snap.name for snap in self.picker.snaps]
        picks = [names[0], names[-1]] if len(names) < 3 else [names[0], names[len(names) // 2], names[-1]]
        with gr.Tab("Side by side"):
            prompt = gr.Textbox(PROMPT, label="Prompt for all", lines=2, max_length=self.desk.limits.characters, elem_id="cbd-side-prompt")
            passage = gr.Textbox(TEXT, label="Text to measure: the perplexity of each size is shown below it", lines=2, max_length=self.desk.limits.characters)
            start, stop = self._buttons("Compare")
            sizes, texts, notes = [], [], []
            with gr.Row():
                for place in range(3):
                    with gr.Column(min_width=260):
                        value = picks[place] if place < len(picks) else ""
                        sizes.append(gr.Textbox(value, label=f"Size {place + 1}" + (", or empty" if place == 2 else ""), max_lines=1, elem_id=f"cbd-size-{place + 1}"))
                        texts.append(gr.Textbox(label=f"Continuation {place + 1}", lines=5, interactive=False, elem_id=f"cbd-side-{place + 1}"))
                        notes.append(gr.HTML(render.status(None), elem_id=f"cbd-side-note-{place + 1}"))
        return sizes, prompt, passage, texts, notes, start, stop


def _sampling(temperature: float, top_p: float, tokens: float, seed: float) -> Sampling:
    numbers = [0 if value is None else value for value in (tokens, seed)]
    whole = [int(value) if isinstance(value, float) and value.is_integer() else value for value in numbers]
    return Sampling(temperature, top_p, whole[0], whole[1])  # type: ignore[arg-type]


def _plain(content: Any) -> str:
    """A turn's text: the page sends blocks, programs send text."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)


def message_page(message: str) -> gr.Blocks:
    """A page that says why there is no other."""
    with gr.Blocks(title="Pick a size", analytics_enabled=False) as page:
        gr.HTML(f'<h1>This chain cannot be shown</h1><p role="alert">{escape(message)}</p><p>Restart the Space when this is mended.</p>')
    return page


def launch(page: gr.Blocks, *, host: str | None = None, port: int | None = None, mcp: bool = False, block: bool = True, **more: Any) -> Any:
    """Serve a page.

    Args:
        page: The page.
        host: Address to listen on.
        port: Port; None for the first free one from 7860 on.
        mcp: Whether programs may use it as an MCP server.
        block: Whether to wait until it is stopped.
        **more: What Gradio's ``launch`` takes.
    """
    return page.launch(
        server_name=host, server_port=port, mcp_server=mcp, prevent_thread_lock=not block, theme=gr.themes.Default(primary_hue="indigo").set(**_CONTRAST),
        css=files("cbd_hub.space").joinpath("page.css").read_text(), head=_HEAD, ssr_mode=False, max_file_size="1kb", show_error=True, enable_monitoring=False,
        footer_links=["api", "settings"], quiet=True, **more,
    )
