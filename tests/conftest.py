"""Shared fixtures: a tiny policy on disk, and where real data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights, as a Hugging Face directory."""
    from rlpost.engines.scratch import build_model

    path = tmp_path_factory.mktemp("tiny") / "model"
    build_model(path, hidden_size=64, num_layers=2, num_heads=2, vocab_size=300, seed=0)
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real data sets; tests that use it carry the marker `data`."""
    path = Path(os.environ.get("RLPOST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data sets at {path}: set RLPOST_DATA to the folder that holds them")
    return path
