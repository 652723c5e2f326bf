"""Passwords, tokens and signatures in URLs must not reach messages, logs or manifests."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from in_process import invoke

from llmtrain.data.sources import default_name
from llmtrain.errors import UserError, mask_credentials


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("cannot read http://user:SECRET@host/a.txt: no", "cannot read http://***@host/a.txt: no"),
        ("s3://SECRET:SECRET@bucket/x", "s3://***@bucket/x"),
        ("ftp://user:SE@CRET@host", "ftp://***@host"),
        ("http://user:SE/CR#ET@host", "http://***@host"),
        ("cache::http://u:SECRET@host/a", "cache::http://***@host/a"),
        ("https://host/a?token=SECRET: no file", "https://host/a?token=***: no file"),
        (
            "'https://h/a?X-Amz-Signature=SECRET&x=SECRET'",
            "'https://h/a?X-Amz-Signature=***&x=***'",
        ),
        ("hf://datasets/me/data@main/a.txt", "hf://datasets/me/data@main/a.txt"),
        ("http:/user:SECRET@host/c.yaml", "http:/***@host/c.yaml"),
        ("me:/data@2/a", "me:/data@2/a"),
        ("s3://bucket/a?.txt", "s3://bucket/a?.txt"),
        ("http://host:8080/a=b", "http://host:8080/a=b"),
        ("me@example.org, a?b=c", "me@example.org, a?b=c"),
    ],
)
def test_credentials_are_masked(text: str, masked: str) -> None:
    assert mask_credentials(text) == masked
    assert mask_credentials(masked) == masked
    assert str(UserError(text, hint=text)) == UserError(text, hint=text).hint == masked


def test_the_default_folder_contains_no_token() -> None:
    assert default_name("http://host/web.jsonl?token=SECRET") == "web.jsonl-token"


@pytest.fixture
def server() -> Iterator[str]:
    """Serve one document at every path, as a store with tokens in its URLs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = b"some text\n" * 20
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{http.server_address[1]}"
        http.shutdown()


def test_a_source_with_credentials(server: str, tmp_path: Path) -> None:
    url = f"http://{server}/a.txt?token=SECRET&name=b.txt"
    command = ("prepare", url, "--tokenizer", "byte", "--val-fraction", "0", "--out", "out")
    outcome = invoke(*command, cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert "SECRET" not in outcome.stdout + outcome.stderr
    manifest = (tmp_path / "out" / "manifest.json").read_text()
    assert "SECRET" not in manifest
    assert json.loads(manifest)["source"]["id"] == "files:a.txt?token=***&name=***"


@pytest.mark.parametrize(
    "arguments",
    [
        ("prepare", "http://user:SECRET@127.0.0.1:9/a.txt"),
        ("prepare", "s3://key:SECRET@bucket/a.txt"),
        ("prepare", "http://127.0.0.1:9/a.txt?token=SECRET"),
        ("prepare", "text.txt", "--val-fraction", "0", "--out", "http://user:SECRET@127.0.0.1:9/x"),
        ("eval", "run", "--data", "http://user:SECRET@127.0.0.1:9/x"),
        ("pretrain", "--config", "http://user:SECRET@127.0.0.1:9/c.yaml"),
    ],
)
def test_errors_contain_no_credentials(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    outcome = invoke(*arguments, cwd=tmp_path)
    assert outcome.code in (1, 2)
    assert "SECRET" not in outcome.stdout + outcome.stderr
