"""Presets under explicit parameters, and the names of experts."""

from __future__ import annotations

from typing import Any

import pytest

from fda_fast.config import MergeConfig, parse
from fda_fast.errors import InputError
from fda_fast.settings import (
    Settings,
    choose_preset,
    named_preset,
    requested_scope,
    resolve,
    task_names,
)


def config(method: str = "fda", weights: tuple[float | None, ...] = (None, None), **given: Any):
    models = [
        {"model": f"m{i}", **({} if weight is None else {"parameters": {"weight": weight}})}
        for i, weight in enumerate(weights)
    ]
    content = {"merge_method": method, "base_model": "b", "models": models, "parameters": given}
    return parse(content)


def resolved(given: MergeConfig, preset: str = "roberta-base", scope: str = "block") -> Settings:
    return resolve(given, named_preset(preset), scope)  # type: ignore[arg-type]


def test_published_settings_come_through() -> None:
    settings = resolved(config(start="task_arithmetic"), "roberta-large")
    assert (settings.construct.anchors, settings.construct.tokens) == (64, 5)
    assert (settings.construct.steps, settings.construct.lr) == (1200, 0.01)
    assert (settings.adapt.epochs, settings.adapt.distance) == (15, "l2")
    assert (settings.adapt.mode, settings.adapt.coefficient) == ("coefficients", 0.2)
    assert settings.outside == "pretrained"
    assert resolved(config(), "roberta-large").adapt.mode == "weights"


def test_explicit_values_win() -> None:
    given = {"steps": 7, "tokens": 9, "adapt_lr": 0.5, "adapt_distance": "l1", "distance": "l2"}
    settings = resolved(config(start="tsv", scaling=0.9, outside="start", **given))
    assert (settings.construct.steps, settings.construct.tokens) == (7, 9)
    assert (settings.construct.lr, settings.adapt.lr) == (0.01, 0.5)
    assert (settings.construct.distance, settings.adapt.distance) == ("l2", "l1")
    assert settings.starting.scaling == 0.9
    assert settings.outside == "start"


def test_scaling_is_the_first_coefficient_of_task_arithmetic() -> None:
    settings = resolved(config(start="task_arithmetic", scaling=0.7))
    assert (settings.starting.scaling, settings.adapt.coefficient) == (0.7, 0.7)
    # One merged layer: it already holds the factor.
    settings = resolved(config(start="tsv", scaling=0.7))
    assert (settings.starting.scaling, settings.adapt.coefficient) == (0.7, 1.0)


def test_weights_bring_mergekits_lambda_of_one() -> None:
    assert resolved(config("task_arithmetic")).starting.scaling == 0.3
    settings = resolved(config("task_arithmetic", (0.2, None)))
    assert (settings.starting.scaling, settings.weights) == (1.0, (0.2, 1.0))
    settings = resolved(config("task_arithmetic", (0.2, None), weight=0.6, **{"lambda": 0.5}))
    assert (settings.starting.scaling, settings.weights) == (0.5, (0.2, 0.6))


def test_plain_methods_merge_every_tensor_and_ignore_fda_settings() -> None:
    plain = resolved(config("wudi", steps=3))
    assert plain.outside == "start"
    assert plain.as_dict() == resolved(config("wudi", steps=4)).as_dict()
    assert resolved(config(steps=3)).as_dict() != resolved(config(steps=4)).as_dict()


def test_contradictions_are_refused() -> None:
    with pytest.raises(InputError, match="single vectors"):
        resolved(config(tokens=3), "llama-mlp", "mlp")
    with pytest.raises(InputError, match="for MLPs"):
        resolved(config(), "llama-mlp", "block")
    with pytest.raises(InputError, match="no meaning with start: pretrained"):
        resolved(config(scaling=0.3))


def test_preset_by_name_by_model_or_by_size() -> None:
    roberta = {"model_type": "roberta", "num_hidden_layers": 24}
    size: dict[str, Any] = {"scope": "block", "width": 1024, "n_params": 12_596_224}
    assert choose_preset(None, model=roberta, **size).name == "roberta-large"
    assert choose_preset("vit-l-14", model=roberta, **size).name == "vit-l-14"
    assert choose_preset(None, model={**roberta, "model_type": "bert"}, **size).name.startswith(
        "default"
    )
    assert choose_preset(None, model=None, **size).construct.tokens == 32
    with pytest.raises(InputError, match="Did you mean 'roberta-large'"):
        choose_preset("roberta_lrage", model=roberta, **size)
    assert requested_scope(config(preset="llama-mlp").parameters) == "mlp"
    assert requested_scope(config(preset="llama-mlp", scope="block").parameters) == "block"


def test_experts_are_named_by_their_folders() -> None:
    references = ["/a/movie", "b/news/checkpoint-500", "c/movie/", "base+lora/sst 2", "d/model"]
    assert task_names(references, [None] * 5) == ["movie", "news", "movie-2", "sst_2", "d"]
    assert task_names(["x/a", "y/b"], [None, "A"]) == ["a-2", "A"]  # some disks ignore case
