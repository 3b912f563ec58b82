"""From a chain's name to a page that is served."""

from __future__ import annotations

import logging
import time
from typing import Any

from cbd_hub.chain import Chain
from cbd_hub.errors import ArgumentError, CBDError
from cbd_hub.space.desk import Desk
from cbd_hub.space.limits import Limits


logger = logging.getLogger(__name__)


def check_gradio() -> None:
    """Refuse to go on where the page's library is missing.

    Raises:
        ArgumentError: Saying how to install it.
    """
    from importlib.util import find_spec
    if find_spec("gradio") is None:
        raise ArgumentError("the Space needs gradio; run `pip install gradio`")


def serve(chain: str, *, revision: str | None = None, mcp: bool = False, limits: Limits | None = None, dtype: str | None = None, wait: float = 60.0, **how: Any) -> Any:
    """Serve the page of a chain; while it cannot be opened, a page that says why.

    Args:
        chain: Local folder or Hub id.
        revision: Branch, tag or commit of the chain's index repo.
        mcp: Whether programs may use it as an MCP server.
        limits: What a visitor may have; by default what the environment says.
        dtype: Dtype of the weights; by default the anchors'.
        wait: Seconds between two tries to open a chain.
        **how: What `cbd_hub.space.page.launch` takes.

    Returns:
        The page, where ``block=False`` lets the caller go on.
    """
    check_gradio()
    from cbd_hub.space.page import build_page, launch, message_page
    message = None
    while True:
        try:
            page = build_page(Desk(Chain.from_pretrained(chain, revision=revision), Limits.from_environment() if limits is None else limits, dtype))
            break
        except CBDError as error:
            if message is None:
                logger.warning("%s", error)
                message = message_page(str(error))
                launch(message, **{**how, "block": False})
            time.sleep(wait)
    if message is not None:
        message.close()
    launch(page, mcp=mcp, **how)
    return page
