"""A small Hub for tests: the HTTP endpoints that huggingface_hub downloads and uploads with.

    python hub_server.py FOLDER      prints its address, serves FOLDER/<org>/<name>/<files>

Run as a process of its own with HF_ENDPOINT pointing at it, it shows that the real client works
with what fda_fast asks of it. Revisions: "main", any branch file FOLDER/<org>/<name>.refs names, or
the commit, which is a hash of the contents. One user, one token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

TOKEN, USER = "hf_" + "a" * 34, "tester"
MODEL = r"(?P<model>[\w.-]+/[\w.-]+)"


def files_of(folder: Path) -> dict[str, Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path for path in found}


def commit_of(folder: Path) -> str:
    digest = hashlib.sha1()
    for name, path in files_of(folder).items():
        digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    objects: dict[str, bytes] = {}  # noqa: RUF012  # of uploads, by sha256, until their commit

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            self._authorised() and self._json({"type": "user", "name": USER, "orgs": []})
        elif found := re.fullmatch(rf"/api/models/{MODEL}(/revision/(?P<revision>.+))?", path):
            self._info(found["model"], found["revision"] or "main")
        elif found := re.fullmatch(rf"/api/models/{MODEL}/tree/(?P<revision>[^/]+)", path):
            self._tree(found["model"], found["revision"])
        elif found := re.fullmatch(rf"/{MODEL}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path):
            self._file(found["model"], found["revision"], found["file"])
        else:
            self._json({"error": f"no {path}"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._authorised():
            return
        if path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(rf"/api/models/{MODEL}/preupload/main", path):
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in asked
            ]
            self._json({"files": modes})
        elif found := re.fullmatch(rf"/{MODEL}\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif found := re.fullmatch(rf"/api/models/{MODEL}/commit/main", path):
            self._commit(found["model"], body.decode().splitlines())
        else:
            self._json({"error": f"no {path}"}, 404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rsplit("/", 1)[-1]
        right = hashlib.sha256(body).hexdigest() == oid
        if right:
            self.objects[oid] = body
        self._json({}, 200 if right else 400)

    def _authorised(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._json({"error": "Invalid credentials"}, 401)
        return False

    def _folder(self, model: str, revision: str) -> Path | None:
        folder = self.root / model
        refs = folder.with_name(folder.name + ".refs")
        known = json.loads(refs.read_text()) if refs.exists() else {}
        if not folder.is_dir():
            self._error("RepoNotFound")
        elif revision not in ("main", commit_of(folder), *known):
            self._error("RevisionNotFound")
        else:
            return folder
        return None

    def _info(self, model: str, revision: str) -> None:
        folder = self._folder(model, revision)
        if folder is None:
            return
        siblings = [
            {"rfilename": name, "size": path.stat().st_size, "blobId": "0" * 40}
            for name, path in files_of(folder).items()
        ]
        info = {"id": model, "modelId": model, "sha": commit_of(folder), "private": False}
        self._json({**info, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def _tree(self, model: str, revision: str) -> None:
        folder = self._folder(model, revision)
        if folder is not None:
            entries = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
                for name, path in files_of(folder).items()
            ]
            self._send(json.dumps(entries).encode(), 200, {"Content-Type": "application/json"})

    def _validate(self, card: str) -> None:
        """What the Hub asks of a card's front matter: names of models that could exist."""
        front = yaml.safe_load(card.split("---")[1])
        wrong = [
            name
            for name in front.get("base_model", [])
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
        ]
        errors = [{"message": f'"base_model" with value "{name}" is not valid'} for name in wrong]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _file(self, model: str, revision: str, name: str) -> None:
        folder = self._folder(model, revision)
        if folder is None:
            return
        path = folder / name
        if not path.is_file():
            self._error("EntryNotFound")
            return
        body = path.read_bytes()
        etag = hashlib.sha256(body).hexdigest()
        headers = {
            "ETag": f'"{etag}"',
            "X-Repo-Commit": commit_of(folder),
            "Accept-Ranges": "bytes",
        }
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2]), len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            self._send(body[first : last + 1], 206, headers)
        else:
            self._send(body, 200, headers)

    def _create(self, asked: dict[str, Any]) -> None:
        model = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"http://{self.headers['Host']}/{model}"
        if not model.startswith(f"{USER}/"):
            self._json({"error": f"You don't have the rights to create {model}"}, 403)
        elif (self.root / model).exists():
            self._json({"error": "You already created this model repo", "url": url}, 409)
        else:
            (self.root / model).mkdir(parents=True)
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            (self.root / f"{model}.json").write_text(json.dumps({"private": private}))
            self._json({"url": url, "name": model, "id": model})

    def _batch(self, asked: dict[str, Any]) -> None:
        at = f"http://{self.headers['Host']}/objects"
        objects = [
            {**one, "actions": {"upload": {"href": f"{at}/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, model: str, lines: list[str]) -> None:
        folder = self.root / model
        for line in map(json.loads, lines):
            value = line["value"]
            if line["key"] == "header":
                continue
            path = folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                path.write_bytes(self.objects.pop(value["oid"]))
        commit = commit_of(folder)
        url = f"http://{self.headers['Host']}/{model}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "hookOutput": ""})

    def _error(self, code: str) -> None:
        self._send(b"{}", 404, {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, content: dict[str, Any], status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        with open(self.root / "requests.log", "a") as log:
            log.write(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip() + "\n")


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
