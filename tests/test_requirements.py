"""The lists of exact versions: chosen from the ranges in setup.py, and what the README says was tested."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LISTS = ["tested", "oldest"]


def listed(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(package): version for package, version in pins}


@pytest.fixture(scope="module")
def ranges() -> list[Requirement]:
    """What setup.py asks for, all extras included."""
    given: dict[str, Any] = {}
    setuptools = ModuleType("setuptools")
    setuptools.setup, setuptools.find_packages, setuptools.Extension = (
        given.update,
        lambda where: [],
        lambda *_, **__: None,
    )
    with patch.dict(sys.modules, setuptools=setuptools):
        runpy.run_path(str(ROOT / "setup.py"))
    return [Requirement(line) for line in [*given["install_requires"], *given["extras_require"]["all"]]]


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_within_the_ranges(name: str, ranges: list[Requirement]):
    pins = listed(name)
    assert len(ranges) > 20
    for requirement in ranges:
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{name}.txt has {version}: make requirements"


def test_oldest_are_the_lower_bounds(ranges: list[Requirement]):
    pins = listed("oldest")
    for requirement in ranges:
        (bound,) = [each.version for each in requirement.specifier if each.operator == ">="]
        version = pins[canonicalize_name(requirement.name)]
        assert version.startswith(bound), f"setup.py says {requirement}, the oldest that resolves is {version}"


@pytest.mark.parametrize("name", [*LISTS, "peers"])
def test_lists_name_no_accelerator_and_no_place(name: str):
    text = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8")
    assert not re.search(r"nvidia|cuda|triton|://|--index|--find|\+cpu| /", text)


def test_readme_names_the_tested_versions():
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    (sentence,) = re.findall(r"Tested with Python 3\.11, (.*?)\. \[", text)
    named = dict(part.replace(" (tests only)", "").split(" ") for part in sentence.split(", "))
    assert len(named) > 10
    pins = listed("tested")
    assert named == {package: pins[canonicalize_name(package)] for package in named}


def test_hooks_before_a_commit_format_as_the_checks_do():
    (version,) = re.findall(r"ruff-pre-commit\n +rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert version == listed("tested")["ruff"]
