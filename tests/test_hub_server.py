"""The Hub of the tests holds what the real client expects of the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, create_repo, hf_hub_download, snapshot_download, upload_file
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils.hub import cached_file, resolve_revision

from tests.hub_server import UPLOAD_WARNING, Hub, Request, hub_server

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)
REPO = "tester/model"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_server() as hub, hub.client(tmp_path / "home"):
        yield hub


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(token=hub.token)


def noise(size: int) -> bytes:
    """Bytes that the client must upload as a large file."""
    return b"\0" + np.random.default_rng(size).bytes(size - 1)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def asked(hub: Hub, method: str, part: str) -> list[Request]:
    return [request for request in hub.requests if request.method == method and part in request.path]


def read(folder: str | Path) -> dict[str, bytes]:
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


FILES = {
    "config.json": b"{}\n",
    "README.md": b"---\nlicense: mit\n---\n",
    "part/of/weights.safetensors": noise(3_000),
    "empty": b"",
}


def test_folder_up_and_down(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    assert api.whoami()["name"] == "tester"
    assert api.create_repo("model").repo_id == REPO
    commit = api.upload_folder(repo_id=REPO, folder_path=write(tmp_path / "up", FILES))
    assert hub.files(REPO) == hub.files(REPO, commit.oid) == FILES
    assert [len(asked(hub, "PUT", "/large-files/")), len(asked(hub, "POST", "/verify"))] == [1, 1]
    assert read(snapshot_download(REPO)) == FILES
    tree = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert tree.keys() == {*FILES, "part", "part/of"}
    assert tree["part/of/weights.safetensors"].lfs.size == 3_000 and tree["config.json"].lfs is None
    assert [entry.path for entry in api.list_repo_tree(REPO)] == ["README.md", "config.json", "empty", "part"]
    assert [entry.path for entry in api.list_repo_tree(REPO, "part")] == ["part/of"]
    assert sorted(api.list_repo_files(REPO)) == sorted(FILES)


def test_what_is_there_is_not_uploaded_again(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO)
    folder = write(tmp_path / "up", FILES)
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    write(folder, {"again.safetensors": FILES["part/of/weights.safetensors"]})
    second = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert second.oid != first.oid and "again.safetensors" in hub.files(REPO)
    assert len(asked(hub, "PUT", "/large-files/")) == 1
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == second.oid


def test_create_twice(hub: Hub, api: HfApi) -> None:
    api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi().create_repo("tester/other")
    assert list(hub.repos) == [REPO]


def test_revisions(hub: Hub, api: HfApi) -> None:
    api.create_repo(REPO)
    commits = [api.upload_file(repo_id=REPO, path_in_repo="file", path_or_fileobj=data) for data in (b"1", b"2")]
    assert api.model_info(REPO).sha == commits[1].oid != commits[0].oid
    contents = {
        revision: Path(hf_hub_download(REPO, "file", revision=revision)).read_bytes()
        for revision in ("main", commits[0].oid, commits[1].oid)
    }
    assert contents == {"main": b"2", commits[0].oid: b"1", commits[1].oid: b"2"}
    assert hub.files(REPO, commits[0].oid) == {"file": b"1"}
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(repo_id=REPO, path_in_repo="file", path_or_fileobj=b"3", parent_commit=commits[0].oid)
    api.delete_file("file", REPO)
    assert hub.files(REPO) == {}


def test_not_found(api: HfApi) -> None:
    api.create_repo(REPO)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "file")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "file", revision="other")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("tester/other", "file", token=api.token)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "folder"))


def test_private(hub: Hub, api: HfApi) -> None:
    api.create_repo(REPO, private=True)
    api.upload_file(repo_id=REPO, path_in_repo="file", path_or_fileobj=b"secret")
    for token in (None, "hf_of_another"):
        with pytest.raises(HfHubHTTPError) as caught:
            HfApi(token=token).model_info(REPO)
        assert caught.value.response.status_code == 401
        with pytest.raises(HfHubHTTPError, match="401"):
            hf_hub_download(REPO, "file", token=token)
        with pytest.raises(HfHubHTTPError, match="401"):
            HfApi(token=token).upload_file(repo_id=REPO, path_in_repo="file", path_or_fileobj=b"changed")
    assert hub.files(REPO) == {"file": b"secret"}
    assert Path(hf_hub_download(REPO, "file", token=hub.token)).read_bytes() == b"secret"
    assert asked(hub, "GET", "/resolve/")[-1].headers["authorization"] == f"Bearer {hub.token}"


def test_upload_in_parts(tmp_path: Path) -> None:
    data = noise(2_500)
    with hub_server(part_size=1_000) as hub, hub.client(tmp_path):
        api = HfApi(token=hub.token)
        api.create_repo(REPO)
        api.upload_file(repo_id=REPO, path_in_repo="weights", path_or_fileobj=write(tmp_path, {"w": data}) / "w")
        assert hub.files(REPO) == {"weights": data}
        parts = [request.path.rpartition("/")[2] for request in asked(hub, "PUT", "/large-files/")]
        assert parts == ["1", "2", "3"]


@pytest.mark.parametrize(("part_size", "puts"), [(3_000_000, 2), (2_000_000, 3)])
def test_cut_upload(tmp_path: Path, part_size: int, puts: int) -> None:
    """The client sends it, or the part, again from the start."""
    data = noise(3_000_000)
    with hub_server(part_size) as hub, hub.client(tmp_path):
        api = HfApi(token=hub.token)
        api.create_repo(REPO)
        hub.cut_upload_after(1_000_000)
        api.upload_file(repo_id=REPO, path_in_repo="weights", path_or_fileobj=write(tmp_path, {"w": data}) / "w")
        assert hub.files(REPO) == {"weights": data}
        assert len(asked(hub, "PUT", "/large-files/")) == puts


def test_cut_download(hub: Hub, api: HfApi) -> None:
    """The client goes on where it was cut; it keeps what it has in steps of 10 MiB."""
    data, step = noise(12_000_000), 10 * 2**20
    api.create_repo(REPO)
    api.upload_file(repo_id=REPO, path_in_repo="weights", path_or_fileobj=data)
    hub.cut_download_after(11_000_000)
    assert Path(hf_hub_download(REPO, "weights")).read_bytes() == data
    assert [request.headers.get("range") for request in asked(hub, "GET", "/resolve/")] == [None, f"bytes={step}-"]


def test_from_another_process(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO, private=True)
    api.upload_file(repo_id=REPO, path_in_repo="file", path_or_fileobj=b"for it")
    code = f"from huggingface_hub import hf_hub_download; print(open(hf_hub_download({REPO!r}, 'file')).read())"
    environment = {**os.environ, **hub.environment(tmp_path / "other", token=hub.token)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "for it\n", done.stderr


def test_one_after_another(tmp_path: Path) -> None:
    """Neither library remembers a server that is gone."""
    for content in (b'{"a": 1}', b'{"a": 2}'):
        with hub_server() as hub, hub.client(tmp_path / content.hex()):
            create_repo(REPO, token=hub.token)
            commit = upload_file(repo_id=REPO, path_in_repo="config.json", path_or_fileobj=content, token=hub.token)
            assert Path(cached_file(REPO, "config.json")).read_bytes() == content
            assert resolve_revision(REPO).resolved == commit.oid
