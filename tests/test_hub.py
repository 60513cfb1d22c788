"""Models on a Hub of the tests' own, through the real client: upload, model card, download, private, cut off."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from tests.configs import tiny_moshi_config
from tests.hub_server import UPLOAD_WARNING, Hub, hub_server
from tests.random_model import RANDOM_MODEL
from tests.test_modeling_flax_utils import FlaxToyWithHead, same
from transformers_moshi_flax import FlaxMoshiForCausalLM
from transformers_moshi_flax.checkpoints.companions import copy_companions
from transformers_moshi_flax.checkpoints.files import Source, is_weights
from transformers_moshi_flax.model_card import is_generated

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_server() as hub, hub.client(tmp_path / "home"):
        yield hub


@pytest.fixture(scope="module")
def model() -> FlaxToyWithHead:
    return FlaxToyWithHead(tiny_moshi_config(), seed=1)


FORMS = {
    "single": {},
    "sharded": {"max_shard_size": 2000},
    "msgpack": {"safe_serialization": False},
    "sharded msgpack": {"safe_serialization": False, "max_shard_size": 2000},
    "pt": {"to_pt": True},
    "sharded pt": {"to_pt": True, "max_shard_size": 2000},
}


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_pushed_and_pulled(hub: Hub, model: FlaxToyWithHead, options: dict):
    commit = model.push_to_hub("tester/toy", token=hub.token, **options)
    assert commit.oid
    again = FlaxToyWithHead.from_pretrained("tester/toy")
    assert same(again.params, model.params) and again.name_or_path == "tester/toy"
    # another version later, the first one by its revision
    model.push_to_hub("tester/toy", params=model.to_bf16(model.params), token=hub.token, **options)
    assert FlaxToyWithHead.from_pretrained("tester/toy", force_download=True).dtype == jnp.bfloat16
    assert same(FlaxToyWithHead.from_pretrained("tester/toy", revision=commit.oid).params, model.params)


def test_what_is_pushed_replaces_other_forms(hub: Hub, model: FlaxToyWithHead, tmp_path: Path):
    """From the form that is looked for first to the last one and back."""
    api = HfApi(token=hub.token)
    api.create_repo("tester/toy")
    stale = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"]
    others = ["notes.txt", "adapter.safetensors", "onnx/model.safetensors", "tokenizer.json"]
    api.create_commit(
        "tester/toy",
        [CommitOperationAdd(name, b"not ours") for name in [*stale, *others]],
        commit_message="others",
    )
    for number, form in enumerate([*FORMS, *reversed(FORMS)]):
        params = jax.tree.map(lambda leaf, number=number: leaf + number, model.params)
        if number % 2:
            model.save_pretrained(
                tmp_path / "toy", params, push_to_hub=True, repo_id="tester/toy", token=hub.token, **FORMS[form]
            )
        else:
            model.push_to_hub("tester/toy", params, token=hub.token, **FORMS[form])
        assert same(FlaxToyWithHead.from_pretrained("tester/toy").params, params), form
        files = set(hub.files("tester/toy"))
        weights = {layout: {name for name in files if is_weights(name, layout)} for layout in ("flax", "pt")}
        assert not files & set(stale) and set(others) <= files
        written = weights["pt" if "pt" in form.split() else "flax"]
        assert (len(written) > 1) == ("sharded" in form)
        # PyTorch's stay beside those of Flax, which are what is loaded, but not the other way round
        assert bool(weights["flax"]) != ("pt" in form.split()) and bool(weights["pt"]) == (
            number >= list(FORMS).index("pt")
        )
    other = FlaxToyWithHead(tiny_moshi_config(sliding_window=7))
    other.push_to_hub("tester/toy", token=hub.token)
    assert FlaxToyWithHead.from_pretrained("tester/toy").config.sliding_window == 7
    assert not any(is_weights(name, "pt") for name in hub.files("tester/toy"))


def test_branches_and_pull_requests(hub: Hub, model: FlaxToyWithHead):
    model.push_to_hub("tester/toy", token=hub.token)
    main = hub.files("tester/toy")
    other = jax.tree.map(lambda leaf: leaf + 1, model.params)
    for number in (1, 2):  # made by the first one
        params = jax.tree.map(lambda leaf, number=number: leaf + number, model.params)
        model.push_to_hub("tester/toy", params, token=hub.token, revision="dev")
        assert same(FlaxToyWithHead.from_pretrained("tester/toy", revision="dev", force_download=True).params, params)
    commit = model.push_to_hub("tester/toy", other, token=hub.token, create_pr=True)
    assert commit.pr_url.endswith("/tester/toy/discussions/1")
    assert same(FlaxToyWithHead.from_pretrained("tester/toy", revision="refs/pr/1").params, other)
    model.push_to_hub("tester/toy", model.params, token=hub.token, revision="refs/pr/1")
    assert same(FlaxToyWithHead.from_pretrained("tester/toy", revision="refs/pr/1").params, model.params)
    assert hub.files("tester/toy") == main


def test_a_checkpoint_of_kyutai_is_not_replaced(hub: Hub, model: FlaxToyWithHead):
    api = HfApi(token=hub.token)
    api.create_repo("tester/toy")
    files = {"config.json": b'{"moshi_name": "lm.safetensors"}', "lm.safetensors": b"weights"}
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    api.create_commit("tester/toy", operations, commit_message="theirs")
    there = hub.files("tester/toy")
    with pytest.raises(ValueError, match=r"repo_id='tester/toy' holds a checkpoint in Kyutai's format"):
        model.push_to_hub("tester/toy", token=hub.token)
    assert hub.files("tester/toy") == there


def test_a_directory_of_the_same_name_is_not_the_repository(
    hub: Hub, model: FlaxToyWithHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model.push_to_hub("tester/toy", token=hub.token, to_pt=True)
    monkeypatch.chdir(tmp_path)
    other = FlaxToyWithHead(tiny_moshi_config(sliding_window=7))
    other.save_pretrained("tester/toy", push_to_hub=True, repo_id="tester/toy", token=hub.token)
    # those of PyTorch would stay beside ones of the same configuration
    assert not any(is_weights(name, "pt") for name in hub.files("tester/toy"))


def test_a_commit_of_others_meanwhile_is_not_lost(hub: Hub, model: FlaxToyWithHead, monkeypatch: pytest.MonkeyPatch):
    """Else two that push different forms at once would leave both."""
    model.push_to_hub("tester/toy", token=hub.token)
    repo_info = HfApi.repo_info

    def overtaken(api: HfApi, *args: str, **options: str) -> object:
        info = repo_info(api, *args, **options)
        api.upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id="tester/toy")
        return info

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "repo_info", overtaken)
        with pytest.raises(HfHubHTTPError, match="try again"):
            model.push_to_hub("tester/toy", token=hub.token, to_pt=True)
    assert {"notes.txt", "flax_model.safetensors"} <= set(hub.files("tester/toy"))


def test_saving_pushes_what_was_written_and_nothing_else(hub: Hub, model: FlaxToyWithHead, tmp_path: Path):
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "private.txt").write_text("secret")
    (folder / "flax_model.msgpack").write_text("of another save")
    model.save_pretrained(folder, push_to_hub=True, token=hub.token)
    expected = {"README.md", "config.json", "flax_model.safetensors", "generation_config.json"}
    assert set(hub.files("tester/toy")) - {".gitattributes"} == expected
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    model.save_pretrained(folder, push_to_hub=True, token=hub.token, repo_id="tester/other")
    assert hub.files("tester/other")["README.md"].endswith(b"mine\n")


def test_private_repositories(hub: Hub, model: FlaxToyWithHead):
    model.push_to_hub("tester/secret", token=hub.token, private=True)
    with pytest.raises(OSError, match="tester/secret"):
        FlaxToyWithHead.from_pretrained("tester/secret", token=False)
    assert same(FlaxToyWithHead.from_pretrained("tester/secret", token=hub.token).params, model.params)


def test_what_is_not_there(hub: Hub, model: FlaxToyWithHead):
    with pytest.raises(OSError, match="'tester/nothing' is neither a directory here nor a repository of the Hub"):
        FlaxToyWithHead.from_pretrained("tester/nothing")
    model.push_to_hub("tester/toy", token=hub.token)
    with pytest.raises(OSError, match="no-such-branch"):
        FlaxToyWithHead.from_pretrained("tester/toy", revision="no-such-branch")
    with pytest.raises(OSError, match=r"config\.json"):
        FlaxToyWithHead.from_pretrained("tester/toy", subfolder="inner")


def test_offline_uses_the_cache(hub: Hub, model: FlaxToyWithHead):
    with pytest.raises(OSError, match="tester/toy"):
        FlaxToyWithHead.from_pretrained("tester/toy", local_files_only=True)
    model.push_to_hub("tester/toy", token=hub.token)
    FlaxToyWithHead.from_pretrained("tester/toy")
    before = len(hub.requests)
    assert same(FlaxToyWithHead.from_pretrained("tester/toy", local_files_only=True).params, model.params)
    assert len(hub.requests) == before


def test_a_cut_upload_commits_nothing_and_can_be_repeated(hub: Hub, model: FlaxToyWithHead):
    model.push_to_hub("tester/toy", token=hub.token)
    before = hub.files("tester/toy")
    other = jax.tree.map(lambda leaf: leaf + 1, model.params)
    hub.cut_upload_after(1000)
    try:
        model.push_to_hub("tester/toy", params=other, token=hub.token)
    except (HfHubHTTPError, OSError, RuntimeError):
        assert hub.files("tester/toy") == before
        model.push_to_hub("tester/toy", params=other, token=hub.token)
    # else the client has tried again by itself
    assert same(FlaxToyWithHead.from_pretrained("tester/toy").params, other)


def test_a_cut_download_is_resumed(hub: Hub, model: FlaxToyWithHead, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    model.push_to_hub("tester/toy", token=hub.token)
    hub.cut_download_after(5000)
    assert same(FlaxToyWithHead.from_pretrained("tester/toy").params, model.params)
    assert [request for request in hub.requests if request.headers.get("Range")]


def test_the_model_card_tells_what_it_is(hub: Hub, model: FlaxToyWithHead, tmp_path: Path):
    model.push_to_hub("tester/toy", token=hub.token, license="cc-by-4.0", language="en", tags=["test"])
    card = ModelCard(hub.files("tester/toy")["README.md"].decode())
    values = card.data.to_dict()
    assert values["license"] == "cc-by-4.0" and values["language"] == ["en"]
    assert values["library_name"] == "transformers-moshi-flax" and {"moshi", "flax", "test"} <= set(values["tags"])
    assert "base_model" not in values
    assert 'FlaxToyWithHead.from_pretrained("tester/toy")' in card.text
    assert "moshi-flax convert tester/toy converted --to pt" in card.text
    assert f"| in all | {model.num_parameters():,} |" in card.text
    assert "random, or trained from random ones" in card.text
    weights = hub.files("tester/toy")["flax_model.safetensors"]
    assert hashlib.sha256(weights).hexdigest() in card.text and f"{len(weights):,}" in card.text
    # what was loaded from there and pushed elsewhere says so
    FlaxToyWithHead.from_pretrained("tester/toy").push_to_hub("tester/copy", token=hub.token, to_pt=True)
    card = ModelCard(hub.files("tester/copy")["README.md"].decode())
    assert card.data.to_dict()["base_model"] == "tester/toy" and "were loaded from `tester/toy`" in card.text
    assert 'ToyWithHead.from_pretrained("tester/copy")' in card.text and "--to pt" not in card.text


def card_of(hub: Hub) -> str:
    return hub.files("tester/toy")["README.md"].decode()


def test_a_second_save_and_push_has_its_own_card(hub: Hub, model: FlaxToyWithHead, tmp_path: Path):
    for params in (model.params, jax.tree.map(lambda leaf: leaf + 1, model.params)):
        model.save_pretrained(tmp_path / "toy", params, push_to_hub=True, token=hub.token)
        assert hashlib.sha256(hub.files("tester/toy")["flax_model.safetensors"]).hexdigest() in card_of(hub)


@pytest.mark.parametrize("edit", ["mine\n", None])
def test_a_card_of_a_person_is_kept(
    hub: Hub, model: FlaxToyWithHead, tmp_path: Path, caplog: pytest.LogCaptureFixture, edit: str | None
):
    """Both one that is new and one that was generated and edited."""
    model.save_pretrained(tmp_path / "toy", push_to_hub=True, token=hub.token)
    mine = edit or card_of(hub).replace("## Architecture", "Do not use it for songs.\n\n## Architecture")
    HfApi(token=hub.token).upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id="tester/toy")
    model.push_to_hub("tester/toy", token=hub.token, to_pt=True, license="mit")
    assert "README.md that somebody has written" in caplog.text and "without {'license': 'mit'}" in caplog.text
    assert card_of(hub) == mine
    model.save_pretrained(tmp_path / "toy", push_to_hub=True, token=hub.token)
    assert card_of(hub) == mine
    # the one in the directory goes with it
    (tmp_path / "toy" / "README.md").write_text("a newer one of mine\n")
    model.save_pretrained(tmp_path / "toy", push_to_hub=True, token=hub.token)
    assert card_of(hub) == "a newer one of mine\n"


def test_line_ends_are_no_edit(hub: Hub, model: FlaxToyWithHead):
    model.push_to_hub("tester/toy", token=hub.token)
    assert is_generated(card_of(hub)) and is_generated(card_of(hub).replace("\n", "\r\n").rstrip())
    assert not is_generated(card_of(hub).replace("audio-to-audio", "text-to-speech"))
    assert not is_generated("") and not is_generated("# Mine\n")


def test_paths_of_this_machine_stay_here(
    hub: Hub, model: FlaxToyWithHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "secret").mkdir()
    model.save_pretrained(tmp_path / "secret" / "run")
    monkeypatch.chdir(tmp_path)
    for number, path in enumerate([tmp_path / "secret" / "run", "secret/run"]):
        loaded = FlaxToyWithHead.from_pretrained(path)
        if number:  # where it is not there any more, it must not be taken for a Hub id
            (tmp_path / "secret").rename(tmp_path / "elsewhere")
        loaded.push_to_hub("tester/toy", token=hub.token)
        assert not [name for name, content in hub.files("tester/toy").items() if b"secret" in content]
        assert "loaded from local files" in card_of(hub)


BAD_FIELDS = [
    ({"licence": "mit"}, "licence='mit' is no field of the model card, .*; did you mean 'license'"),
    ({"privat": True}, "did you mean 'private'"),
    ({"tags": "speech"}, "tags='speech' must be a list"),
    ({"tags": ["speech", " "]}, "tags=' ' is no tag"),
    ({"tags": ["a\nb"]}, r"tags='a\\nb' is no tag"),
    ({"language": 5}, "language=5 must be"),
    ({"language": "English"}, "language='English' is no code"),
    ({"language": ["en", "en-US"]}, "language='en-US' is no code"),
    ({"license": ["mit"]}, "license=.'mit'. must be a text"),
    ({"license": "CC BY 4.0"}, "license='CC BY 4.0' is no id"),
    ({"license": ""}, "license='' is no id"),
    ({"base_model": "/data/run 1"}, "base_model='/data/run 1' is no id of a model"),
    ({"base_model": "../m"}, "base_model='../m' is no id of a model"),
    ({"base_model": "a/b/c"}, "base_model='a/b/c' is no id of a model"),
    ({"private": "yes"}, "private='yes' must be True, False, or None"),
    ({"revision": "a draft"}, "revision='a draft' is no name of a branch"),
    ({"revision": "../main"}, r"revision='\.\./main' is no name of a branch"),
    ({"revision": "draft.lock"}, "revision='draft.lock' is no name of a branch"),
    ({"use_temp_dir": "here"}, "use_temp_dir='here' must be"),
]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("options, message", BAD_FIELDS)
def test_bad_fields_of_the_card_are_refused_before_any_request(
    hub: Hub, model: FlaxToyWithHead, tmp_path: Path, options: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        model.push_to_hub("tester/toy", token=hub.token, **options)
    if "use_temp_dir" not in options:
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "toy", push_to_hub=True, token=hub.token, **options)
        assert not (tmp_path / "toy").exists()
    assert not hub.requests


def test_what_only_the_hub_refuses_makes_nothing_either(hub: Hub, model: FlaxToyWithHead, tmp_path: Path):
    """Such as a licence of the right form that it does not know, also in a card that somebody has written."""
    with pytest.raises(ValueError, match=r'Hub refuses the model card for .*: "license" must be one of'):
        model.push_to_hub("tester/toy", token=hub.token, license="mit-0.5")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "README.md").write_text("---\nlanguage: English\n---\nmine\n")
    with pytest.raises(ValueError, match=r'Hub refuses the model card for .*: "language" with value'):
        model.save_pretrained(tmp_path / "toy", push_to_hub=True, token=hub.token)
    assert not hub.repos
    model.push_to_hub("tester/toy", token=hub.token)
    before = dict(hub.repos["tester/toy"].heads)
    with pytest.raises(ValueError, match="must be one of"):
        model.push_to_hub("tester/toy", token=hub.token, license="mit-0.5", revision="draft")
    assert hub.repos["tester/toy"].heads == before


def test_a_branch_is_not_made_for_what_is_refused(hub: Hub, model: FlaxToyWithHead):
    api = HfApi(token=hub.token)
    api.create_repo("tester/toy")
    operations = [CommitOperationAdd("config.json", b'{"moshi_name": "lm.safetensors"}')]
    api.create_commit("tester/toy", operations, commit_message="theirs")
    with pytest.raises(ValueError, match="Kyutai's format"):
        model.push_to_hub("tester/toy", token=hub.token, revision="draft")
    assert set(hub.repos["tester/toy"].heads) == {"main"}


def test_what_is_to_be_private_is_not_published(
    hub: Hub, model: FlaxToyWithHead, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model.push_to_hub("tester/toy", token=hub.token, private=False)
    before = dict(hub.repos["tester/toy"].heads)
    for revision in (None, "draft"):
        with pytest.raises(ValueError, match=r"private=True, but .*'tester/toy' is public.*update_repo_settings"):
            model.push_to_hub("tester/toy", token=hub.token, private=True, revision=revision)
    with pytest.raises(ValueError, match=r"private=True, but .*'tester/toy' is public"):
        model.save_pretrained(tmp_path / "toy", push_to_hub=True, token=hub.token, private=True)
    assert hub.repos["tester/toy"].heads == before and not hub.repos["tester/toy"].private
    # a name without its owner is the same repository
    with pytest.raises(ValueError, match=r"private=True, but .*'tester/toy' is public"):
        model.push_to_hub("toy", token=hub.token, private=True)
    for private in (True, True, None, False):
        model.push_to_hub("tester/secret", token=hub.token, private=private)
        assert hub.repos["tester/secret"].private
    assert "private=False, but the repository 'tester/secret' is private, and stays so" in caplog.text


def test_one_who_makes_it_public_meanwhile(hub: Hub, model: FlaxToyWithHead, monkeypatch: pytest.MonkeyPatch):
    create_repo = HfApi.create_repo

    def overtaken(api: HfApi, name: str, **options: object) -> object:
        create_repo(api, name, private=False)
        return create_repo(api, name, **options)

    monkeypatch.setattr(HfApi, "create_repo", overtaken)
    with pytest.raises(ValueError, match="is public"):
        model.push_to_hub("tester/toy", token=hub.token, private=True)
    assert set(hub.files("tester/toy")) <= {".gitattributes"}


def test_words_of_the_commit(hub: Hub, model: FlaxToyWithHead, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    words = {"commit_message": "the third epoch", "commit_description": "on our recordings"}
    model.push_to_hub("tester/toy", token=hub.token, use_temp_dir=True, **words)
    # the same files would make no commit
    other = jax.tree.map(lambda leaf: leaf + 1, model.params)
    model.save_pretrained(tmp_path / "toy", other, push_to_hub=True, use_auth_token=hub.token, revision="dev", **words)
    headers = [json.loads(header) for header in hub.headers]
    assert [(header["summary"], header["description"]) for header in headers] == [tuple(words.values())] * 2
    assert set(hub.repos["tester/toy"].heads) == {"main", "dev"}
    assert not caplog.records
    model.push_to_hub("tester/toy", token=hub.token, use_temp_dir=False)
    assert "use_temp_dir=False" in caplog.text and "save_pretrained(directory, push_to_hub=True)" in caplog.text
    with pytest.raises(ValueError, match=r"commit_message='x' has no effect without push_to_hub=True"):
        model.save_pretrained(tmp_path / "toy", commit_message="x")


def test_why_a_file_is_not_there(hub: Hub, model: FlaxToyWithHead, monkeypatch: pytest.MonkeyPatch):
    """Not in the cache, offline, no connection, missing: each is told as what it is."""
    api = HfApi(token=hub.token)
    api.create_repo("tester/empty")
    with pytest.raises(OSError, match=r"'tester/empty' has no config\.json; add that of the model"):
        FlaxToyWithHead.from_pretrained("tester/empty")
    with pytest.raises(
        OSError, match=r"config\.json of 'tester/toy' is not in the cache, .* \(local_files_only=True\)"
    ):
        FlaxToyWithHead.from_pretrained("tester/toy", local_files_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        message = (
            r"config\.json of 'tester/toy' is not in the cache, and the Hub is not asked for it, as HF_HUB_OFFLINE"
        )
        with pytest.raises(OSError, match=message):
            FlaxToyWithHead.from_pretrained("tester/toy")
    nobody = "http://127.0.0.1:9"
    template = f"{nobody}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # which the client does before it asks again
    with pytest.raises(
        OSError, match=rf"is not in the cache, and the Hub cannot be reached at {nobody} \(.*: check the"
    ):
        FlaxToyWithHead.from_pretrained("tester/toy")


def test_weights_that_are_not_in_the_cache(hub: Hub, model: FlaxToyWithHead):
    model.push_to_hub("tester/toy", token=hub.token, max_shard_size=2000)
    huggingface_hub.hf_hub_download("tester/toy", "config.json")
    with pytest.raises(OSError, match=r"flax_model\.safetensors of 'tester/toy' is not in the cache"):
        FlaxToyWithHead.from_pretrained("tester/toy", local_files_only=True)
    huggingface_hub.hf_hub_download("tester/toy", "flax_model.safetensors.index.json")
    with pytest.raises(OSError, match=r"flax_model-00001-of-\d+\.safetensors of 'tester/toy' is not in the cache"):
        FlaxToyWithHead.from_pretrained("tester/toy", local_files_only=True)


def test_what_may_lack_is_told(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Files that a checkpoint need not have, but may, where the Hub cannot be asked."""
    HfApi(token=hub.token).create_repo("tester/moshi")
    HfApi(token=hub.token).upload_folder(repo_id="tester/moshi", folder_path=RANDOM_MODEL)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        huggingface_hub.hf_hub_download("tester/moshi", name)
    FlaxMoshiForCausalLM.from_pretrained("tester/moshi", local_files_only=True)
    assert "generation_config.json of 'tester/moshi' is not in the cache" in caplog.text
    copy_companions(Source.locate("tester/moshi", local_files_only=True), tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert (
        "not copied, if there are such: added_tokens.json, chat_template.jinja, generation_config.json" in caplog.text
    )
    # what the Hub has said that it lacks is not told
    caplog.clear()
    copy_companions(Source.locate("tester/moshi"), tmp_path)
    copy_companions(Source.locate("tester/moshi", local_files_only=True), tmp_path)
    assert not caplog.text


def test_what_is_left_out_is_not_downloaded(hub: Hub):
    api = HfApi(token=hub.token)
    api.create_repo("tester/toy")
    files = {"config.json": tiny_moshi_config().to_json_string().encode(), "pytorch_model.bin": b"\0" * 100}
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    api.create_commit("tester/toy", operations, commit_message="theirs")
    with pytest.raises(OSError, match=r"pytorch_model\.bin \(a pickle: opened with from_pt=True only\)"):
        FlaxToyWithHead.from_pretrained("tester/toy")
    assert not [request for request in hub.requests if request.path.endswith("pytorch_model.bin")]
