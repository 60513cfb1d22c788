"""The auto classes: which class they choose, what they pass on, and code that comes with a checkpoint."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from transformers import AutoProcessor, BertConfig, MoshiConfig
from transformers.models.auto import processing_auto

from tests.configs import LLAMAS, tiny_mimi_config, tiny_moshi_config
from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax import (
    FLAX_MODEL_FOR_CAUSAL_LM_MAPPING,
    FLAX_MODEL_MAPPING,
    FlaxAutoModel,
    FlaxAutoModelForCausalLM,
    FlaxMimiModel,
    FlaxMoshiForCausalLM,
    FlaxMoshiModel,
    MoshiProcessor,
)
from transformers_moshi_flax.auto_processor import make_known
from transformers_moshi_flax.modeling_flax_auto import FlaxModelMapping

OWN_CODE = """
from transformers_moshi_flax import FlaxMoshiForCausalLM
from .told import TOLD


class OwnModel(FlaxMoshiForCausalLM):
    told = TOLD
"""


@pytest.fixture
def mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten."""
    for mapping in (FLAX_MODEL_MAPPING, FLAX_MODEL_FOR_CAUSAL_LM_MAPPING):
        monkeypatch.setattr(mapping, "_registered", dict(mapping._registered))


def test_classes_by_model_type() -> None:
    moshi, mimi = tiny_moshi_config(), tiny_mimi_config()
    for auto, config, name in (
        (FlaxAutoModel, moshi, "FlaxMoshiModel"),
        (FlaxAutoModelForCausalLM, moshi, "FlaxMoshiForCausalLM"),
        (FlaxAutoModel, mimi, "FlaxMimiModel"),
        (FlaxAutoModel, mimi.encoder_config, "FlaxMimiEncoderModel"),
        (FlaxAutoModel, mimi.decoder_config, "FlaxMimiDecoderModel"),
        (FlaxAutoModel, moshi.depth_decoder_config, "FlaxMoshiDepthDecoder"),
    ):
        model = auto.from_config(config, dtype=jnp.bfloat16, _do_init=False)
        assert type(model).__name__ == name and model.dtype == jnp.bfloat16 and model.config is config
    assert FLAX_MODEL_MAPPING[MoshiConfig] is FlaxMoshiModel and MoshiConfig in FLAX_MODEL_FOR_CAUSAL_LM_MAPPING
    # as scripts of `transformers` list what they can train
    kinds = {config.model_type for config in FLAX_MODEL_FOR_CAUSAL_LM_MAPPING.keys()}
    assert kinds == {"moshi", *LLAMAS} == set(FLAX_MODEL_FOR_CAUSAL_LM_MAPPING.model_types)
    assert len(FLAX_MODEL_MAPPING) == 9 + len(LLAMAS)


def test_from_pretrained(tmp_path: Path) -> None:
    model = FlaxAutoModelForCausalLM.from_pretrained(RANDOM_MODEL)
    same = FlaxMoshiForCausalLM.from_pretrained(RANDOM_MODEL)
    assert type(model) is FlaxMoshiForCausalLM
    for path, leaf in flatten_dict(same.params).items():
        np.testing.assert_array_equal(np.asarray(flatten_dict(model.params)[path]), np.asarray(leaf))
    model, params = FlaxAutoModelForCausalLM.from_pretrained(
        str(RANDOM_MODEL), jnp.float16, _do_init=False, num_codebooks=8
    )
    assert model.dtype == jnp.float16 and {leaf.dtype for leaf in flatten_dict(params).values()} == {
        np.dtype("float16")
    }
    config = MoshiConfig.from_pretrained(RANDOM_MODEL)
    config.rope_theta = 5.0
    assert FlaxAutoModel.from_pretrained(RANDOM_MODEL, config=config).config is config
    assert type(FlaxAutoModel.from_pretrained(RANDOM_MODEL, config=RANDOM_MODEL / "config.json")) is FlaxMoshiModel
    mimi = FlaxMimiModel(tiny_mimi_config())
    mimi.save_pretrained(tmp_path / "inside")
    assert type(FlaxAutoModel.from_pretrained(tmp_path, subfolder="inside")) is FlaxMimiModel
    _, info = FlaxAutoModel.from_pretrained(tmp_path / "inside", output_loading_info=True)
    assert not any(info.values())


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"FlaxAutoModel\.from_pretrained"):
        FlaxAutoModel()
    with pytest.raises(ValueError, match=r"'mimi'.*FlaxAutoModelForCausalLM.*knows gemma2, .*moshi"):
        FlaxAutoModelForCausalLM.from_config(tiny_mimi_config())
    with pytest.raises(OSError, match=r"no config\.json"):
        FlaxAutoModel.from_pretrained(tmp_path)
    for values, told in (({"model_type": "bert"}, "'bert'"), ({}, "None"), ({"moshi_name": "x"}, "from_kyutai")):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=told):
            FlaxAutoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no keyword argument 'sharing'.*did you mean 'sharding'"):
        FlaxAutoModel.from_pretrained(RANDOM_MODEL, sharing=None)


def test_registered_classes(tmp_path: Path, mappings: None) -> None:
    class OwnConfig(MoshiConfig):
        model_type = "own"

    class OwnModel(FlaxMoshiModel):
        config_class = OwnConfig

    with pytest.raises(ValueError, match="config_class MoshiConfig"):
        FlaxAutoModel.register(OwnConfig, FlaxMoshiModel)
    FlaxAutoModel.register(OwnConfig, OwnModel)
    with pytest.raises(ValueError, match="exist_ok=True"):
        FlaxAutoModel.register(OwnConfig, OwnModel)
    with pytest.raises(ValueError, match="exist_ok=True"):
        FlaxAutoModel.register(MoshiConfig, FlaxMoshiModel)
    config = OwnConfig(**{**tiny_moshi_config().to_dict(), "model_type": "own"})
    model = FlaxAutoModel.from_config(config)
    assert type(model) is OwnModel
    model.save_pretrained(tmp_path)
    assert type(FlaxAutoModel.from_pretrained(tmp_path)) is OwnModel
    assert type(FlaxAutoModel.from_pretrained(tmp_path, config=config)) is OwnModel
    assert set(FLAX_MODEL_MAPPING) >= {OwnConfig, MoshiConfig}
    # in the place of a class of this package
    FlaxAutoModelForCausalLM.register(MoshiConfig, type("OwnLM", (FlaxMoshiForCausalLM,), {}), exist_ok=True)
    assert type(FlaxAutoModelForCausalLM.from_config(tiny_moshi_config(), _do_init=False)).__name__ == "OwnLM"
    assert BertConfig not in FlaxModelMapping({"moshi": "FlaxMoshiModel"})


def test_code_goes_with_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mappings: None, caplog: pytest.LogCaptureFixture
) -> None:
    package = tmp_path / "of_somebody"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "own.py").write_text(OWN_CODE)
    (package / "told.py").write_text("TOLD = 'by its own code'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = importlib.import_module("of_somebody.own").OwnModel
    with pytest.raises(ValueError, match="'AutoModel' is no auto class"):
        own.register_for_auto_class("AutoModel")
    own.register_for_auto_class(FlaxAutoModelForCausalLM)
    assert FlaxMoshiForCausalLM._auto_class is None
    saved = tmp_path / "saved"
    own(tiny_moshi_config()).save_pretrained(saved)
    assert {"own.py", "told.py", "config.json"} <= {path.name for path in saved.iterdir()}
    values = json.loads((saved / "config.json").read_text())
    assert values["auto_map"] == {"FlaxAutoModelForCausalLM": "own.OwnModel"}

    # not run unless it is trusted, and not needed by other classes
    for trust in (None, False):
        model = FlaxAutoModelForCausalLM.from_pretrained(saved, trust_remote_code=trust)
        assert type(model) is FlaxMoshiForCausalLM
    assert type(FlaxAutoModel.from_pretrained(saved, trust_remote_code=True)) is FlaxMoshiModel
    assert not (tmp_path / "modules").exists()
    model = FlaxAutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    assert model.told == "by its own code" and type(model).__module__ != own.__module__
    # and goes on with what is loaded
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "own.py").read_text() == OWN_CODE
    # a class that the package does not have
    (saved / "config.json").write_text(json.dumps(values | {"model_type": "own"}))
    with pytest.raises(ValueError, match=r"own\.OwnModel.*trust_remote_code=True"):
        FlaxAutoModelForCausalLM.from_pretrained(saved)

    # code that is in no module cannot go along
    monkeypatch.setattr(own, "__module__", "__main__")
    own(tiny_moshi_config()).save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "own.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())


class TestAutoProcessor:
    @pytest.fixture
    def forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processing_auto.PROCESSOR_MAPPING, "_extra_content", {})

    def test_of_a_saved_processor_and_of_a_model(self, tmp_path: Path) -> None:
        MoshiProcessor.from_pretrained(RANDOM_MODEL).save_pretrained(tmp_path)
        processor = AutoProcessor.from_pretrained(tmp_path)
        assert type(processor) is MoshiProcessor and processor.frame_size == 1920
        assert type(AutoProcessor.from_pretrained(RANDOM_MODEL)) is MoshiProcessor

    def test_imported_before(self, forgotten: None) -> None:
        assert type(AutoProcessor.from_pretrained(RANDOM_MODEL)) is not MoshiProcessor
        make_known()
        assert type(AutoProcessor.from_pretrained(RANDOM_MODEL)) is MoshiProcessor

    def test_imported_after(self, tmp_path: Path) -> None:
        """In a new process: nothing is imported until it is needed."""
        code = (
            "import sys, transformers_moshi_flax\n"
            "assert 'transformers' not in sys.modules and 'jax' not in sys.modules\n"
            "from transformers import AutoProcessor\n"
            "print(type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, RANDOM_MODEL], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.strip() == "MoshiProcessor", done.stderr
