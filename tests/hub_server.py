"""A Hugging Face Hub on loopback, for tests with the real ``huggingface_hub`` client: model repositories in memory.

::

    with hub_server() as hub, hub.client(tmp_path):
        api = HfApi(token=hub.token)
        repo = api.create_repo("tester/model", private=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=...)
        hub.cut_download_after(1000)
        snapshot_download("tester/model", token=hub.token)

It speaks what uploading and downloading need: creation, information, preupload, Git LFS (basic, and multipart above
``part_size``), commits, trees, and files with entity tags and byte ranges. It offers no Xet storage, knows one user
and his token; a revision is a branch, a commit or a pull request, ``refs/pr/N``.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import parse_qs, unquote

import yaml

USER = "tester"
TOKEN = "hf_of_the_tester"
# for `pytest.mark.filterwarnings`: the client's upload of large files provokes it in its own HTTP library
UPLOAD_WARNING = "ignore:Use 'content=:DeprecationWarning"
_CHUNK = 1 << 16
_LICENSES = (
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "gpl-3.0",
    "unknown",
    "other",
)
_LARGEST_REGULAR_FILE = 10_000_000


class Request(NamedTuple):
    """A request that reached the server; ``path`` has the query, ``headers`` know their names in any case."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(frozen=True)
class _File:
    data: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git holds of a large file."""
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
            self.sha256.encode(),
            len(self.data),
        )

    @property
    def git_oid(self) -> str:
        blob = self.pointer if self.is_lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass
class _Repo:
    repo_id: str
    private: bool
    commits: dict[str, dict[str, _File]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, _File], branch: str = "main") -> str:
        tree = [(path, files[path].git_oid) for path in sorted(files)]
        text = json.dumps([self.repo_id, len(self.commits), self.heads.get(branch), tree])
        sha = self.heads[branch] = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(files)
        return sha


class _HubError(Exception):
    """An answer other than success, as the Hub words it.

    Attributes:
        status: of HTTP.
        headers: the message, the ``code`` that the client goes by, and others.
        content: the message and further fields, as JSON.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        **fields: str,
    ):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **(headers or {})}
        if code is not None:
            self.headers["X-Error-Code"] = code
        self.content = json.dumps({"error": message, **fields}).encode()


class _Cut(Exception):
    """The connection is to be dropped without an answer."""


class Hub:
    """The state of a server. Made by :func:`hub_server`.

    Attributes:
        endpoint: its address, such as ``http://127.0.0.1:40123``.
        token: of the one user, ``tester``; whoever has it may read and write everything.
        part_size: larger files are uploaded in parts of so many bytes.
        requests: what was asked so far.
        repos: the repositories, by id.
        headers: what was said of each commit, as JSON.
        large_files: what was uploaded with Git LFS, by SHA-256.
        parts: uploaded parts of a large file that is not complete, by its SHA-256 and their number.
        lock: held while a repository changes.
    """

    def __init__(self, endpoint: str, part_size: int):
        self.endpoint = endpoint
        self.token = TOKEN
        self.part_size = part_size
        self.requests: list[Request] = []
        self.repos: dict[str, _Repo] = {}
        self.headers: list[str] = []
        self.large_files: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.lock = threading.Lock()
        self._cuts: dict[str, int] = {}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path and content of every file at a revision, a branch or the hash of a commit."""
        repo = self.repos[repo_id]
        return {path: file.data for path, file in repo.commits[repo.heads.get(revision, revision)].items()}

    def cut_download_after(self, number: int) -> None:
        """Drop the connection after so many bytes of the next file that is longer; once."""
        self._cuts["download"] = number

    def cut_upload_after(self, number: int) -> None:
        """Drop the connection after so many bytes of the next uploaded large file (or part) that is longer; once."""
        self._cuts["upload"] = number

    def take_cut(self, direction: str, length: int) -> int | None:
        """Where a transfer that has come to this length is to be cut; the cut is then done with."""
        with self.lock:
            number = self._cuts.get(direction)
            if number is None or length <= number:
                return None
            return self._cuts.pop(direction)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Environment variables with which a new process uses this Hub and keeps its cache and token in ``home``."""
        variables = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**variables, "HF_TOKEN": token} if token is not None else variables

    @contextlib.contextmanager
    def client(self, home: Path) -> Iterator[None]:
        """In this process, ``huggingface_hub`` uses this Hub, keeps its cache in ``home`` and knows no token.

        So does ``transformers``, which loads through it.
        """
        from huggingface_hub import constants, hf_api
        from huggingface_hub.utils import close_session
        from transformers.utils import hub as transformers_hub

        # read from the environment when the client is imported, which has long happened
        settings = {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        environment = {name: text for name, text in os.environ.items() if not name.endswith(("HF_TOKEN", "HUB_TOKEN"))}
        # the two clients that the libraries make once remember the address too
        with (
            mock.patch.multiple(constants, **settings),
            mock.patch.object(hf_api.api, "endpoint", self.endpoint),
            mock.patch.object(transformers_hub.hf_api(), "endpoint", self.endpoint),
            mock.patch.dict(os.environ, environment, clear=True),
        ):
            try:
                yield
            finally:
                close_session()


@contextlib.contextmanager
def hub_server(part_size: int = 5_000_000) -> Iterator[Hub]:
    """Serve an empty Hub on a free port of 127.0.0.1 while the block runs."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.hub = Hub(f"http://127.0.0.1:{server.server_port}", part_size)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.hub
        finally:
            server.shutdown()
            thread.join()
            server.close_connections()


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    hub: Hub

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """End those that clients keep open, for whose threads closing the server would wait."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nobody's fault; other errors are answered by the handler."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the requests are in ``hub.requests``."""

    def handle_any(self) -> None:
        """Log the request, route it and answer what its method returns (as JSON) or raises."""
        self.hub.requests.append(Request(self.command, self.path, self.headers))
        self.path, _, query = self.path.partition("?")
        self.query = {name: values[-1] for name, values in parse_qs(query).items()}
        try:
            self.body = self._read_body()
            self._check_credentials()
            method, groups = self._route()
            answer = method(self, **groups)
            if answer is not None:
                self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        except _HubError as error:
            self._send(error.status, error.content, error.headers)
        except _Cut:
            self.close_connection = True
        except OSError:
            raise
        except Exception:
            # 501 and not 500, which the client would ask again and again
            self._send(501, traceback.format_exc().encode(), {})

    do_HEAD = do_GET = do_POST = do_PUT = handle_any

    def create_repo(self) -> dict[str, str]:
        self._check_writable()
        options = json.loads(self.body)
        repo_id = f"{options['organization'] or USER}/{options['name']}"
        if options.get("type", "model") != "model":
            raise _HubError(400, "Only models are served")
        url = f"{self.hub.endpoint}/{repo_id}"
        with self.hub.lock:
            if repo_id in self.hub.repos:
                raise _HubError(409, "You already created this model repo", url=url)
            repo = self.hub.repos[repo_id] = _Repo(repo_id, options.get("visibility") == "private")
            repo.commit({})
        return {"url": url, "name": repo_id}

    def whoami(self) -> dict[str, Any]:
        self._check_writable()
        return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}}

    def validate_yaml(self) -> dict[str, Any] | None:
        """What the Hub says of the fields that a card is judged by, of the ids of licences the usual ones."""
        front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", json.loads(self.body)["content"], re.DOTALL)
        fields = (yaml.safe_load(front[1]) if front else None) or {}
        errors = []
        if "license" in fields and fields["license"] not in _LICENSES:
            errors.append(f'"license" must be one of {list(_LICENSES)}')
        for text in _texts(fields.get("language")):
            if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", text):
                errors.append(
                    f'"language" with value "{text}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code'
                )
        for text in _texts(fields.get("base_model")):
            if not re.fullmatch(r"(?!.*(\.\.|--))[\w-][\w.-]*(/[\w-][\w.-]*)?", text):
                errors.append(
                    f'"base_model" with value "{text}" is not valid. Use a model id from https://hf.co/models.'
                )
        errors += [
            f'"tags" with value "{text}" is not valid' for text in _texts(fields.get("tags")) if not text.strip()
        ]
        answer = {"errors": [{"message": message} for message in errors], "warnings": []}
        if not errors:
            return answer
        self._send(400, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        return None

    def repo_info(self, repo_id: str, revision: str = "main") -> dict[str, Any]:
        repo = self._repo(repo_id)
        sha, files = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "siblings": siblings}

    def tree(self, repo_id: str, revision: str, path: str = "") -> list[dict[str, Any]]:
        _, files = self._commit(self._repo(repo_id), revision)
        prefix = f"{path}/" if path else ""
        found = {name: file for name, file in files.items() if name.startswith(prefix)}
        if prefix and not found:
            raise _HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        folders = {
            parent.as_posix()
            for name in found
            for parent in Path(name).parents
            if len(parent.as_posix()) >= len(prefix)
        } - {".", path}
        entries = [_entry(name, file) for name, file in found.items()]
        entries += [{"type": "directory", "path": name, "oid": _tree_oid(name), "size": 0} for name in folders]
        if self.query.get("recursive") not in ("true", "True", "1"):
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        return sorted(entries, key=lambda entry: entry["path"])

    def preupload(self, repo_id: str, revision: str) -> dict[str, Any]:
        self._check_writable()
        _, files = self._commit(self._repo(repo_id), revision)
        answers = []
        for item in json.loads(self.body)["files"]:
            is_lfs = item["size"] > _LARGEST_REGULAR_FILE or b"\0" in base64.b64decode(item["sample"])
            there = files.get(item["path"])
            answers.append(
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if is_lfs else "regular",
                    "shouldIgnore": False,
                    "oid": there and there.etag,
                }
            )
        return {"files": answers}

    def lfs_batch(self, repo_id: str) -> dict[str, Any]:
        self._check_writable()
        self._repo(repo_id)
        verify = {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/verify"}
        objects = []
        for item in json.loads(self.body)["objects"]:
            oid, size = item["oid"], item["size"]
            objects.append({"oid": oid, "size": size})
            if oid in self.hub.large_files:
                continue
            href = f"{self.hub.endpoint}/large-files/{oid}"
            upload: dict[str, Any] = {"href": href}
            if size > self.hub.part_size:
                count = -(-size // self.hub.part_size)
                upload["header"] = {str(number): f"{href}/{number}" for number in range(1, count + 1)}
                upload["header"]["chunk_size"] = str(self.hub.part_size)
            objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> dict[str, Any]:
        self._keep_large_file(oid, self.body)
        return {}

    def lfs_put_part(self, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = self.body
        self._send(200, b"", {"ETag": _part_etag(self.body)})

    def lfs_complete(self, oid: str) -> dict[str, Any]:
        parts = []
        for expected, item in enumerate(json.loads(self.body)["parts"], start=1):
            part = self.hub.parts.pop((oid, item["partNumber"]), b"")
            if item["partNumber"] != expected or item["etag"] != _part_etag(part):
                raise _HubError(400, f"Part {expected} is not what was uploaded")
            parts.append(part)
        self._keep_large_file(oid, b"".join(parts))
        return {}

    def lfs_verify(self, repo_id: str) -> dict[str, Any]:
        self._check_writable()
        self._repo(repo_id)
        item = json.loads(self.body)
        if len(self.hub.large_files.get(item["oid"], b"")) != item["size"]:
            raise _HubError(404, f"Object {item['oid']} of {item['size']} bytes was not uploaded")
        return {}

    def commit(self, repo_id: str, revision: str) -> dict[str, Any]:
        self._check_writable()
        repo = self._repo(repo_id)
        if revision not in repo.heads:
            raise _HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        answer = {}
        with self.hub.lock:
            branch, head = revision, repo.heads[revision]
            if self.query.get("create_pr") == "1":
                number = 1 + sum(name.startswith("refs/pr/") for name in repo.heads)
                branch = f"refs/pr/{number}"
                answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{number}"
            files = dict(repo.commits[head])
            for line in self.body.splitlines():
                item = json.loads(line)
                if item["key"] == "header":
                    self.hub.headers.append(json.dumps(item["value"]))
                self._apply(item["key"], item["value"], files, head)
            sha = repo.commit(files, branch)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": "", **answer}

    def create_branch(self, repo_id: str, revision: str) -> dict[str, Any]:
        self._check_writable()
        repo = self._repo(repo_id)
        if revision in repo.heads:
            raise _HubError(409, f"Reference already exists: {revision}")
        repo.heads[revision] = repo.heads["main"]
        return {}

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        sha, files = self._commit(self._repo(repo_id), revision)
        if path not in files:
            raise _HubError(404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": sha})
        file = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        start, end = _byte_range(self.headers.get("Range"), len(file.data))
        status = 200
        if self.headers.get("Range"):
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(file.data)}"
        self._send(status, file.data[start:end], headers, cut="download")

    def _route(self) -> tuple[Callable[..., Any], dict[str, str]]:
        for method, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, self.path)
            if match and self.command in method.split():
                return function, {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
        raise _HubError(501, f"{self.command} {self.path} is not served")

    def _check_credentials(self) -> None:
        given = self.headers.get("Authorization")
        self.is_user = given == f"Bearer {self.hub.token}"
        if given is not None and not self.is_user:
            raise _HubError(401, "Invalid credentials in Authorization header")

    def _check_writable(self) -> None:
        if not self.is_user:
            raise _HubError(401, "Invalid username or password.")

    def _repo(self, repo_id: str) -> _Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.is_user):
            # strangers must not learn whether it exists
            raise _HubError(404 if self.is_user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _commit(self, repo: _Repo, revision: str) -> tuple[str, dict[str, _File]]:
        sha = repo.heads.get(revision, revision)
        if sha not in repo.commits:
            raise _HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, _File], head: str) -> None:
        """One line of a commit."""
        if key == "header":
            if value.get("parentCommit", head) != head:
                raise _HubError(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[value["path"]] = _File(base64.b64decode(value["content"]), is_lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large_files:
                raise _HubError(400, f"{value['path']}: object {value['oid']} was not uploaded")
            files[value["path"]] = _File(self.hub.large_files[value["oid"]], is_lfs=True)
        elif key == "deletedFile":
            del files[value["path"]]
        elif key == "deletedFolder":
            for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
                del files[path]
        else:
            raise _HubError(400, f"Unknown operation {key!r}")

    def _keep_large_file(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise _HubError(400, f"{len(data)} bytes were received, whose SHA-256 is not {oid}")
        self.hub.large_files[oid] = data

    def _read_body(self) -> bytes:
        """The body of the request, whole or in chunks.

        Raises:
            _Cut: it is a large file (or part), and the test wants it cut.
        """
        received = bytearray()
        is_file = self.command == "PUT"
        for piece in self._body_pieces():
            received += piece
            if is_file and self.hub.take_cut("upload", len(received)) is not None:
                raise _Cut
        return bytes(received)

    def _body_pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield from self._read_exactly(int(self.headers.get("Content-Length", 0)))
            return
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            yield from self._read_exactly(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _read_exactly(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self.rfile.read1(min(size, _CHUNK))
            if not piece:
                raise ConnectionError("the client went away")
            size -= len(piece)
            yield piece

    def _send(self, status: int, data: bytes, headers: Mapping[str, str], cut: str | None = None) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = self.hub.take_cut(cut, len(data)) if cut is not None else None
        self.wfile.write(data[:end])
        if end is not None:
            raise _Cut


def _entry(path: str, file: _File) -> dict[str, Any]:
    """A file in a tree listing."""
    entry = {"type": "file", "path": path, "oid": file.git_oid, "size": len(file.data)}
    if file.is_lfs:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
    return entry


def _texts(value: Any) -> list[str]:
    """A field of a card that is one text or several."""
    return [] if value is None else [str(text) for text in (value if isinstance(value, list) else [value])]


def _tree_oid(path: str) -> str:
    return hashlib.sha1(b"tree " + path.encode()).hexdigest()


def _part_etag(part: bytes) -> str:
    return f'"{hashlib.md5(part).hexdigest()}"'


def _byte_range(header: str | None, size: int) -> tuple[int, int]:
    """Start and end (exclusive) of ``bytes=a-b`` or ``bytes=a-``; all of it without a header."""
    if not header:
        return 0, size
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", header)
    if match is None or int(match[1]) >= size:
        raise _HubError(416, f"Range {header!r} cannot be satisfied", headers={"Content-Range": f"bytes */{size}"})
    return int(match[1]), min(int(match[2]) + 1, size) if match[2] else size


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/models/{_REPO}", _Handler.repo_info),
    ("GET", rf"/api/models/{_REPO}/revision/{_REVISION}", _Handler.repo_info),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("POST", rf"/api/models/{_REPO}/branch/{_REVISION}", _Handler.create_branch),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/verify", _Handler.lfs_verify),
    ("PUT", r"/large-files/(?P<oid>\w+)", _Handler.lfs_put),
    ("PUT", r"/large-files/(?P<oid>\w+)/(?P<number>\d+)", _Handler.lfs_put_part),
    ("POST", r"/large-files/(?P<oid>\w+)", _Handler.lfs_complete),
    ("GET HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
