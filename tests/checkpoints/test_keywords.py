"""Keywords that programs for ``transformers`` pass to ``from_pretrained``: taken, told or refused."""

import jax.numpy as jnp
import pytest
import torch
from transformers import GenerationConfig

from tests.configs import tiny_mimi_config, tiny_moshi_config
from transformers_moshi_flax import FlaxMimiModel, FlaxMoshiForCausalLM

IDLE = {
    "trust_remote_code": (None, False),
    "use_auth_token": (None,),
    "resume_download": (None, True),
    "proxies": (None, {}),
    "use_safetensors": (None, True),
    "attn_implementation": (None, "eager", "sdpa"),
    "low_cpu_mem_usage": (None, True, False),
    "device_map": (None,),
    "dtype": (None, "auto", "float32", "torch.float32", jnp.float32, torch.float32),
    "torch_dtype": (None, "auto", "float32", "torch.float32", jnp.float32, torch.float32),
    "from_tf": (False,),
    "from_flax": (False, True),
    "quantization_config": (None,),
    "variant": (None,),
    "state_dict": (None,),
    "load_in_8bit": (False,),
    "generation_config": (None,),
    "key_mapping": (None,),
    "use_kernels": (None, False),
    "experts_implementation": (None,),
    "tp_size": (None, 1),
    "device_mesh": (None,),
    "adapter_name": ("default",),
    "disable_mmap": (None, False),
}
TOLD = {
    "trust_remote_code": (True, "code of a repository is never run"),
    "resume_download": (False, "goes on always"),
    "mirror": ("tuna", "HF_ENDPOINT"),
    "weights_only": (False, "weights_only=True always"),
    "use_kernels": (True, "XLA makes the kernels"),
    "disable_mmap": (True, "mapped from their files"),
}
REFUSED = {
    "proxies": ({"https": "http://proxy:3128"}, "HTTPS_PROXY"),
    "device_map": ("auto", "sharding="),
    "attn_implementation": ("flash_attention_2", "only 'eager' and 'sdpa'"),
    "load_in_4bit": (True, "quantization='nf4'"),
    "from_tf": (True, "TensorFlow"),
    "variant": ("fp16", "rename it"),
    "torch_dtype": ("int8", "dtype must be a floating dtype"),
    "use_safetensors": ("yes", "True, False or None"),
    "key_mapping": ({"a": "b"}, "names of the model"),
    "tp_size": (2, "sharding="),
    "generation_config": (GenerationConfig(), "to a class that generates"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mimi")
    FlaxMimiModel(tiny_mimi_config()).save_pretrained(folder)
    return folder


def test_what_asks_for_nothing_is_taken(folder, caplog):
    cases = {name: value for name, values in IDLE.items() for value in values[-1:]}
    del cases["dtype"]  # torch_dtype is its former name
    assert jnp.dtype(FlaxMimiModel.from_pretrained(folder, **cases).dtype) == jnp.float32
    for name in ("dtype", "torch_dtype"):
        for value in IDLE[name][:-1]:
            model, _ = FlaxMimiModel.from_pretrained(folder, _do_init=False, **{name: value})
            assert jnp.dtype(model.dtype) == jnp.float32
    for number in range(3):
        values = {name: values[number % len(values)] for name, values in IDLE.items() if "dtype" not in name}
        FlaxMimiModel.from_pretrained(folder, _do_init=False, **values)
    assert not caplog.records


@pytest.mark.parametrize("name", TOLD)
def test_what_cannot_have_its_effect_is_told(folder, caplog, name):
    value, words = TOLD[name]
    FlaxMimiModel.from_pretrained(folder, _do_init=False, **{name: value})
    assert f"{name}={value!r} has no effect" in caplog.text and words in caplog.text


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_to_ignore_is_refused(folder, name):
    value, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        FlaxMimiModel.from_pretrained(folder, **{name: value})


def test_two_names_of_one_thing(folder):
    model, _ = FlaxMimiModel.from_pretrained(folder, torch_dtype="bfloat16", _do_init=False)
    assert jnp.dtype(model.dtype) == jnp.bfloat16
    model, _ = FlaxMimiModel.from_pretrained(folder, jnp.bfloat16, torch_dtype=torch.bfloat16, _do_init=False)
    assert jnp.dtype(model.dtype) == jnp.bfloat16
    with pytest.raises(ValueError, match=r"dtype=.*float32.*, but torch_dtype='bfloat16'"):
        FlaxMimiModel.from_pretrained(folder, jnp.float32, torch_dtype="bfloat16")
    with pytest.raises(ValueError, match="token and use_auth_token"):
        FlaxMimiModel.from_pretrained(folder, token="a", use_auth_token="b")
    for name in ("pretrained_model_name_or_path", "name_or_path"):
        assert FlaxMimiModel.from_pretrained(**{name: folder}, _do_init=False)[0].name_or_path == str(folder)
    for names in ({}, {"pretrained_model_name_or_path": folder, "name_or_path": folder}):
        with pytest.raises(ValueError, match="pretrained_model_name_or_path, once"):
            FlaxMimiModel.from_pretrained(**names)


def test_a_part_of_the_configuration_is_changed_field_by_field(tmp_path):
    from transformers_moshi_flax import FlaxMoshiForConditionalGeneration

    model = FlaxMoshiForConditionalGeneration(tiny_moshi_config())
    model.save_pretrained(tmp_path)
    again = FlaxMoshiForConditionalGeneration.from_pretrained(tmp_path, audio_encoder_config={"sliding_window": 3})
    assert again.config.audio_encoder_config.sliding_window == 3
    expected = {**model.config.audio_encoder_config.to_dict(), "sliding_window": 3}
    assert again.config.audio_encoder_config.to_dict() == expected


def test_a_generation_config_instead_of_the_checkpoints(tmp_path):
    FlaxMoshiForCausalLM(tiny_moshi_config()).save_pretrained(tmp_path)
    given = GenerationConfig(max_length=7)
    model, _ = FlaxMoshiForCausalLM.from_pretrained(tmp_path, generation_config=given, _do_init=False)
    assert model.generation_config.max_length == 7
