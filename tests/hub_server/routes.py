"""The Hub's routes, as the official client calls them. A repo's key is its id, after "datasets/" or "spaces/" where it is one."""

from __future__ import annotations

import base64
import hashlib
import json
from urllib.parse import parse_qs

import yaml

from .handler import Answer
from .state import LFS_SUFFIXES, Repo, blob_id, lfs_id


NAME = r"((?:[^/]+)/(?:[^/]+?))"
API = r"/api/(models|datasets|spaces)/" + NAME
WEB = r"/(?:(datasets|spaces)/)?" + NAME


def key_of(kind, name):
    return name if kind in (None, "models") else f"{kind}/{name}"


def seen(hub, request, kind, name, *, write=False, content=False):
    """The repo, or the error to answer."""
    repo = hub.repos.get(key_of(kind, name))
    if repo is None or (repo.private and request.user not in hub.writers):
        return None, Answer.error("RepoNotFound", 401, "Repository not found")
    if write and request.user not in hub.writers:
        return None, Answer.error("", 403 if request.user else 401, f"no write access to {name}")
    if content and repo.gated and request.user not in repo.granted | hub.writers:
        return None, Answer.error("GatedRepo", 403 if request.user else 401, f"Access to model {name} is restricted")
    return repo, None


def found(hub, request, kind, name, revision, **how):
    """(repo, commit, files), or the error to answer."""
    repo, error = seen(hub, request, kind, name, **how)
    if error:
        return None, error
    at = repo.at(revision)
    return ((repo, *at), None) if at else (None, Answer.error("RevisionNotFound", 404))


def own_request(hub, request, kind, name, revision):
    """Whether a revision is an open pull request of who asks."""
    repo = hub.repos.get(key_of(kind, name))
    number = revision.removeprefix("refs/pr/")
    pull = repo.requests[int(number) - 1] if repo is not None and number != revision else None
    return pull is not None and (pull["author"], pull["status"]) == (request.user, "open")


def whoami(hub, request):
    if request.user is None:
        return Answer.error("", 401, "Invalid credentials in Authorization header")
    return Answer.json({"name": request.user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})


def create(hub, request):
    body = request.json()
    owner = body.get("organization") or request.user or "org"
    kind = {"dataset": "datasets/", "space": "spaces/"}.get(body.get("type"), "")
    key = f"{kind}{owner}/{body['name']}"
    if request.user not in hub.writers:
        return Answer.error("", 403 if request.user else 401, f"You don't have the rights to create a model under the namespace {owner}")
    status = 409 if key in hub.repos else 200
    hub.repos.setdefault(key, Repo(private=bool(body.get("private")) or body.get("visibility") == "private"))
    return Answer.json({"url": f"{request.base}/{key}"}, status)


def delete(hub, request):
    body = request.json()
    if request.user not in hub.writers:
        return Answer.error("", 403 if request.user else 401, "no rights")
    kind = {"dataset": "datasets/", "space": "spaces/"}.get(body.get("type"), "")
    gone = hub.repos.pop(f"{kind}{body.get('organization') or request.user}/{body['name']}", None)
    return Answer.json({}) if gone is not None else Answer.error("RepoNotFound", 404)


def settings(hub, request, kind, name):
    repo, error = seen(hub, request, kind, name, write=True)
    if error:
        return error
    body = request.json()
    repo.gated = body.get("gated", repo.gated)
    repo.private = body["visibility"] == "private" if "visibility" in body else repo.private
    return Answer.json({})


def validate(hub, request):
    content = request.json()["content"]
    problems = []
    if content.startswith("---"):
        data = yaml.safe_load(content.split("---")[1]) or {}
        relation = data.get("base_model_relation")
        if relation not in (None, "adapter", "merge", "quantized", "finetune"):
            problems.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
        for base in [data.get("base_model") or []] if isinstance(data.get("base_model"), str) else data.get("base_model") or []:
            if str(base).count("/") != 1 or str(base).startswith((".", "/")):
                problems.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    return Answer.json({"errors": [{"message": text} for text in problems], "warnings": []}, 400 if problems else 200)


def info(hub, request, kind, name, revision=None):
    at, error = found(hub, request, kind, name, revision)
    if error:
        return error
    repo, oid, files = at
    return Answer.json({
        "id": name, "modelId": name, "sha": oid, "private": repo.private, "gated": repo.gated, "disabled": False, "tags": [], "downloads": 0, "likes": 0,
        "siblings": [{"rfilename": path} for path in sorted(files)],
    })


def tree(hub, request, kind, name, revision, folder=None):
    at, error = found(hub, request, kind, name, revision)
    if error:
        return error
    prefix = f"{folder}/" if folder else ""
    listed = [hub.entry(path, data) for path, data in sorted(at[2].items()) if path.startswith(prefix)]
    if folder and not listed:
        return Answer.error("EntryNotFound", 404)
    return Answer.json(listed)


def paths_info(hub, request, kind, name, revision):
    at, error = found(hub, request, kind, name, revision)
    if error:
        return error
    wanted = parse_qs(request.body.decode())["paths"]
    return Answer.json([hub.entry(path, data) for path, data in sorted(at[2].items()) if path in wanted])


def resolve(hub, request, kind, name, revision, path):
    at, error = found(hub, request, kind, name, revision, content=True)
    if error:
        return error
    _, oid, files = at
    if path not in files:
        return Answer.error("EntryNotFound", 404, "Entry not found", **{"X-Repo-Commit": oid})
    data = files[path]
    headers = {"ETag": f'"{blob_id(data)}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
    if path.endswith(LFS_SUFFIXES):
        digest = lfs_id(data)
        headers.update({"ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))})
        if hub.cdn is not None:
            hub.objects[digest] = data
            return Answer(302, b"", {**headers, "Location": f"{hub.cdn}/cdn/{digest}?ticket=signed"})
    return Answer(200, data, headers)


def cdn(hub, request, digest):
    return Answer(200, hub.objects[digest], {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"})


def preupload(hub, request, kind, name, revision):
    at, error = found(hub, request, kind, name, revision, write="create_pr" not in request.query and not own_request(hub, request, kind, name, revision))
    if error:
        return error
    answers = []
    for entry in request.json()["files"]:
        path, old = entry["path"], at[2].get(entry["path"])
        lfs = path.endswith(LFS_SUFFIXES)
        oid = None if old is None else lfs_id(old) if lfs else blob_id(old)
        answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
    return Answer.json({"files": answers})


def batch(hub, request, kind, name):
    repo, error = seen(hub, request, kind, name)
    if error:
        return error
    objects, multipart = [], hub.multipart
    for entry in request.json()["objects"]:
        oid, size = entry["oid"], entry["size"]
        listed = {"oid": oid, "size": size}
        if oid not in hub.objects:
            upload = {"href": f"{request.base}/lfs/{oid}?ticket=signed"}
            if multipart:
                parts = {f"{part:05}": f"{request.base}/lfs/{oid}/{part}?ticket=signed" for part in range(1, -(-size // multipart) + 1)}
                upload["header"] = {"chunk_size": str(multipart), **parts}
            listed["actions"] = {"upload": upload, "verify": {"href": f"{request.base}/lfs/{oid}/verify"}}
        objects.append(listed)
    return Answer.json({"transfer": "multipart" if multipart else "basic", "objects": objects})


def put_object(hub, request, oid):
    if lfs_id(request.body) != oid:
        return Answer.error("", 400, "wrong sha256")
    hub.objects[oid] = request.body
    return Answer()


def put_part(hub, request, oid, part):
    hub.objects[f"{oid}/{part}"] = request.body
    return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


def join_parts(hub, request, oid):
    parts = sorted(entry["partNumber"] for entry in request.json()["parts"])
    data = b"".join(hub.objects.pop(f"{oid}/{part}") for part in parts)
    if lfs_id(data) != oid:
        return Answer.error("", 400, "wrong sha256")
    hub.objects[oid] = data
    return Answer.json({})


def verify_object(hub, request, oid):
    return Answer() if oid in hub.objects else Answer.error("", 404, "no such object")


def commit(hub, request, kind, name, revision):
    pull = request.query.get("create_pr") == ["1"]
    at, error = found(hub, request, kind, name, revision, write=not (pull or own_request(hub, request, kind, name, revision)))
    if error:
        return error
    if request.user is None:
        return Answer.error("", 401, "log in first")
    repo, head, files = at
    files, title = dict(files), ""
    for line in request.body.splitlines():
        entry = json.loads(line)
        what, value = entry["key"], entry["value"]
        if what == "header":
            title = value["summary"]
            if value.get("parentCommit") not in (None, head):
                return Answer.error("", 412, "A commit has happened since. Please refresh and try again.")
        elif what == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif what == "lfsFile":
            if value["oid"] not in hub.objects:
                return Answer.error("", 400, f"LFS object {value['oid']} was not uploaded")
            files[value["path"]] = hub.objects[value["oid"]]
        elif what == "deletedFile":
            if files.pop(value["path"], None) is None:
                return Answer.error("EntryNotFound", 404, "A file with this name doesn't exist")
        elif what == "deletedFolder":
            files = {path: data for path, data in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
    more = {}
    branch = "main" if pull else revision
    if pull:
        repo.requests.append({"title": title, "author": request.user, "status": "open"})
        branch = f"refs/pr/{len(repo.requests)}"
        repo.branches[branch] = head
        more["pullRequestUrl"] = f"{request.base}/{key_of(kind, name)}/discussions/{len(repo.requests)}"
    oid = repo.commit(files, title, branch)
    return Answer.json({"commitUrl": f"{request.base}/{key_of(kind, name)}/commit/{oid}", "commitOid": oid, **more})


def refs(hub, request, kind, name):
    repo, error = seen(hub, request, kind, name)
    if error:
        return error

    def listed(names, group):
        return [{"name": name, "ref": f"refs/{group}/{name}", "targetCommit": oid} for name, oid in names.items()]

    plain = {branch: oid for branch, oid in repo.branches.items() if not branch.startswith("refs/pr/")}
    return Answer.json({"branches": listed(plain, "heads"), "tags": listed(repo.tags, "tags"), "converts": [], "pullRequests": []})


def tag(hub, request, kind, name, revision):
    at, error = found(hub, request, kind, name, revision, write=True)
    if error:
        return error
    repo, oid, _ = at
    wanted = request.json()["tag"]
    if wanted in repo.tags:
        return Answer.error("", 409, "Tag already exists")
    repo.tags[wanted] = oid
    return Answer.json({})


def branch(hub, request, kind, name, wanted):
    repo, error = seen(hub, request, kind, name, write=True)
    if error:
        return error
    if wanted in repo.branches:
        return Answer.error("", 409, "Branch already exists")
    repo.branches[wanted] = repo.at(request.json().get("startingPoint"))[0]
    return Answer.json({})


def discussions(hub, request, kind, name):
    repo, error = seen(hub, request, kind, name)
    if error:
        return error
    wanted = {key: request.query[key][0] for key in ("author", "status") if key in request.query}
    listed = [
        {
            "title": pull["title"], "num": number, "author": {"name": pull["author"]}, "createdAt": "2026-01-01T00:00:00.000Z", "status": pull["status"],
            "isPullRequest": True, "repo": {"name": name, "type": "model"},
        }
        for number, pull in enumerate(repo.requests, 1) if all(pull[key] == value for key, value in wanted.items())
    ]
    return Answer.json({"discussions": listed, "count": len(listed), "start": 0})


def _collection(entry):
    return {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "theme": "blue", "upvotes": 0, **entry}


def collections(hub, request):
    if request.method == "GET":
        return Answer.json([{name: value for name, value in _collection(entry).items() if name != "position"} for entry in hub.collections.values()])
    if request.user not in hub.writers:
        return Answer.error("", 403 if request.user else 401, "no rights")
    body = request.json()
    slug = f"{body['namespace']}/{body['title'].lower().replace(' ', '-')}-{hashlib.sha1(body['title'].encode()).hexdigest()[:24]}"
    if slug in hub.collections:
        return Answer.json({"slug": slug, "error": "Collection already exists"}, 409)
    owner = {"_id": "1", "name": body["namespace"], "type": "org"}
    hub.collections[slug] = {"slug": slug, "title": body["title"], "owner": owner, "items": [], "private": body["private"], "description": body.get("description")}
    return Answer.json(_collection(hub.collections[slug]))


def collection(hub, request, slug):
    if slug not in hub.collections:
        return Answer.error("", 404, "no such collection")
    if request.method == "DELETE":
        del hub.collections[slug]
        return Answer.json({})
    return Answer.json(_collection(hub.collections[slug]))


def collection_items(hub, request, slug):
    body, items = request.json(), hub.collections[slug]["items"]
    if any(item["id"] == body["item"]["id"] for item in items):
        return Answer.error("", 409, "Item already in collection")
    items.append({"_id": f"{len(items):024x}", **body["item"], "position": len(items), "note": {"text": body.get("note", "")}})
    return Answer.json(_collection(hub.collections[slug]))


ROUTES = [
    (("GET",), "/api/whoami-v2", whoami),
    (("POST",), "/api/repos/create", create),
    (("DELETE",), "/api/repos/delete", delete),
    (("POST",), "/api/validate-yaml", validate),
    (("GET", "POST"), "/api/collections", collections),
    (("GET", "DELETE"), "/api/collections/(.+/[^/]+)", collection),
    (("POST",), "/api/collections/([^/]+/[^/]+)/items", collection_items),
    (("PUT",), API + "/settings", settings),
    (("GET",), API, info),
    (("GET",), API + "/revision/([^/]+)", info),
    (("GET",), API + "/tree/([^/]+)(?:/(.+))?", tree),
    (("POST",), API + "/paths-info/([^/]+)", paths_info),
    (("POST",), API + "/preupload/([^/]+)", preupload),
    (("POST",), API + "/commit/([^/]+)", commit),
    (("GET",), API + "/refs", refs),
    (("POST",), API + "/tag/([^/]+)", tag),
    (("POST",), API + "/branch/([^/]+)", branch),
    (("GET",), API + "/discussions", discussions),
    (("POST",), WEB + r"\.git/info/lfs/objects/batch", batch),
    (("PUT",), "/lfs/([0-9a-f]{64})", put_object),
    (("POST",), "/lfs/([0-9a-f]{64})", join_parts),
    (("PUT",), "/lfs/([0-9a-f]{64})/([0-9]+)", put_part),
    (("POST",), "/lfs/([0-9a-f]{64})/verify", verify_object),
    (("GET", "HEAD"), "/cdn/([0-9a-f]{64})", cdn),
    (("GET", "HEAD"), WEB + "/resolve/([^/]+)/(.+)", resolve),
]
