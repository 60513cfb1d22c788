"""The configuration of a joined model, and what of it the projector is."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, VoxtralConfig

from ...input_checks import is_whole
from ...nn.activations import ACT2FN
from ..llama import FlaxLlamaForCausalLM
from .towers import Tower, tower_of

MLP, LINEAR = "mlp", "linear"
"""The kinds of projectors."""


class SpeechLanguageConfig(PreTrainedConfig):
    """The configuration of a :class:`FlaxSpeechLanguageModel`.

    Attributes:
        audio_config: of the encoder, a configuration or its fields with their ``model_type``; Whisper's if None.
        text_config: of the language model; Llama's if None.
        audio_token_id: the token in whose place audio is heard. It may lie behind the vocabulary, as nothing is looked
            up for it.
        projector: ``"mlp"``, two linear layers and an activation, or ``"linear"``, one layer.
        projector_hidden_size: between the two; that of the language model if None.
        projector_hidden_act: the activation between the two.
        projector_bias: whether the layers have biases.
        stack_factor: frames of the encoder that become one token.
        stack_stride: frames from one token to the next; ``stack_factor`` if None.
        initializer_range: of the projector.
    """

    model_type = "speech_language"
    sub_configs: ClassVar[dict[str, Any]] = {"audio_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        audio_config: dict | PreTrainedConfig | None = None,
        text_config: dict | PreTrainedConfig | None = None,
        audio_token_id: int | None = None,
        projector: str = MLP,
        projector_hidden_size: int | None = None,
        projector_hidden_act: str = "gelu",
        projector_bias: bool = False,
        stack_factor: int = 4,
        stack_stride: int | None = None,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        self.audio_config = part_config("audio_config", audio_config, "whisper")
        self.text_config = part_config("text_config", text_config, "llama")
        self.audio_token_id = audio_token_id
        self.projector = projector
        self.projector_hidden_size = projector_hidden_size
        self.projector_hidden_act = projector_hidden_act
        self.projector_bias = projector_bias
        self.stack_factor = stack_factor
        self.stack_stride = stack_stride
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


AutoConfig.register(SpeechLanguageConfig.model_type, SpeechLanguageConfig, exist_ok=True)


def part_config(name: str, value: Any, default: str) -> PreTrainedConfig:
    """The configuration of a part, from its fields if it is none yet.

    Raises:
        ValueError: a ``model_type`` that ``transformers`` does not have.
    """
    if isinstance(value, PreTrainedConfig):
        return value
    fields = dict(value or {})
    model_type = fields.pop("model_type", default)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"`{name}` has model_type={model_type!r}, which `transformers` does not have: give another.")
    return CONFIG_MAPPING[model_type](**fields)


@dataclasses.dataclass(frozen=True)
class ProjectorFields:
    """What stands between encoder and language model.

    Attributes:
        kind: :data:`MLP` or :data:`LINEAR`.
        stack_factor, stack_stride, initializer_range: as of the configuration.
        hidden_size: between the two layers.
        output_size: of the language model's embeddings.
        activation: between the two layers, a name.
        use_bias: of the layers.
    """

    kind: str
    stack_factor: int
    stack_stride: int
    hidden_size: int
    output_size: int
    activation: str
    use_bias: bool
    initializer_range: float

    def tokens(self, frames: Any) -> Any:
        """Tokens of so many frames, an int or an integer array."""
        return -(-frames // self.stack_stride)


def projector_of(config: Any) -> ProjectorFields:
    """The projector of a configuration that :func:`check_config` accepts."""
    width = config.text_config.hidden_size
    if isinstance(config, VoxtralConfig):
        audio = config.audio_config
        factor = audio.intermediate_size // audio.hidden_size
        act, initial = config.projector_hidden_act, audio.initializer_range
        return ProjectorFields(MLP, factor, factor, width, width, act, use_bias=False, initializer_range=initial)
    return ProjectorFields(
        kind=config.projector,
        stack_factor=config.stack_factor,
        stack_stride=config.stack_factor if config.stack_stride is None else config.stack_stride,
        hidden_size=width if config.projector_hidden_size is None else config.projector_hidden_size,
        output_size=width,
        activation=config.projector_hidden_act,
        use_bias=config.projector_bias,
        initializer_range=config.initializer_range,
    )


def check_config(config: Any) -> Tower:
    """The encoder of a configuration; ``ValueError`` for what no model here does, and sizes that do not fit."""
    kind, text = config.model_type, config.text_config

    def refuse(name: str, why: str) -> None:
        raise ValueError(f"`{name}` of this {kind!r} configuration is {getattr(config, name)!r}, {why}.")

    tower = tower_of(config.audio_config)
    if not isinstance(text, FlaxLlamaForCausalLM.known_configs()):
        known = ", ".join(each.model_type for each in FlaxLlamaForCausalLM.known_configs())
        raise ValueError(
            f"`text_config` of this {kind!r} configuration has model_type={text.model_type!r}, which is not "
            f"supported: use one of {known}."
        )
    if not is_whole(config.audio_token_id) or config.audio_token_id < 0:
        refuse("audio_token_id", "but must be the id of the token in whose place audio is heard: set it")
    if config.projector_hidden_act not in ACT2FN:
        refuse("projector_hidden_act", f"which is not supported: use one of {', '.join(sorted(ACT2FN))}")
    for part, values in (("audio_config", config.audio_config), ("text_config", text)):
        if getattr(values, "quantization_config", None) is not None:
            raise ValueError(f"`{part}` tells of quantized weights: join models of floats, and quantize the whole.")
    if isinstance(config, VoxtralConfig):
        check_voxtral(config)
        return tower
    if config.projector not in (MLP, LINEAR):
        refuse("projector", f"but must be {MLP!r} or {LINEAR!r}")
    for name in ("stack_factor", "stack_stride", "projector_hidden_size"):
        value = getattr(config, name)
        if not (value is None and name != "stack_factor") and not (is_whole(value) and value >= 1):
            refuse(name, "but must be a whole number of at least 1")
    return tower


def check_voxtral(config: VoxtralConfig) -> None:
    """Raises ``ValueError`` for what upstream's Voxtral cannot do with these sizes."""
    audio = config.audio_config
    if audio.intermediate_size % audio.hidden_size:
        raise ValueError(
            f"`audio_config.intermediate_size` is {audio.intermediate_size}, but the projector takes whole frames of "
            f"{audio.hidden_size} (`hidden_size`): take a multiple."
        )
    factor = audio.intermediate_size // audio.hidden_size
    if audio.max_source_positions % factor:
        raise ValueError(
            f"`audio_config.max_source_positions` is {audio.max_source_positions}, but {factor} frames become a "
            "token: take a multiple."
        )
    if config.text_config.tie_word_embeddings:
        raise ValueError(
            "`text_config.tie_word_embeddings` is True, but in Voxtral the head is apart from the embeddings: set it "
            "to False."
        )
