"""A chain as a page, and the page's API asked by another program.

    python examples/07_space.py --chain org/NAME
    python examples/07_space.py --smoke

Needs `pip install '.[space]'`. The page is `cbd space CHAIN`; `cbd space CHAIN --push org/SPACE` deploys it. With --smoke it stops after the answers.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time

import smoke
from gradio_client import Client

from cbd_hub import Chain


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answering(port: int, page: subprocess.Popen[bytes]) -> Client:
    """A client of the page, as soon as it answers."""
    for _ in range(240):
        if page.poll() is not None:
            raise SystemExit("the page could not be opened")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return Client(f"http://127.0.0.1:{port}/", verbose=False)
        time.sleep(0.5)
    raise SystemExit("the page does not answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", default="./chain", help="Hub id or folder of a chain")
    parser.add_argument("--prompt", default="The history of the city begins")
    parser.add_argument("--smoke", action="store_true", help="a tiny chain, seconds")
    options = parser.parse_args()
    if options.smoke:
        options.chain = smoke.chain()
    large, small = Chain.from_pretrained(options.chain).anchors[:2]
    size, port = str((large.parameters + small.parameters) // 2), free_port()

    page = subprocess.Popen([sys.executable, "-m", "cbd_hub.cli", "space", options.chain, "--port", str(port)])
    try:
        client = answering(port, page)
        print(client.predict(size, api_name="/describe"))
        print(client.predict(size, api_name="/snippet"))
        *_, last = client.submit(size, options.prompt, new_tokens=16, api_name="/generate")
        print(last)
        if not options.smoke:
            page.wait()
    finally:
        page.terminate()
        page.wait()


if __name__ == "__main__":
    main()
