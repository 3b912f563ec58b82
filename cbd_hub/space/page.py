"""The page: what `Desk` does, in Gradio."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.plot import PlotData

from cbd_hub.errors import ArgumentError, CBDError, one_line
from cbd_hub.sizes import format_bytes, format_size
from cbd_hub.space import render
from cbd_hub.space.archives import Archives
from cbd_hub.space.desk import Desk, Written
from cbd_hub.space.facts import BYTES
from cbd_hub.space.figure import as_json, curve_figure
from cbd_hub.space.programs import register, sampling_of, told


PROMPT = "The history of the city begins"
TEXT = (
    "The river rises in the hills to the north and flows past the old town, where a stone bridge was built in the twelfth century. "
    "For many years the bridge was the only crossing, and the market that grew beside it made the town rich."
)
_ONE_AT_A_TIME = "models"
_NOT_YET = "…"  # an answer without a word
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
# Who stops sees it at once, whatever was going on; a state of that turn that was still on its way changes nothing.
_STARTS_JS = "() => { window.FLAG = false; }"
_STOPS_JS = "(...notes) => { window.FLAG = true; return (STOPPED)(...notes); }"
_STOPPED_JS = """(...notes) => {
  const stopped = notes.map(note => !window.FLAG || !(note || '').includes('cbd-busy') ? note
    : note.includes('<progress') ? '<p class="cbd-status cbd-done" role="status">stopped</p>'
    : note.replace('cbd-busy', 'cbd-done').replace('</p>', ' · stopped</p>'));
  return stopped.length > 1 ? stopped : stopped[0];
}"""
# Gradio's own colours of buttons miss the contrast of 4.5 that people with weak sight need.
_CONTRAST = {
    "button_primary_background_fill": "*primary_600", "button_primary_background_fill_hover": "*primary_700", "button_primary_background_fill_dark": "*primary_600",
    "button_cancel_background_fill": "#b91c1c", "button_cancel_background_fill_hover": "#991b1b", "button_cancel_background_fill_dark": "#b91c1c",
    "body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300", "block_label_text_color": "*neutral_600", "block_title_text_color": "*neutral_700",
}
_HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1"><script>document.documentElement.lang = "en"</script>'


def build_page(desk: Desk) -> gr.Blocks:
    """The page of a chain."""
    return _Page(desk).build()


class _Page:
    """The page's handlers and parts."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.picker, self.scale = desk, desk.picker, desk.picker.scale
        self.dtype = str(desk.models.dtype).removeprefix("torch.")
        self.archives = Archives(desk, desk.limits.memory)
        self.turn: dict[str, Any] = {"concurrency_id": _ONE_AT_A_TIME, "concurrency_limit": desk.limits.workers, "time_limit": desk.limits.seconds + 30}
        self.own: dict[str, Any] = {"api_visibility": "private"}

    # what the page's events call

    def shown(self, value: float) -> tuple[Any, ...]:
        """The size of a place of the slider: its numbers, the curve, the Python lines, and its name for links."""
        try:
            return self._numbers(value)
        except CBDError as error:
            return render.refusal(str(error)), gr.skip(), gr.skip(), gr.skip()

    def _numbers(self, value: float) -> tuple[Any, ...]:
        facts = self.picker.facts(self.picker.at(value))
        curve = PlotData(type="altair", plot=as_json(curve_figure(self.picker, facts)))
        return render.facts_card(facts, self.picker), curve, self.picker.snippet(facts.parameters), str(facts.parameters)

    def budgeted(self, budget: str, dtype: str) -> tuple[Any, ...]:
        """The slider at the largest size that fits."""
        try:
            place = self.picker.place(self.picker.fits(budget, dtype))
            size = self.picker.at(place)
        except CBDError as error:
            return gr.skip(), render.refusal(str(error))
        fits = f"Yes, all of it: the largest anchor, <b>{format_size(size)}</b>" if size == self.picker.largest else f"The largest size that fits is <b>{format_size(size)}</b>"
        used = f"its weights take {format_bytes(size * BYTES[dtype])} of {escape(budget.strip())} in {dtype}"
        return gr.update(value=place), f'<p class="cbd-status" role="status">{fits}; {used}.</p>'

    def opened(self, request: gr.Request) -> tuple[Any, ...]:
        """The page as a link has it."""
        size, prompt = self.desk.opened(dict(request.query_params))
        place = self.picker.stand(size)
        return (gr.update(value=place), prompt or PROMPT, *self.shown(place))

    def written(self, value: float, prompt: str, temperature: float, top_p: float, tokens: float, seed: float) -> Iterator[tuple[str, str]]:
        """A continuation with its state."""
        for state in self.desk.generate(self.picker.at(value), prompt, sampling_of(temperature, top_p, tokens, seed)):
            yield prompt + state.text, render.status(state, self.dtype)

    def chatted(self, value: float, message: str, history: list[Any], temperature: float, top_p: float, tokens: float, seed: float) -> Iterator[tuple[Any, ...]]:
        """A chat with one more turn."""
        shown = [{"role": turn["role"], "content": _plain(turn["content"])} for turn in history] + [{"role": "user", "content": message}]
        turns: list[dict[str, str]] = []
        for turn in shown:
            if turn["role"] == "assistant" and turn["content"] in ("", _NOT_YET):
                turns.pop()  # stopped before a word: neither the question nor an answer was
            else:
                turns.append(turn)
        for state in self.desk.chat(self.picker.at(value), turns, sampling_of(temperature, top_p, tokens, seed)):
            yield [*shown, {"role": "assistant", "content": state.text or _NOT_YET}], "", render.status(state, self.dtype)

    def compared(
        self, first: str, second: str, third: str | None, prompt: str, text: str, temperature: float, top_p: float, tokens: float, seed: float
    ) -> Iterator[tuple[Any, ...]]:
        """Two or three sizes at the same time."""
        sizes = [self.picker.size(wish) for wish in (first, second, third) if wish]
        for states in self.desk.compare(sizes, prompt, sampling_of(temperature, top_p, tokens, seed), text):
            by_size: dict[int, Written] = {state.size: state for state in states}
            texts, notes = [], []
            for wish in (first, second, third):
                state = by_size.get(self.picker.size(wish)) if wish else None
                texts.append("" if state is None else prompt + state.text if state.text else "")
                notes.append(render.status(state, self.dtype))
            yield (*texts, *notes)

    def packed(self, value: float) -> Iterator[tuple[Any, str]]:
        """The checkpoint of a size, in Gradio's own folder of files to send."""
        from gradio.utils import get_upload_folder
        size = self.picker.at(value)
        yield gr.skip(), render.status(Written(size, format_size(size), note=f"making the checkpoint of {format_size(size)}"))
        folder = Path(get_upload_folder())
        folder.mkdir(parents=True, exist_ok=True)
        try:
            archive = self.archives.get(size, folder)
        except Exception as error:
            yield gr.skip(), render.refusal(told(error))
            return
        ready = f'<p class="cbd-status cbd-done" role="status">{escape(archive.name)} is ready: {format_bytes(archive.stat().st_size)}, in {self.dtype}</p>'
        yield gr.update(value=str(archive), visible=True, label=f"Download {archive.name}"), ready

    # the page

    def build(self) -> gr.Blocks:
        """Lay it out and join its parts to the handlers."""
        start = self.picker.stand(self.desk.default)
        facts, figure, lines, exact = self._numbers(start)
        with gr.Blocks(title=f"{self.picker.name}: pick a size", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.HTML(render.headline(self.picker), elem_classes="cbd-head")
            with gr.Group(elem_id="cbd-pick"):
                self.slider = gr.Slider(
                    self.scale.low, self.scale.high, value=start, step=self.scale.step, label=f"Size ({self.scale.unit} parameters)", elem_id="cbd-slider", buttons=[],
                )
                gr.HTML(render.marks(self.picker.snaps, self.scale), js_on_load=_MARKS_JS, elem_id="cbd-marks")
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    card = gr.HTML(facts, elem_id="cbd-card")
                    fit = self._budget()
                with gr.Column(scale=6, min_width=320):
                    gr.HTML("<h2>Size against quality</h2>", elem_classes="cbd-title")
                    plot = gr.Plot(figure, label="Loss over size", show_label=False, elem_id="cbd-plot")
                    with gr.Accordion("The same as a table", open=False):
                        gr.HTML(render.measured_table(self.picker))
            with gr.Tabs():
                try_it = self._try_tab()
                chat = self._chat_tab() if self.desk.chats else None
                side = self._side_tab()
                code, pack = self._python_tab(lines)
            with gr.Accordion("How tokens are drawn", open=False):
                knobs = self._knobs()
            link = gr.Textbox(label="Link to this size and prompt", interactive=False, buttons=["copy"], max_lines=1, elem_id="cbd-link")
            exact_size = gr.Textbox(exact, visible=False)

            outputs = [card, plot, code, exact_size]
            glance: dict[str, Any] = {"queue": False, "show_progress": "hidden", **self.own}
            opening = page.load(self.opened, None, [self.slider, self.prompt, *outputs], **glance)
            opening.then(None, [exact_size, self.prompt], link, js=_LINK_JS, **glance)
            self.slider.change(self.shown, self.slider, outputs, trigger_mode="always_last", **glance)
            gr.on([fit[2].click, fit[0].submit, fit[1].change], self.budgeted, [fit[0], fit[1]], [self.slider, fit[3]], **glance)
            gr.on([exact_size.change, self.prompt.change], None, [exact_size, self.prompt], link, js=_LINK_JS, **glance)
            text, note, write, stop = try_it
            self._run(self.written, [self.slider, self.prompt, *knobs], [text], [note], write, stop, [self.prompt.submit])
            if chat is not None:
                talk, message, note, ask, stop, clear = chat
                self._run(self.chatted, [self.slider, message, talk, *knobs], [talk, message], [note], ask, stop, [message.submit])
                clear.click(lambda: ([], "", render.status(None)), None, [talk, message, note], **glance)
            sizes, prompt, passage, texts, notes, start_all, stop = side
            self._run(self.compared, [*sizes, prompt, passage, *knobs], texts, notes, start_all, stop, [])
            if pack is not None:
                pack[0].click(self.packed, self.slider, [pack[1], pack[2]], show_progress="hidden", **self.own, **self.turn)
            register(self.desk, self.turn)
        page.queue(max_size=self.desk.limits.waiting, default_concurrency_limit=self.desk.limits.workers)
        return page

    def _run(self, act: Any, inputs: list[Any], outputs: list[Any], notes: list[Any], button: gr.Button, stop: gr.Button, also: list[Any]) -> None:
        """Let a button start a turn, and another stop it."""
        def turn(*arguments: Any) -> Iterator[Any]:
            try:
                yield from act(*arguments)
            except Exception as error:
                yield (*([gr.skip()] * len(outputs)), render.refusal(told(error)), *([render.status(None)] * (len(notes) - 1)))

        def js(source: str) -> dict[str, Any]:
            """What the browser does by itself; each turn of the page has a flag of its own there."""
            return {"js": source.replace("STOPPED", _STOPPED_JS).replace("FLAG", f"cbdStopped{stop._id}"), "queue": False, "show_progress": "hidden", **self.own}

        starts = [button.click, *also]
        gr.on(starts, None, None, None, **js(_STARTS_JS))
        event = gr.on(starts, turn, inputs, [*outputs, *notes], show_progress="minimal", show_progress_on=notes, trigger_mode="once", **self.own, **self.turn)
        stop.click(None, notes, notes, **js(_STOPS_JS))
        stop.click(lambda: None, None, None, cancels=[event], queue=False, show_progress="hidden", **self.own)
        gr.on([note.change for note in notes], None, notes, notes, **js(_STOPPED_JS))

    @staticmethod
    def _buttons(name: str) -> tuple[gr.Button, gr.Button]:
        with gr.Row():
            start = gr.Button(name, variant="primary", scale=2, min_width=120)
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
        return start, stop

    def _budget(self) -> tuple[Any, ...]:
        with gr.Row(equal_height=False, elem_id="cbd-fit"):
            budget = gr.Textbox(label="Will it run in", placeholder="512MB", max_lines=1, scale=3, min_width=130, elem_id="cbd-budget")
            dtype = gr.Dropdown([("fp32", "float32"), ("bf16", "bfloat16"), ("int8", "int8")], value="bfloat16", label="with weights in", scale=2, min_width=110)
            return budget, dtype, gr.Button("Set the size", scale=2, min_width=130, elem_id="cbd-fit-button"), gr.HTML(render.status(None), elem_id="cbd-fitted")

    def _knobs(self) -> list[Any]:
        most = self.desk.limits.new_tokens
        with gr.Row():
            return [
                gr.Slider(0, 2, value=0.7, step=0.05, label="Temperature (0: greedy)", min_width=200, buttons=[]),
                gr.Slider(0.05, 1, value=0.95, step=0.05, label="Top-p", min_width=200, buttons=[]),
                gr.Slider(1, most, value=min(64, most), step=1, label="Length (new tokens)", min_width=200, buttons=[]),
                gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120),
            ]

    def _try_tab(self) -> tuple[Any, ...]:
        with gr.Tab("Try it"):
            self.prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, max_length=self.desk.limits.characters, elem_id="cbd-prompt")
            write, stop = self._buttons("Generate")
            text = gr.Textbox(label="Continuation", lines=5, interactive=False, buttons=["copy"], elem_id="cbd-text")
            return text, gr.HTML(render.status(None), elem_id="cbd-note"), write, stop

    def _chat_tab(self) -> tuple[Any, ...]:
        with gr.Tab("Chat"):
            talk = gr.Chatbot(label="Chat", height=320, buttons=["copy", "copy_all"], elem_id="cbd-chat")
            message = gr.Textbox(label="Message", max_length=self.desk.limits.characters, elem_id="cbd-message")
            ask, stop = self._buttons("Send")
            note = gr.HTML(render.status(None), elem_id="cbd-chat-note")
            return talk, message, note, ask, stop, gr.Button("Clear the chat", size="sm")

    def _side_tab(self) -> tuple[Any, ...]:
        names = list(dict.fromkeys(snap.name for snap in self.picker.snaps))
        picks = [names[0], names[-1]] if len(names) < 3 else [names[0], names[len(names) // 2], names[-1]]
        with gr.Tab("Side by side"):
            prompt = gr.Textbox(PROMPT, label="Prompt for all", lines=2, max_length=self.desk.limits.characters, elem_id="cbd-side-prompt")
            passage = gr.Textbox(TEXT[: self.desk.limits.prompt_tokens], label="Text to measure: each size's perplexity of it is shown below", lines=2, max_length=self.desk.limits.characters, elem_id="cbd-passage")
            start, stop = self._buttons("Compare")
            sizes, texts, notes = [], [], []
            with gr.Row():
                for place in range(3):
                    with gr.Column(min_width=260):
                        value, optional = picks[place] if place < len(picks) else "", place == 2
                        sizes.append(gr.Dropdown(
                            [*([("none", "")] if optional else []), *names], value=value, allow_custom_value=True, label=f"Size {place + 1}",
                            info="any size of the chain can be typed" + (", or none" if optional else ""), elem_id=f"cbd-size-{place + 1}",
                        ))
                        texts.append(gr.Textbox(label=f"Continuation {place + 1}", lines=5, interactive=False, buttons=["copy"], elem_id=f"cbd-side-{place + 1}"))
                        notes.append(gr.HTML(render.status(None), elem_id=f"cbd-side-note-{place + 1}"))
        return sizes, prompt, passage, texts, notes, start, stop

    def _python_tab(self, lines: str) -> tuple[Any, tuple[Any, ...] | None]:
        with gr.Tab("In Python"):
            code = gr.Code(lines, language="python", label="Python", interactive=False, wrap_lines=True, buttons=["copy"], elem_id="cbd-code")
            if not self.desk.limits.download:
                return code, None
            pack = gr.Button("Prepare the checkpoint for download", elem_id="cbd-pack")
            got = gr.DownloadButton("Download", visible=False, variant="primary", elem_id="cbd-download")
            return code, (pack, got, gr.HTML(render.status(None), elem_id="cbd-pack-note"))


def _plain(content: Any) -> str:
    """A turn's text: the page sends blocks, programs send text."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)


def message_page(message: str) -> gr.Blocks:
    """A page that says why there is no other."""
    with gr.Blocks(title="Pick a size", analytics_enabled=False) as page:
        gr.HTML(
            f'<h1>This chain cannot be shown</h1><p role="alert" class="cbd-warning">{escape(message)}</p>'
            "<p>This page looks for it again every minute; reload it then.</p>", elem_classes="cbd-head", elem_id="cbd-message",
        )
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

    Raises:
        ArgumentError: If the port, or the address, cannot be listened on.
    """
    try:
        if host is not None:  # Gradio would try one port after another
            family, *_, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
            with socket.create_server((str(address[0]), int(address[1])), family=family):
                pass
        return page.launch(
            server_name=host, server_port=port, mcp_server=mcp, prevent_thread_lock=not block, theme=gr.themes.Default(primary_hue="indigo").set(**_CONTRAST),
            css=files("cbd_hub.space").joinpath("page.css").read_text(), head=_HEAD, ssr_mode=False, max_file_size="1kb", show_error=False, enable_monitoring=False,
            footer_links=["api", "settings"], quiet=True, **more,
        )
    except OSError as error:
        raise ArgumentError(f"{host or '127.0.0.1'} has no port to listen on ({one_line(error)}); choose another --port or --host") from error
