"""The commands that publish and fetch chains: push, pull, add-anchor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from cbd_hub.commands.options import (
    ChainArgument,
    DryRunOption,
    GatedOption,
    JsonOption,
    MessageOption,
    PrivateOption,
    PullRequestOption,
    RevisionOption,
    refuse_given,
)
from cbd_hub.commands.printing import out, print_json, printed, table_of, tell_chain
from cbd_hub.errors import ArgumentError, StorageError
from cbd_hub.sizes import format_bytes


commands = typer.Typer()


@commands.command()
def push(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A chain, or a model made from one.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repo: of a chain its index, beside which each anchor gets one.", show_default=False)],
    private: PrivateOption = None, gated: GatedOption = None, create_pr: PullRequestOption = False, message: MessageOption = None,
    tag: Annotated[str | None, typer.Option("--tag", help="Tag of the index; by default the next of v1, v2, ...", show_default=False)] = None,
    collection: Annotated[bool, typer.Option("--collection/--no-collection", help="Put the repos into a collection.")] = True,
    dry_run: DryRunOption = False, as_json: JsonOption = False,
) -> None:
    """Publish a chain, or a model made from one, on the Hub.

    Killed at any moment, what was published before stays whole; run the same command again, it goes on.
    """
    import dataclasses

    from cbd_hub.chain import Chain
    from cbd_hub.manifest import FILE_NAME
    from cbd_hub.publish import push_model
    if gated not in (None, "auto", "manual"):
        raise ArgumentError(f"--gated {gated} is not known; choose auto or manual")
    how: dict[str, Any] = {
        "private": private, "gated": gated, "create_pr": create_pr, "commit_message": message, "dry_run": dry_run,
        "progress": printed(as_json),
    }
    folder = folder.expanduser()
    if not folder.is_dir():
        raise StorageError(f"{folder} is no folder; give a chain's folder, or that of a model made by `cbd make`")
    if (folder / FILE_NAME).is_file():
        done = Chain.from_pretrained(folder).push_to_hub(repo_id, tag=tag, collection=collection, **how)
    else:
        refuse_given(context, ("tag", "collection"), "is of a chain's index, and this folder holds a model; leave it out")
        done = push_model(folder, repo_id, **how)
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    table_of("would be sent" if dry_run else "published", [{"repo": name, "size": format_bytes(size)} for name, size in done.bytes.items()])
    for address in done.pull_requests:
        out.print(f"pull request: {escape(address)}")
    if done.tag is not None:
        out.print(f"commit {done.commit}, tag {escape(done.tag)}" + (f", collection {escape(done.collection)}" if done.collection else ""))
        out.print(f'next: CBDModel.from_chain("{escape(repo_id)}", size="...")')


@commands.command()
def pull(chain: ChainArgument, out_dir: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.", show_default=False)], revision: RevisionOption = None, as_json: JsonOption = False) -> None:
    """Make a local chain of one on the Hub, with every anchor."""
    from cbd_hub.chain import Chain
    Chain.from_pretrained(chain, revision=revision).save_pretrained(out_dir)
    tell_chain(Chain.from_pretrained(out_dir), as_json)


@commands.command("add-anchor")
def add_anchor(
    chain: ChainArgument, checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="The anchor: model folder or Hub id.", show_default=False)],
    repo_id: Annotated[str, typer.Option("--repo", metavar="ORG/NAME", help="The repo it goes to.", show_default=False)],
    private: PrivateOption = None, create_pr: PullRequestOption = False, as_json: JsonOption = False,
) -> None:
    """Extend a chain with an anchor in a repo of its own: a local chain, or a published one by a commit or a pull request."""
    import dataclasses

    from cbd_hub.chain import Chain
    from cbd_hub.extend import add_anchor as extend
    done = extend(
        Chain.from_pretrained(chain), checkpoint, repo_id, private=private, create_pr=create_pr, progress=printed(as_json)
    )
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    for name, (repo, commit) in done.anchors.items():
        out.print(f"anchor {escape(name)} in {escape(repo)} at {commit}")
    for address in done.pull_requests:
        out.print(f"pull request: {escape(address)}")
