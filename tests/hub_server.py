"""A Hub for tests: speaks the Hub's protocol to the official client on loopback, keeps repos in memory, logs every request.

    python tests/hub_server.py --port 8099     # then: HF_ENDPOINT=http://127.0.0.1:8099 HF_HUB_DISABLE_XET=1 cbd show org/chain

Every file is answered as a regular upload, so that neither LFS nor Xet storage is needed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


@dataclass
class Repo:
    """A repo: commits, newest last, each a mapping of path to bytes."""

    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=lambda: [("0" * 40, {})])

    def at(self, revision):
        """(commit, files) of a branch or commit."""
        if revision in ("main", None):
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)

    def commit(self, files):
        """Add a commit and give its id."""
        text = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in sorted(files.items())}) + str(len(self.commits))
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits.append((oid, dict(files)))
        return oid


class Hub:
    """The repos and the request log."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens = {"hf_test": "org"}

    def upload_folder(self, repo_id, folder):
        """Put a local folder into a repo and give the commit."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}
        return self.repos.setdefault(repo_id, Repo()).commit(files)

    def missing(self, code, status=404):
        return Response(status_code=status, headers={"X-Error-Code": code, "X-Error-Message": code})

    def repo_id(self, request):
        """A repo's key: its id, after "datasets/" where it is a data set."""
        kind = "datasets/" if request.url.path.startswith(("/datasets/", "/api/datasets/")) else ""
        return f"{kind}{request.path_params['owner']}/{request.path_params['name']}"

    def found(self, request, revision=None):
        """(repo, commit, files), or the error to answer."""
        repo = self.repos.get(self.repo_id(request))
        if repo is None:
            return self.missing("RepoNotFound", 401)
        commit = repo.at(revision)
        return self.missing("RevisionNotFound") if commit is None else (repo, *commit)

    async def info(self, request):
        found = self.found(request, request.path_params.get("revision"))
        if isinstance(found, Response):
            return found
        _, oid, files = found
        repo_id = self.repo_id(request).removeprefix("datasets/")
        return JSONResponse({
            "id": repo_id, "modelId": repo_id, "sha": oid, "private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": path} for path in sorted(files)],
        })

    async def tree(self, request):
        found = self.found(request, request.path_params["revision"])
        if isinstance(found, Response):
            return found
        return JSONResponse([
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for path, data in sorted(found[2].items())
        ])

    async def resolve(self, request):
        found = self.found(request, request.path_params["revision"])
        if isinstance(found, Response):
            return found
        _, oid, files = found
        path = request.path_params["path"]
        if path not in files:
            return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
        data = files[path]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if request.headers.get("range", "").startswith("bytes="):
            first, last = request.headers["range"][6:].split("-")
            stop = min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
            return Response(data[int(first) : stop], 206, headers)
        return Response(data, headers=headers)

    async def whoami(self, request):
        name = self.tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "))
        if name is None:
            return Response(status_code=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        return JSONResponse({"name": name, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    async def create(self, request):
        body = await request.json()
        kind = "datasets/" if body.get("type") == "dataset" else ""
        repo_id = f"{kind}{body.get('organization') or 'org'}/{body['name']}"
        status = 409 if repo_id in self.repos else 200
        self.repos.setdefault(repo_id, Repo())
        return JSONResponse({"url": f"{request.base_url}{repo_id}"}, status)

    async def validate(self, request):
        return JSONResponse({"errors": [], "warnings": []})

    async def preupload(self, request):
        body = await request.json()
        return JSONResponse({"files": [{"path": entry["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for entry in body["files"]]})

    async def commit(self, request):
        found = self.found(request, "main")
        if isinstance(found, Response):
            return found
        repo, head, files = found
        files = dict(files)
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit") not in (None, head):
                return self.missing("StaleParent", 412)
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = repo.commit(files)
        return JSONResponse({"commitUrl": f"{request.base_url}{self.repo_id(request)}/commit/{oid}", "commitOid": oid})

    def app(self):
        """The ASGI application."""
        routes = [
            Route("/api/whoami-v2", self.whoami), Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/validate-yaml", self.validate, methods=["POST"]),
        ]
        for repo, files in (("/api/models/{owner}/{name}", ""), ("/api/datasets/{owner}/{name}", "/datasets")):
            routes += [
                Route(repo, self.info), Route(repo + "/revision/{revision}", self.info), Route(repo + "/tree/{revision}", self.tree),
                Route(repo + "/preupload/{revision}", self.preupload, methods=["POST"]), Route(repo + "/commit/{revision}", self.commit, methods=["POST"]),
                Route(files + "/{owner}/{name}/resolve/{revision}/{path:path}", self.resolve),
            ]
        inner = Starlette(routes=routes)

        async def logged(scope, receive, send):
            if scope["type"] == "http":
                self.requests.append((scope["method"], unquote(scope["path"])))
            await inner(scope, receive, send)

        return logged


@contextlib.contextmanager
def running(port=0):
    """A server on loopback: gives (hub, its address)."""
    hub = Hub()
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = uvicorn.Server(uvicorn.Config(hub.app(), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield hub, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8099)
    parser.add_argument("--folder", action="append", default=[], metavar="ORG/NAME=FOLDER", help="put a folder into a repo")
    options = parser.parse_args()
    with running(options.port) as (hub, address):
        for entry in options.folder:
            repo_id, folder = entry.split("=", 1)
            hub.upload_folder(repo_id, folder)
        print(f"HF_ENDPOINT={address} HF_HUB_DISABLE_XET=1", flush=True)  # noqa: T201
        threading.Event().wait()


if __name__ == "__main__":
    main()
