"""A stand-in for a model hub: creates repositories, takes uploads, and serves their files."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


def oid(content: bytes) -> str:
    """The identifier of a content."""
    return hashlib.sha1(content).hexdigest()


def tree(files: dict[str, bytes], folder: str, recursive: bool) -> Iterator[dict]:
    """The files and folders in a folder ("" for the whole repository), as the hub describes them."""
    prefix = f"{folder}/" if folder else ""
    inside = [name for name in files if name.startswith(prefix)]
    for name in inside:
        if recursive or "/" not in name.removeprefix(prefix):
            yield {"type": "file", "path": name, "size": len(files[name]), "oid": oid(files[name])}
    for parent in {prefix + name.removeprefix(prefix).split("/")[0] for name in inside} - set(inside):
        yield {"type": "directory", "path": parent, "size": 0, "oid": oid(parent.encode())}


@contextlib.contextmanager
def start_hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """(address, {repository: {file: content}}) of a hub on 127.0.0.1."""
    repositories: dict[str, dict[str, bytes]] = {}

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, content: object, code: int = 200, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/", self.path)
            repository, what = found.groups() if found else ("", "")
            if self.path == "/api/repos/create":
                given = json.loads(body)
                name = f"{given['organization']}/{given['name']}"
                repositories.setdefault(name, {})
                self.answer({"url": f"http://{self.headers['Host']}/{name}"})
            elif what == "preupload":
                files = json.loads(body)["files"]
                mode = {"uploadMode": "regular", "shouldIgnore": False}  # "regular": the content is part of the commit
                self.answer({"files": [{"path": file["path"], **mode} for file in files]})
            elif what == "commit":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        repositories[repository][line["value"]["path"]] = content
                url = f"http://{self.headers['Host']}/{repository}/commit/{COMMIT}"
                self.answer({"commitOid": COMMIT, "commitUrl": url})
            else:
                self.answer({"errors": [], "warnings": []})  # the check of a model card

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                content = repositories[found[1]].get(found[2])
                if content is None:
                    self.answer({}, 404, X_Error_Code="EntryNotFound")
                else:
                    self.answer(content, ETag=f'"{oid(content)}"', X_Repo_Commit=COMMIT)
                return
            found = re.match(r"/api/models/([^/]+/[^/]+)(?:/tree/[^/]+/?(.*))?", path)
            if not found or found[1] not in repositories:
                self.answer({}, 404, X_Error_Code="RepoNotFound")
            elif found[2] is None:
                files = [{"rfilename": name} for name in repositories[found[1]]]
                self.answer({"id": found[1], "sha": COMMIT, "siblings": files})
            else:
                self.answer(list(tree(repositories[found[1]], found[2], "recursive=true" in self.path.lower())))

        def do_HEAD(self) -> None:
            self.do_GET()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", repositories
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
