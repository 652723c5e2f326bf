"""A minimal Hugging Face Hub on 127.0.0.1 for tests with the real client library.

The client reads HF_ENDPOINT at import, so it runs in a subprocess.

    with HubServer() as hub:
        hub.add("dataset", "owner/name", {"main": folder})
        subprocess.run(command, env=os.environ | hub.environment(tmp_path))
"""

import hashlib
import json
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_a_test"
"""HF_TOKEN that grants write access."""


class HubServer:
    """Serves one folder per revision; commit hashes are derived from names."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], dict[str, Path]] = {}
        self.requests: list[str] = []
        """`METHOD path` of each request, in order."""
        self.created: dict[str, dict[str, Any]] = {}
        """Request body for each created repository, by OWNER/NAME."""
        self.pushed: dict[str, dict[str, bytes]] = {}
        """Files of the newest commit, by OWNER/NAME."""
        self.refuses: int | None = None
        """HTTP status for every request, such as 401; None serves normally."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    def add(self, kind: str, name: str, revisions: dict[str, Path]) -> None:
        """Serve a "model" or "dataset" OWNER/NAME from a folder per branch."""
        self.repositories[kind, name] = revisions

    def commit(self, kind: str, name: str, revision: str) -> str:
        """Return the commit hash of a branch."""
        return hashlib.sha1(f"{kind} {name} {revision}".encode()).hexdigest()

    def find(self, kind: str, name: str, revision: str) -> tuple[str, Path] | None:
        """Return the commit and folder of a branch or commit."""
        for branch, folder in self.repositories.get((kind, name), {}).items():
            commit = self.commit(kind, name, branch)
            if revision in (branch, commit):
                return commit, folder
        return None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Return variables that point the client here and its caches to `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def __enter__(self) -> "HubServer":
        Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {
            "type": "directory",
            "oid": hashlib.sha1(name.encode()).hexdigest(),
            "size": 0,
            "path": name,
        }
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "oid": oid, "size": path.stat().st_size, "path": name}


def _lfs(path: Path) -> dict[str, Any]:
    """Return the Git LFS entry of a weights file."""
    if path.suffix not in (".safetensors", ".bin"):
        return {}
    content = path.read_bytes()
    return {
        "lfs": {
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "pointerSize": 134,
        }
    }


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            hub.requests.append(f"{self.command} {self.path}")

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            if hub.refuses is not None:
                self._send(hub.refuses, b"{}", {})
                return
            if parts[0] == "api" and self.command == "POST" and parts[-1] != "paths-info":
                self._take("/".join(parts[2:4]), parts[1:], body)
                return
            if parts[0] == "api" and parts[1] in ("models", "datasets"):
                self._api(parts[1][:-1], "/".join(parts[2:4]), parts[4:], parse_qs(url.query), body)
                return
            kind = "dataset" if parts[0] == "datasets" else "model"
            parts = parts[1:] if kind == "dataset" else parts
            if len(parts) < 5:
                self._error(404, "EntryNotFound")
                return
            owner, name, verb, revision, *path = parts
            found = hub.find(kind, f"{owner}/{name}", revision)
            if found is None:
                self._missing(kind, f"{owner}/{name}")
            elif verb == "resolve":
                self._file(found[0], found[1], "/".join(path))
            else:
                self._error(404, "EntryNotFound")

        def _take(self, name: str, parts: list[str], body: bytes) -> None:
            """Create a repository, choose the upload mode (inline), or commit."""
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._error(401, "Unauthorized")
            elif parts == ["repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                hub.created[name] = asked
                self._json({"url": f"{hub.url}/{name}"})
            elif parts == ["validate-yaml"]:  # for the model card
                self._json({"errors": [], "warnings": []})
            elif parts[3] == "preupload":
                paths = [file["path"] for file in json.loads(body)["files"]]
                files = [
                    {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths
                ]
                self._json({"files": files})
            else:
                lines = [json.loads(line)["value"] for line in body.splitlines()]
                hub.pushed[name] = {
                    line["path"]: b64decode(line["content"]) for line in lines if "content" in line
                }
                commit = hub.commit("model", name, "main")
                self._json(
                    {
                        "success": True,
                        "commitOid": commit,
                        "commitUrl": f"{hub.url}/{name}/commit/{commit}",
                    }
                )

        def _api(
            self, kind: str, name: str, rest: list[str], query: dict[str, Any], body: bytes
        ) -> None:
            verb = rest[0] if rest else "info"
            if verb == "refs" and (kind, name) in hub.repositories:
                branches = [
                    {"name": b, "ref": f"refs/heads/{b}", "targetCommit": hub.commit(kind, name, b)}
                    for b in hub.repositories[kind, name]
                ]
                self._json({"branches": branches, "converts": [], "tags": []})
                return
            found = hub.find(kind, name, rest[1] if len(rest) > 1 else "main")
            if found is None:
                self._missing(kind, name)
                return
            commit, folder = found
            if verb in ("info", "revision"):
                self._info(name, commit, folder)
            elif verb == "tree":
                self._tree(
                    folder,
                    folder / "/".join(rest[2:]),
                    "true" in str(query.get("recursive")).lower(),
                )
            elif verb == "paths-info":
                fields = parse_qs(body.decode()) if body[:1] != b"{" else json.loads(body)
                paths = [folder / path.strip("/") for path in fields.get("paths", [])]
                self._json([_entry(folder, path) for path in paths if path.exists()])
            else:
                self._error(404, "EntryNotFound")

        def _info(self, name: str, commit: str, folder: Path) -> None:
            siblings = [
                {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]}
                | _lfs(folder / e["path"])
                for e in (
                    _entry(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()
                )
            ]
            self._json(
                {
                    "_id": commit[:24],
                    "id": name,
                    "author": name.split("/")[0],
                    "sha": commit,
                    "lastModified": "2024-01-01T00:00:00.000Z",
                    "createdAt": "2024-01-01T00:00:00.000Z",
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "siblings": siblings,
                }
            )

        def _tree(self, folder: Path, root: Path, recursive: bool) -> None:
            if not root.is_dir():
                self._error(404, "EntryNotFound")
                return
            paths = sorted(root.rglob("*") if recursive else root.iterdir())
            self._json([_entry(folder, path) for path in paths])

        def _file(self, commit: str, folder: Path, name: str) -> None:
            path = folder / name
            if not path.is_file():
                self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
                return
            content = path.read_bytes()
            headers = {
                "X-Repo-Commit": commit,
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "Accept-Ranges": "bytes",
                "Content-Type": "application/octet-stream",
            }
            status = 200
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start = int(first) if first else len(content) - int(last)
                end = min(int(last), len(content) - 1) if first and last else len(content) - 1
                headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
                content, status = content[start : end + 1], 206
            self._send(status, content, headers)

        def _missing(self, kind: str, name: str) -> None:
            known = (kind, name) in hub.repositories
            self._error(404, "RevisionNotFound" if known else "RepoNotFound")

        def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
            content = json.dumps({"error": code}).encode()
            self._send(
                status, content, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}
            )

        def _json(self, document: object) -> None:
            self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler
