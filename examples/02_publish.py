"""A chain published on the Hub: a repo per anchor, a light index, a collection; then a size in between loaded from there.

    HF_TOKEN=... python examples/02_publish.py --chain ./chain --repo org/NAME
    python examples/02_publish.py --smoke

With --smoke it starts the tests' Hub on this machine and publishes a tiny chain there. Killed anywhere, the old chain stays whole; run again, it goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def hub_on_this_machine() -> Iterator[None]:
    """A Hub of the tests, to which the environment then points: it is read when huggingface_hub is imported, so before all else."""
    root = Path(__file__).parents[1]
    server = subprocess.Popen([sys.executable, "-m", "tests.hub_server", "--port", "0"], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        os.environ.update(dict(entry.split("=", 1) for entry in server.stdout.readline().split()))
        os.environ["HF_HUB_OFFLINE"] = "0"
        yield
    finally:
        server.terminate()
        server.wait()


def publish(chain_folder: str, repo: str, size: str, private: bool) -> None:
    """Push, then load as anybody would."""
    from cbd_hub import CBDModel, Chain

    published = Chain.from_pretrained(chain_folder).push_to_hub(repo, private=private, progress=print)
    print(published)
    print(CBDModel.plan(repo, size=size))  # what would be downloaded
    model = CBDModel.from_chain(repo, size=size)  # only the bytes that are read
    print(f"{repo} at {size}: {type(model).__name__} of {model.num_parameters():,} parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", default="./chain", help="folder of a chain")
    parser.add_argument("--repo", default="org/NAME", help="the index repo to make or update")
    parser.add_argument("--size", default="117M", help="the size that is loaded afterwards")
    parser.add_argument("--private", action="store_true", help="publish it for yourself alone")
    parser.add_argument("--smoke", action="store_true", help="a tiny chain to a Hub on this machine")
    options = parser.parse_args()
    if not options.smoke:
        publish(options.chain, options.repo, options.size, options.private)
        return
    with hub_on_this_machine():
        import smoke

        os.environ["HF_HOME"] = str(smoke.folder())
        publish(smoke.chain(), "org/tiny", smoke.SIZE, options.private)


if __name__ == "__main__":
    main()
