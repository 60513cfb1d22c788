"""The skill that an adapter teaches the embedded model: what there is to learn, and how it is counted."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import yaml

from transformers_moshi_flax import LoraConfig
from transformers_moshi_flax.adapters.lora import new_leaves, trained_leaves
from transformers_moshi_flax.adapters.targets import linear_layers, targeted
from transformers_moshi_flax.cli.checkpoints import EMBEDDED_MODEL
from transformers_moshi_flax.models.moshi.modeling_flax_moshi import FlaxMoshiForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.converse.sentences import NUMBERS, exchanges  # noqa: E402
from examples.converse.skill import COUNTING_SHARES, LONGEST, TOPIC, counting, figures_of  # noqa: E402

MOST_BYTES = 300_000


def test_it_counts() -> None:
    found = counting()
    answers = {each.question: each.answer for each in found}
    assert answers["count from three to six"] == "three four five six"
    assert all(2 <= len(each.answer.split()) <= LONGEST for each in found)
    assert not set(answers) & {each.question for each in exchanges()}
    held_out = {each.answer for each in found if each.held_out}
    assert held_out and not held_out & {each.answer for each in found if not each.held_out}
    assert {word for each in found for word in each.answer.split()} == set(NUMBERS)
    assert abs(sum(COUNTING_SHARES.values()) - 1) < 1e-9 and COUNTING_SHARES[TOPIC] == 0.5


def test_what_was_known_is_counted_apart() -> None:
    found = figures_of(["a", "b", "c", "d"], adapted=["a", "x", "c", "d"], before=["a", "b", "x", "d"])
    assert found["right"]["share"] == 0.75 and found["right_without"]["share"] == 0.75
    assert found["kept"]["of"] == 3 and found["kept"]["share"] == 2 / 3


def test_the_adapter_is_small() -> None:
    settings = yaml.safe_load((ROOT / "examples" / "converse" / "skill.yaml").read_text("utf-8"))
    assert ROOT / settings["model"]["path"] == EMBEDDED_MODEL
    model = FlaxMoshiForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, _do_init=False)[0]
    config = LoraConfig(**settings["adapter"])
    layers = targeted(config, linear_layers(model._float_shape_tree, model.checkpoint_rules))
    leaves = trained_leaves(new_leaves(config, layers, jax.random.key(0)))
    assert 0 < sum(leaf.nbytes for leaf in leaves.values()) <= MOST_BYTES
    assert all(path.startswith("decoder/") for path in leaves)
