"""A Hub for tests: speaks the Hub's protocol to the official client on loopback, keeps repos in memory, logs every request.

Weights, pictures and .bin files are LFS objects, all else is committed inline; Xet storage is not spoken, so clients set
``HF_HUB_DISABLE_XET=1``. Tokens: ``hf_test`` may write, ``hf_reader`` may read what is public or granted. ``hub.fail(...)`` lets
requests go wrong, ``hub.cdn`` sends downloads of LFS objects to another port, ``hub.log`` holds what was asked and how many bytes went out.
"""

from __future__ import annotations

import contextlib
import threading

from .handler import Server
from .routes import ROUTES
from .state import Entry, Fault, Hub, Repo


__all__ = ["Entry", "Fault", "Hub", "Repo", "running"]


@contextlib.contextmanager
def running(port=0, *, cdn=False):
    """A server on loopback: gives (hub, its address)."""
    hub = Hub()
    servers = [Server(("127.0.0.1", number), hub, ROUTES) for number in ([port, 0] if cdn else [port])]
    if cdn:
        hub.cdn = f"http://127.0.0.1:{servers[1].server_address[1]}"
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{servers[0].server_address[1]}"
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
