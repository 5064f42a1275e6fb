"""A tiny model directory, and a store of its own for every test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from effops.models import Llama, shipped
from tiny import TINY


@pytest.fixture(autouse=True)
def store(tmp_path_factory, monkeypatch) -> Path:
    path = tmp_path_factory.mktemp("store")
    monkeypatch.setenv("EFFOPS_CACHE", str(path))
    return path


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A random model with the shipped model's tokenizer."""
    pytest.importorskip("safetensors", reason="a model directory holds safetensors")
    path = tmp_path_factory.mktemp("tiny")
    Llama.random(TINY, std=0.2).save_pretrained(path)
    shutil.copy(shipped.model_dir() / "tokenizer.json", path)
    return path
