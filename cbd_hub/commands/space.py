"""The command that shows a chain as a page, and deploys it: space."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from cbd_hub.commands.options import (
    ChainArgument,
    DryRunOption,
    DtypeOption,
    JsonOption,
    PrivateOption,
    RevisionOption,
    refuse_given,
)
from cbd_hub.commands.printing import err, out, print_json, table_of
from cbd_hub.errors import ArgumentError
from cbd_hub.sizes import format_bytes, parse_bytes


commands = typer.Typer()


@commands.command()
def space(
    context: typer.Context,
    chain: ChainArgument,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for other machines too.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port; the first free one from 7860 on by default.", show_default=False)] = None,
    memory: Annotated[str | None, typer.Option("--memory", help="Bytes of weights held at a time; by the largest anchor and the machine otherwise, 4GB at least.", show_default=False)] = None,
    new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest continuation.")] = 256,
    prompt_tokens: Annotated[int, typer.Option("--max-prompt-tokens", min=1, help="Longest prompt.")] = 1024,
    waiting: Annotated[int, typer.Option("--waiting", min=1, help="Visitors that may wait for their turn.")] = 20,
    download: Annotated[bool, typer.Option("--allow-download", help="Let visitors download checkpoints.")] = False,
    mcp: Annotated[bool, typer.Option("--mcp", help="Be an MCP server too.")] = False,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    push: Annotated[str | None, typer.Option("--push", metavar="ORG/SPACE", help="Deploy it as a Space instead.", show_default=False)] = None,
    hardware: Annotated[str | None, typer.Option("--hardware", help="Hardware that the Space suggests; by the largest anchor otherwise.", show_default=False)] = None,
    private: PrivateOption = None, dry_run: DryRunOption = False, dtype: DtypeOption = None, revision: RevisionOption = None, as_json: JsonOption = False,
) -> None:
    """Show a chain as a page: pick a size, see what you get, try it; or deploy the page as a Space."""
    from cbd_hub.space.serving import check_gradio
    check_gradio()
    alone = [name for name, given in (("--hardware", hardware), ("--private", private), ("--dry-run", dry_run or None), ("--json", as_json or None)) if given is not None]
    if push is None and alone:
        raise ArgumentError(f"{alone[0]} is of a Space that is deployed; name it by --push ORG/SPACE, or leave {alone[0]} out")
    if push is not None:
        refuse_given(context, ("host", "port", "mcp", "browser"), "is of the page on this machine, and --push deploys one instead; leave it out")
    with err.status(f"opening {escape(chain)}"):
        from cbd_hub.chain import Chain
        opened = Chain.from_pretrained(chain, revision=revision)
    from cbd_hub.plans import weight_dtype
    from cbd_hub.space.limits import Limits
    if dtype is not None:
        weight_dtype(dtype, None)  # type: ignore[arg-type]
    asked: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "waiting": waiting, "download": download, **({} if memory is None else {"memory": parse_bytes(memory, "--memory")})}
    if push is not None:
        import dataclasses

        from cbd_hub.space.push import push_space
        done = push_space(opened, push, private=private, hardware=hardware, dry_run=dry_run, limits=asked, dtype=dtype)
        if as_json:
            print_json(dataclasses.asdict(done))
            return
        table_of("would be sent" if dry_run else "deployed", [{"file": name, "size": format_bytes(size)} for name, size in sorted(done.files.items())])
        out.print(f"{escape(done.url)}, suggested hardware {escape(done.hardware)}")
        if done.secret is not None:
            err.print(f"the chain is private or gated: give the Space a secret {done.secret}, a token that may read it ({escape(done.url)}/settings)")
        return
    limits = Limits(**{"memory": Limits.room(4 * opened.anchors[0].parameters), **asked})
    with err.status(f"making the page of {escape(opened.name)}"):
        from cbd_hub.space.desk import Desk
        from cbd_hub.space.page import build_page, launch
        page = build_page(Desk(opened, limits, dtype))
        _, address, _ = launch(page, host=host, port=port, mcp=mcp, block=False, inbrowser=browser)
    err.print(f"{escape(opened.name)} at {escape(address)} (Ctrl-C stops it)" + (f", MCP at {escape(address)}gradio_api/mcp/" if mcp else ""))
    page.block_thread()
