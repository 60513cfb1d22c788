"""Damaged checkpoints, drawn: each loads right or raises a ValueError, and nothing outside its directory is read."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.configs import tiny_moshi_config
from tests.test_modeling_flax_utils import FlaxToyWithHead, same

FORMS: dict[str, dict[str, Any]] = {
    "flax": {},
    "sharded flax": {"max_shard_size": 2000},
    "pt": {"to_pt": True},
    "sharded pt": {"to_pt": True, "max_shard_size": 2000},
    "msgpack": {"safe_serialization": False},
    "sharded msgpack": {"safe_serialization": False, "max_shard_size": 2000},
}
EVIL_NAMES = ["../outside.safetensors", "/etc/passwd", "..", "", "a/b", "\0", "x" * 5000, "config.json", ".", "\\x"]
VALUES = st.one_of(
    st.none(),
    st.integers(-3, 2**70),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=3),
    st.sampled_from(EVIL_NAMES),
)

opened: list[str] = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[FlaxToyWithHead, Path]:
    root = tmp_path_factory.mktemp("sound")
    model = FlaxToyWithHead(tiny_moshi_config(), seed=1)
    for form, options in FORMS.items():
        model.save_pretrained(root / form, **options)
    return model, root


def damage_bytes(data: st.DataObject, path: Path) -> None:
    """Flip, cut, insert or overwrite somewhere; half the time near the beginning, where headers are."""
    content = bytearray(path.read_bytes())
    near = data.draw(st.sampled_from([64, 1024, len(content)]))
    place = data.draw(st.integers(0, min(near, len(content) - 1)))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "overwrite"]))
    if kind == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[place:]
    else:
        extra = data.draw(st.binary(min_size=1, max_size=12))
        content[place : place + (len(extra) if kind == "overwrite" else 0)] = extra
    path.write_bytes(content)


def change_json(data: st.DataObject, values: Any) -> Any:
    """Replace, remove, rename or add something, at any depth."""
    if not isinstance(values, dict | list) or not values or data.draw(st.integers(0, 3)) == 0:
        return data.draw(VALUES)
    if isinstance(values, list):
        place = data.draw(st.integers(0, len(values) - 1))
        return [change_json(data, value) if index == place else value for index, value in enumerate(values)]
    key = data.draw(st.sampled_from(sorted(values)))
    kind = data.draw(st.sampled_from(["change", "change", "remove", "rename", "add"]))
    rest = {name: value for name, value in values.items() if name != key or kind == "add"}
    if kind == "remove":
        return rest
    if kind == "add":
        return {**rest, data.draw(st.text(max_size=4)): data.draw(VALUES)}
    if kind == "rename":
        return {**rest, data.draw(st.sampled_from([*sorted(values), "x", ""])): values[key]}
    return {**rest, key: change_json(data, values[key])}


def damage_json(data: st.DataObject, path: Path) -> None:
    """Change something in an index or in the header of a safetensors file."""
    content = path.read_bytes()
    if path.suffix == ".json":
        path.write_text(json.dumps(change_json(data, json.loads(content))))
        return
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(change_json(data, json.loads(content[8 : 8 + length]))).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


@settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_loads_right_or_raises_our_error(
    checkpoints: tuple[FlaxToyWithHead, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    model, sound = checkpoints
    form = data.draw(st.sampled_from(sorted(FORMS)))
    root = tmp_path_factory.mktemp("damaged")
    folder = root / "checkpoint"
    shutil.copytree(sound / form, folder)
    (root / "outside.safetensors").write_bytes(b"secret")
    path = data.draw(
        st.sampled_from(sorted(path for path in folder.iterdir() if path.name != "generation_config.json"))
    )
    in_json = path.suffix in (".json", ".safetensors") and "config" not in path.name and data.draw(st.booleans())
    (damage_json if in_json else damage_bytes)(data, path)
    opened.clear()
    try:
        loaded = FlaxToyWithHead.from_pretrained(folder, from_pt="pt" in form, verify=True)
    except ValueError as error:
        assert str(error)
    else:
        # msgpack has no checksums, and a changed configuration is another model
        assert "msgpack" in form or path.name == "config.json" or same(loaded.params, model.params)
    finally:
        shutil.rmtree(root)
    assert not [name for name in opened if name.endswith(("outside.safetensors", "/etc/passwd"))]
