"""A merge of tiny models that the report's tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

import fda_fast


@pytest.fixture(scope="session")
def run(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "merged"
    small = {"anchors": 6, "tokens": 3, "steps": 8, "epochs": 5}
    fda_fast.merge(
        tiny.base,
        tiny.experts,
        folder,
        start="task_arithmetic",
        keep_anchors=True,
        progress=False,
        **small,
    )
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    words = ["a b c d", "e f g h i", "j k l m", "n", "", "o p q r s", "t u v w", "x y z a"]
    path.write_text("\n".join(words * 3))
    return path
