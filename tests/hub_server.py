"""A local Hub server with the part of the HTTP API that huggingface_hub uses to load models and to upload models and
Spaces."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import yaml


class Hub:
    """
    A local Hub server.

    Attributes:
        repos (`dict[str, dict[str, dict[str, bytes]]]`): the repositories, as `{name: {revision: {path: content}}}`.
        tokens (`dict[str, str]`): the token that is required for each private repository.
        requests (`list[str]`): every request, in order.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.tokens: dict[str, str] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, name: str, folder, revision: str = "main") -> None:
        files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        self.repos.setdefault(name, {})[revision] = files

    def commit(self, name: str, revision: str) -> str:
        files = self.repos[name][revision]
        return hashlib.sha1(b"".join(p.encode() + files[p] for p in sorted(files))).hexdigest()

    def find(self, name: str, revision: str) -> str | None:
        """Returns the branch that `revision`, a branch or a commit, refers to."""
        branches = self.repos.get(name, {})
        return next((b for b in branches if revision in (b, self.commit(name, b))), None)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value, status: int = 200, headers: dict | None = None):
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, code: str, status: int = 404):
        self.answer_json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def allowed(self, name: str) -> bool:
        token = self.hub.tokens.get(name)
        return token is None or self.headers.get("Authorization") == f"Bearer {token}"

    def files(self, name: str, revision: str) -> tuple[dict[str, bytes], str] | None:
        """Returns the files and the commit of a revision. If it is private or does not exist, answers with an error
        and returns `None`."""
        if name not in self.hub.repos or not self.allowed(name):
            return self.refuse("RepoNotFound", 401 if name in self.hub.tokens else 404)
        branch = self.hub.find(name, revision)
        if branch is None:
            return self.refuse("RevisionNotFound")
        return self.hub.repos[name][branch], self.hub.commit(name, branch)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path).strip("/")
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            found = self.files(name, rest[1] if len(rest) > 1 else "main")
            if found is None:
                return None
            files, sha = found
            if rest and rest[0] == "tree":
                return self.answer_json([_entry(path, content) for path, content in sorted(files.items())])
            siblings = [{"rfilename": path} for path in sorted(files)]
            return self.answer_json({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": False})
        if len(parts) > 4 and parts[2] == "resolve":
            found = self.files("/".join(parts[:2]), parts[3])
            if found is None:
                return None
            (files, sha), file = found, "/".join(parts[4:])
            commit = {"X-Repo-Commit": sha}
            if file not in files:
                return self.answer(404, b"", {**commit, "X-Error-Code": "EntryNotFound"})
            etag = hashlib.sha256(files[file]).hexdigest()
            return self.answer(200, files[file], {**commit, "ETag": f'"{etag}"'})
        return self.refuse("NotFound")

    def do_POST(self):
        path = unquote(urlparse(self.path).path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"POST {path}")
        parts = path.split("/")
        if path == "api/validate-yaml":
            return self.answer_json({"errors": _card_errors(json.loads(body)["content"]), "warnings": []})
        if path == "api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in self.hub.repos:
                return self.answer_json({"url": f"{self.hub.endpoint}/{name}"}, 409)
            self.hub.repos[name] = {"main": {}}
            return self.answer_json({"url": f"{self.hub.endpoint}/{name}", "id": name})
        if parts[0] == "api" and parts[1] in ("models", "spaces") and parts[4] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.answer_json({"files": modes})
        if parts[0] == "api" and parts[1] in ("models", "spaces") and parts[4] == "commit":
            name, revision = "/".join(parts[2:4]), parts[5]
            if not self.allowed(name):
                return self.refuse("RepoNotFound", 401)
            files = self.hub.repos[name].setdefault(revision, {})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            sha = self.hub.commit(name, revision)
            return self.answer_json(
                {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}"}
            )
        return self.refuse("NotFound")


def _card_errors(content: str) -> list[dict]:
    """Returns what the Hub would refuse in the metadata of a card."""
    data = yaml.safe_load(content.split("---")[1])
    kinds = {"license": str, "library_name": str, "pipeline_tag": str, "tags": list, "base_model": str, "widget": list}
    wrong = [name for name, kind in kinds.items() if name in data and not isinstance(data[name], kind)]
    wrong += ["widget" for each in data.get("widget", ()) if not {"text", "output"} <= each.keys()]
    return [{"message": f"{name} is not valid"} for name in [*wrong, *({"license"} - data.keys())]]


def _entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
