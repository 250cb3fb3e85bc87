"""Fixtures that several test files share. Tests never reach a network."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads that wait for each other cost more than they bring

MATERIAL = Path(__file__).resolve().parents[2] / "shared" / "material"


@pytest.fixture(scope="session")
def material() -> Path:
    """Real tokenizers, templates, data and small models that lie beside the checkout."""
    if not MATERIAL.is_dir():
        pytest.skip(f"NOT TESTED: the real material is absent ({MATERIAL})")
    return MATERIAL


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test meets what another one encoded, nor writes into the user's cache."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
