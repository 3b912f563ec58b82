"""A Hub on this machine, to try push and load without an account.

python -m tests.hub_server --port 8099
HF_ENDPOINT=http://127.0.0.1:8099 HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_test cbd push ./chain org/NAME
"""

import argparse
import threading

from . import running


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.hub_server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8099)
    parser.add_argument("--folder", action="append", default=[], metavar="ORG/NAME=FOLDER", help="put a folder into a repo")
    options = parser.parse_args()
    with running(options.port) as (hub, address):
        for entry in options.folder:
            repo_id, folder = entry.split("=", 1)
            hub.upload_folder(repo_id, folder)
        print(f"HF_ENDPOINT={address} HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_test", flush=True)  # noqa: T201
        threading.Event().wait()


if __name__ == "__main__":
    main()
