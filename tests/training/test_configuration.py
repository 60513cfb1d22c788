"""The configuration: what is read, what is refused and how, what a run may change."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml

from transformers_moshi_flax.training.configuration import (
    ConfigurationError,
    TrainingConfig,
    build_configuration,
    changes_of_the_run,
    load_configuration,
    to_yaml,
)
from transformers_moshi_flax.training.text.configuration import TextTrainingConfig

ROOT = Path(__file__).resolve().parents[2]
GOOD = """
model: {path: kmhf/hf-moshiko}
data:
  train: prepared
  max_length: 512
run: {output_dir: run, steps: 100}
optimizer:
  learning_rate: 1e-5
  learning_rate_multipliers: {decoder/lm_head/kernel: 2}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    return path


def test_values_and_defaults(file: Path) -> None:
    config = load_configuration(file)
    assert config.data.max_length == 512 and config.data.batch_size == 16
    assert config.model.freeze == ("audio_encoder/.*",)
    # PyYAML by itself takes 1e-5 for a text
    assert config.optimizer.learning_rate == 1e-5
    assert config.optimizer.learning_rate_multipliers == {"decoder/lm_head/kernel": 2.0}


def test_yaml_and_back(file: Path) -> None:
    config = load_configuration(file, ["model.freeze=[a/.*, b]", "data.buckets=[256, 512]", "objective.text_weight=2"])
    again = build_configuration(yaml.safe_load(to_yaml(config)))
    assert again == config
    assert again.model.freeze == ("a/.*", "b") and again.data.buckets == (256, 512)


TEXTS = (
    *("1e-5_run", "7e3f01ab", "2e-5", "1e5", ".5", "1_000", "100", "-3", "0123", "0o17", "0x1f", "1:30"),
    *("yes", "no", "On", "OFF", "true", "False", "y", "n", ".inf", ".nan", "nullable"),
    *("2024-01-31", "2024-13-45", "2024-01-31T10:00:00Z", "1.2.3", "=", "<<x", "a:b", "-x", "naïve", "10%", "a b"),
)
"""What YAML 1.1, YAML 1.2 or PyYAML take for something else, or come near to it."""


@pytest.mark.parametrize("quotes", ["", "'", '"'])
def test_texts_stay_texts(file: Path, quotes: str) -> None:
    """In every key of texts, in the file and on the command line, as written and as read again."""
    given = [f"{quotes}{text}{quotes}" for text in TEXTS]
    (path, train, held_out, output, project, address), others = given[:6], given
    text = GOOD.replace("path: kmhf/hf-moshiko", f"path: {path}, freeze: [{', '.join(others)}]")
    text = text.replace("train: prepared", f"train: {train}\n  evaluation: {held_out}")
    text = text.replace("output_dir: run", f"output_dir: {output}, wandb_project: {project}")
    text = text.replace("{decoder/lm_head/kernel: 2}", f"{{{', '.join(f'{other}: 2e-1' for other in others)}}}")
    file.write_text(
        f"{text}\ndistributed: {{coordinator_address: {address}, num_processes: 1, process_id: 0}}", "utf-8"
    )
    assignments = [f"run.output_dir={given[-1]}", f"model.freeze=[{given[-1]}, {given[0]}]"]
    for config in (load_configuration(file), load_configuration(file, assignments)):
        found = (config.model.path, config.data.train, config.data.evaluation)
        assert (*found, config.run.wandb_project, config.distributed.coordinator_address) == (*TEXTS[:3], *TEXTS[4:6])
        assert config.optimizer.learning_rate_multipliers == dict.fromkeys(TEXTS, 0.2)
        file.with_name("kept.yaml").write_text(to_yaml(config), "utf-8")
        assert load_configuration(file.with_name("kept.yaml")) == config
    assert config.run.output_dir == TEXTS[-1] and config.model.freeze == (TEXTS[-1], TEXTS[0])
    assert load_configuration(file).run.output_dir == TEXTS[3] and load_configuration(file).model.freeze == TEXTS


TO_QUOTE = ("null", "~", "", "<<", " a ", "a # b", "a: b", "[a]", "'a'", "a\nb", "\u2028", "\x85", "\x1b")


@pytest.mark.parametrize("text", TO_QUOTE)
def test_texts_that_need_quotes(file: Path, text: str) -> None:
    config = build_configuration({**yaml.safe_load(GOOD.replace("1e-5", "1.0e-5")), "model": {"path": text}})
    file.write_text(to_yaml(config), "utf-8")
    assert load_configuration(file) == config and config.model.path == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-5", 2e-5), ("2E5", 2e5), ("+2e+1", 20.0), ("3.", 3.0), (".5", 0.5), ("7", 7.0), ("1_0.5e1", 105.0)],
)
def test_numbers_are_numbers(file: Path, text: str, value: float) -> None:
    config = load_configuration(file, [f"objective.text_weight={text}"])
    assert config.objective.text_weight == value and type(config.objective.text_weight) is float
    file.write_text(to_yaml(config))
    assert load_configuration(file) == config


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("true", True), ("On", True), ("no", False), ("FALSE", False), ("off", False)]
)
def test_truth_values(file: Path, text: str, value: bool) -> None:
    assert load_configuration(file, [f"run.tensorboard={text}"]).run.tensorboard is value


def test_assignments_replace_values(file: Path) -> None:
    config = load_configuration(file, ["run.steps=7", "mesh.data=2", "run.wandb_project=null", "run.steps=8"])
    assert (config.run.steps, config.mesh.data, config.run.wandb_project) == (8, 2, None)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("run.stepz=3", ["run.stepz", "'steps'"]),
        ("run.batch_size=3", ["run.batch_size", "'data'"]),
        ("rum.steps=3", ["rum", "'run.steps'"]),
        ("steps=3", ["section.key=value"]),
        ("run.steps", ["section.key=value"]),
        ("run.steps=many", ["run.steps", "'many'", "whole number"]),
        ("run.steps=true", ["run.steps", "'true'", "whole number"]),
        ("run.steps=100_run", ["run.steps", "'100_run'", "whole number"]),
        ("run.steps='100'", ["run.steps", "whole number, without quotes"]),
        ("run.steps=0100", ["run.steps", "'0100'", "whole number"]),
        ("run.steps=1:30", ["run.steps", "'1:30'", "whole number"]),
        ("run.steps=1e3", ["run.steps", "'1e3'", "whole number"]),
        ("run.steps=!!str 100", ["run.steps", "'100'", "whole number"]),
        ("run.output_dir=null", ["run.output_dir", "a text"]),
        ("run.output_dir=", ["run.output_dir", "a text"]),
        ("run.output_dir=!!timestamp 2024-13-45", ["run.output_dir", "no YAML", "month"]),
        ("optimizer.b1=007", ["optimizer.b1", "'007'", "a number"]),
        ("optimizer.b1=1e-5_run", ["optimizer.b1", "a number"]),
        ("optimizer.b1='1e-5'", ["optimizer.b1", "a number, without quotes"]),
        ("run.tensorboard='yes'", ["run.tensorboard", "true or false, without quotes"]),
        ("model.path=null", ["model.path", "`config`"]),
        ("run.steps=0", ["run.steps", "0", "1 or more"]),
        ("run.steps=[", ["run.steps=[", "no YAML"]),
        ("run.steps=10000000000000", ["run.steps", "a whole number within"]),
        (f"optimizer.b1={10**400}", ["optimizer.b1", "a finite number"]),
        ("optimizer.learning_rate_multipliers={~: 0.5}", ["learning_rate_multipliers", "a text"]),
        ("optimizer.learning_rate_multipliers={a: x}", ["learning_rate_multipliers", "a number"]),
        ("run.best_metric=losss", ["run.best_metric", "'loss'"]),
        ("run.evaluate_every=10", ["run.evaluate_every", "data.evaluation"]),
        ("run.tensorboard=1", ["run.tensorboard", "true or false"]),
        ("model.config=other", ["model.path", "`config`"]),
        ("model.dtype=float8", ["model.dtype", "bfloat16"]),
        ("model.freeze=['(']", ["model.freeze", "'('"]),
        ("model.freeze=decoder", ["model.freeze", "a list"]),
        ("data.swap_moshi_user=1.5", ["data.swap_moshi_user", "1.5"]),
        ("data.user_code_noise=-0.1", ["data.user_code_noise", "-0.1"]),
        ("data.moshi_code_noise=1.1", ["data.moshi_code_noise", "1.1"]),
        ("data.buckets=[512, 256]", ["data.buckets", "ascending"]),
        ("data.buckets=[128, 256]", ["data.buckets", "512"]),
        ("data.min_length=600", ["data.min_length", "512"]),
        ("data.batch_size=15", ["data.batch_size"]),
        ("run.accumulation_steps=3", ["data.batch_size", "3 * 1 * 1"]),
        ("mesh.fsdp=32", ["data.batch_size", "1 * 1 * 32"]),
        ("mesh.data=null", ["mesh.data", "whole number"]),
        ("optimizer.b1=1.5", ["optimizer", "b1", "1.5"]),
        ("optimizer.b1=.nan", ["optimizer.b1", "finite"]),
        ("optimizer.schedule=linaer", ["optimizer", "linaer", "linear"]),
        ("optimizer.warmup_steps=5", ["optimizer", "warmup_steps"]),
        ("objective.text_weight=-1", ["objective", "text_weight", "-1"]),
        ("distributed.num_processes=2", ["distributed.coordinator_address"]),
    ],
)
def test_mistakes_are_named(file: Path, assignment: str, words: list[str]) -> None:
    extra = ["mesh.data=2"] if assignment == "data.batch_size=15" else []
    with pytest.raises(ConfigurationError) as caught:
        load_configuration(file, [assignment, *extra])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["`model:`"]),
        ("[1]", ["`model:`"]),
        ("model: [", ["no YAML"]),
        (GOOD + "\nrun: {steps: 3}", ["'run'", "twice"]),
        (GOOD + "\nruns: {steps: 3}", ["`runs`", "'run'"]),
        (GOOD + "\nmesh: 3", ["`mesh`", "3"]),
        ("model: {path: a}\ndata: {train: b}", ["`run.output_dir` is missing", "`run.steps` is missing"]),
        # all mistakes at once
        (GOOD.replace("steps: 100", "steps: x, sed: 3"), ["`run.steps`", "`run.sed`", "'seed'"]),
    ],
)
def test_bad_files(file: Path, text: str, words: list[str]) -> None:
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_configuration(file)
    for word in [str(file), *words]:
        assert word in str(caught.value)


def test_merge_keys(file: Path) -> None:
    file.write_text(GOOD + "mesh: {data: 2, fsdp: 4}\nobjective: {text_weight: 2.0}\n")
    plain = load_configuration(file)
    file.write_text(GOOD + "mesh: {<<: {data: 2, fsdp: 1}, fsdp: 4}\nobjective: {text_weight: 2.0}\n")
    assert load_configuration(file) == plain


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"missing\.yaml"):
        load_configuration(tmp_path / "missing.yaml")


@pytest.mark.parametrize("kind", [TrainingConfig, TextTrainingConfig])
def test_every_key_is_documented(kind: type) -> None:
    for section, section_class in typing.get_type_hints(kind).items():
        if section == "task":
            continue
        documented = "".join(part.__doc__ for part in section_class.__mro__ if dataclasses.is_dataclass(part))
        for key in dataclasses.fields(section_class):
            assert re.search(rf"\b{key.name}\b", documented), f"{section}.{key.name}"


def test_what_may_change_when_a_run_goes_on(file: Path) -> None:
    config = load_configuration(file)
    free = load_configuration(file, ["run.log_every=3", "mesh.data=4", "data.train=moved", "run.accumulation_steps=2"])
    assert changes_of_the_run(config, free) == []
    other = load_configuration(file, ["optimizer.b1=0.8", "run.steps=200", "data.batch_size=32"])
    assert changes_of_the_run(config, other) == [
        "data.batch_size: 16 -> 32",
        "run.steps: 100 -> 200",
        "optimizer.b1: 0.9 -> 0.8",
    ]
    orders = ("{a: 1.0, .*: 2.0}", "{.*: 2.0, a: 1.0}")
    first, last = (load_configuration(file, [f"optimizer.learning_rate_multipliers={order}"]) for order in orders)
    assert len(changes_of_the_run(first, last)) == 1
    constant = [load_configuration(file, ["optimizer.schedule=constant", f"run.steps={steps}"]) for steps in (5, 9)]
    assert changes_of_the_run(*constant) == []


def test_the_page_has_a_configuration_that_loads(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "training.md").read_text("utf-8")
    example = re.search(r"```yaml\n(.*?)```", page, re.S)[1]
    (tmp_path / "config.yaml").write_text(example)
    config = load_configuration(tmp_path / "config.yaml")
    assert config.data.evaluation is not None and config.run.evaluate_every is not None
