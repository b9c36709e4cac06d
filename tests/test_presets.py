"""Presets against the published table, retyped here from the paper's C.3 and the scripts."""

import dataclasses
import math

import pytest

from fda_fast.errors import InputError
from fda_fast.presets import PRESETS, STARTS, default_preset, get_preset

# name: (width, shape of the anchors, steps)
CONSTRUCTION = {
    "vit-b-32": (768, (64, 50, 768), 1200),
    "vit-b-16": (768, (64, 197, 768), 1200),
    "vit-l-14": (1024, (64, 257, 1024), 1200),
    "roberta-base": (768, (64, 5, 768), 1200),
    "roberta-large": (1024, (64, 5, 1024), 1200),
    "llama-mlp": (5120, (8192, 5120), 200),
}

# (preset, start): batch, lr, distance, epochs, optimiser steps per layer, tasks
ADAPTATION = {
    ("vit-b-32", "pretrained"): (128, 1e-5, "cosine", 100, 400, 8),
    ("vit-b-32", "task_arithmetic"): (128, 1e-2, "cosine", 100, 400, 8),
    ("vit-b-16", "tsv"): (128, 1e-2, "cosine", 100, 400, 8),
    ("vit-l-14", "wudi"): (512, 1e-2, "cosine", 25, 25, 8),
    ("roberta-base", "pretrained"): (128, 5e-5, "l2", 100, 400, 8),
    ("roberta-large", "pretrained"): (128, 5e-5, "l2", 50, 200, 8),
    ("roberta-base", "task_arithmetic"): (128, 1e-2, "l2", 100, 400, 8),
    ("roberta-base", "wudi"): (128, 1e-2, "l2", 100, 400, 8),
    ("roberta-large", "tsv"): (128, 1e-2, "l2", 15, 60, 8),
    ("llama-mlp", "task_arithmetic"): (8192, 1e-2, "cosine", 50, 100, 2),
}

SCALING = {
    ("vit-b-32", "task_arithmetic"): 0.3,
    ("vit-l-14", "task_arithmetic"): 0.3,
    ("roberta-base", "task_arithmetic"): 0.3,
    ("roberta-large", "task_arithmetic"): 0.2,
    ("llama-mlp", "task_arithmetic"): 0.5,
    ("vit-b-16", "tsv"): 1.0,
    ("vit-b-16", "wudi"): 1.0,
    ("roberta-base", "tsv"): 0.4,
    ("roberta-base", "wudi"): 0.7,
}


def test_the_published_names_and_one_of_ours():
    assert list(PRESETS) == [*CONSTRUCTION, "decoder-block"]
    assert all(PRESETS[name].name == name for name in PRESETS)


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_construction_is_the_published_one(name):
    width, shape, steps = CONSTRUCTION[name]
    settings = get_preset(name).construct
    assert settings.shape(width) == shape
    assert settings.rows * width == math.prod(shape)
    assert settings.steps == steps
    assert (settings.lr, settings.weight_decay, settings.distance) == (1e-2, 0.01, "cosine")
    assert (settings.betas, settings.eps, settings.scale) == ((0.9, 0.999), 1e-8, 0.01)
    assert settings.layout == ("token_first" if name.startswith("vit") else "anchor_first")


@pytest.mark.parametrize(("name", "start"), ADAPTATION)
def test_adaptation_is_the_published_one(name, start):
    batch, lr, distance, epochs, steps, tasks = ADAPTATION[name, start]
    preset = get_preset(name)
    settings = preset.adapt(start)
    assert (settings.batch_size, settings.lr, settings.distance) == (batch, lr, distance)
    assert settings.epochs == epochs
    assert epochs * tasks * preset.construct.anchors // batch == steps
    assert settings.mode == ("weights" if start == "pretrained" else "coefficients")


@pytest.mark.parametrize(("name", "start"), SCALING)
def test_starting_points_are_scaled_as_published(name, start):
    assert get_preset(name).start(start).scaling == SCALING[name, start]


def test_decoder_blocks_take_sequences_and_merge_the_rest_as_llama_does():
    ours, published = get_preset("decoder-block"), get_preset("llama-mlp")
    assert ours.scope == "block"
    assert ours.construct.shape(4096) == (64, 50, 4096)
    assert (ours.construct.steps, ours.outside) == (published.construct.steps, published.outside)
    assert ours.starts == published.starts
    assert ours.adapt("task_arithmetic").batch_size == 128


@pytest.mark.parametrize("name", PRESETS)
def test_the_first_coefficients_reproduce_the_starting_point(name):
    """alpha on task vectors must equal TA's scaling; on a merged vector it is 1."""
    preset = get_preset(name)
    for start in STARTS[1:]:
        settings = preset.adapt(start)
        expected = preset.start(start).scaling if settings.per_task else 1.0
        assert settings.coefficient == expected
    assert preset.start("pretrained").scaling == 0.0


@pytest.mark.parametrize("scope", ["block", "mlp"])
@pytest.mark.parametrize("width", [1, 32, 384, 768, 1024, 5120])
def test_default_has_about_two_rows_per_width_within_published_bounds(scope, width):
    preset = default_preset(width, scope)
    rows = preset.construct.rows
    low, high = (5 * 64, 50 * 64) if scope == "block" else (256, 8192)
    assert low <= rows <= high
    if low < rows < high:
        assert 2 * width <= rows < 2 * width + 64
    assert preset.scope == scope
    assert len(preset.construct.shape(width)) == (3 if scope == "block" else 2)
    assert set(preset.adaptations) == set(preset.starts) == set(STARTS)
    assert all(preset.start(start).rules == "auto" for start in STARTS)


def test_default_takes_fewer_steps_for_llama_sized_layers():
    assert default_preset(5120, "mlp", n_params=212_336_640).construct.steps == 200
    assert default_preset(1024, "block", n_params=12_596_224).construct.steps == 1200


def test_mistakes_are_named():
    with pytest.raises(InputError, match=r"vit-b-32 \| .* got 'vit-b32'"):
        get_preset("vit-b32")
    with pytest.raises(InputError, match=r"start: expected pretrained \| task_arithmetic"):
        get_preset("vit-b-32").adapt("ta")
    with pytest.raises(InputError, match="width"):
        default_preset(0)
    with pytest.raises(InputError, match="scope"):
        default_preset(8, "layer")


def test_presets_cannot_be_changed_by_accident():
    preset = get_preset("vit-b-32")
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.construct.steps = 1
    with pytest.raises(TypeError):
        preset.adaptations["tsv"] = preset.adapt("wudi")
    with pytest.raises(TypeError):
        PRESETS["mine"] = preset
