"""The YAML configuration: what is accepted, and how everything else is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fda_fast.config import MergeConfig, load, nearest, parse
from fda_fast.errors import InputError

YAML = """\
merge_method: fda
base_model: ./base
models:
  - model: ./movie
  - model: news
    name: paper
parameters:
  preset: roberta-base
  start: task_arithmetic
  lambda: 0.4
  lr: 1e-2
  normalize: false
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return _write


def test_reads_a_mergekit_like_file(write, tmp_path: Path) -> None:
    config = load(write(YAML))
    assert config.base_model == str(tmp_path / "base")
    assert [entry.model for entry in config.models] == [
        str(tmp_path / "movie"),
        str(tmp_path / "news"),
    ]
    assert config.models[1].name == "paper"
    assert config.parameters.scaling == 0.4
    assert config.parameters.lr == 0.01  # YAML 1.1 reads 1e-2 as a string
    assert config.written_dtype == "bfloat16"


def test_adapter_references_keep_both_parts(write, tmp_path: Path) -> None:
    (tmp_path / "lora" / "movie").mkdir(parents=True)
    config = load(write(YAML.replace("./movie", "base+lora/movie")))
    assert config.models[0].model == f"{tmp_path}/base+{tmp_path}/lora/movie"
    (tmp_path / "c++").mkdir()  # an existing folder with a plus in its name is a folder
    assert load(write(YAML.replace("./movie", "c++"))).models[0].model == str(tmp_path / "c++")


def test_absolute_and_home_paths_stay(write, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    config = load(write(YAML.replace("./movie", "~/movie").replace("news", "/data/news")))
    assert [entry.model for entry in config.models] == ["/somewhere/movie", "/data/news"]


def test_base_among_the_models_is_skipped(write) -> None:
    text = YAML.replace("  - model: ./movie\n", "  - model: ./base\n  - model: ./movie\n")
    assert len(load(write(text)).models) == 2
    with pytest.raises(InputError, match="only the base model"):
        load(write("merge_method: fda\nbase_model: b\nmodels: [{model: b}]\n"))


def test_overrides_replace_parameters(write) -> None:
    config = load(write(YAML), {"steps": 7, "lr": 0.5})
    assert (config.parameters.steps, config.parameters.lr) == (7, 0.5)
    assert config.parameters.start == "task_arithmetic"


REFUSALS = {
    "misspelt method": ("merge_method: fda", "merge_method: fad", ["line 1", "Did you mean 'fda'"]),
    "misspelt key": ("  lr:", "  leerning_rate:", ["line 11", "leerning_rate", "unknown key"]),
    "nearest key": ("  lr: 1e-2", "  setps: 10", ["line 11", "Did you mean 'steps'"]),
    "dash for underscore": ("merge_method", "merge-method", ["Did you mean 'merge_method'"]),
    "misspelt start": ("task_arithmetic", "task-arith", ["Did you mean 'task_arithmetic'"]),
    "key of a model": ("    name: paper", "    nmae: paper", ["line 6", "Did you mean 'name'"]),
    "mergekit density": ("  lr: 1e-2", "  density: 0.5", ["density cannot be used", "TIES"]),
    "normalize": ("normalize: false", "normalize: true", ["normalize cannot be used"]),
    "slices": ("models:", "slices:", ["slices cannot be used"]),
    "gradient list": ("lr: 1e-2", "lr: [0.1, 0.2]", ["one value for the whole model"]),
    "filter": ("lr: 1e-2", "lr: [{filter: mlp, value: 1}]", ["one value for the whole model"]),
    "boolean for a number": ("lr: 1e-2", "steps: yes", ["boolean"]),
    "negative": ("lr: 1e-2", "lr: -1", ["greater than 0"]),
    "infinite": ("lr: 1e-2", "lr: .inf", ["finite"]),
    "fraction of a step": ("lr: 1e-2", "steps: 1.5", ["integer"]),
    "zero steps": ("lr: 1e-2", "steps: 0", ["greater than or equal to 1"]),
    "dtype": ("dtype: float32", "dtype: bf16", ["bfloat16", "got 'bf16'"]),
    "tokenizer": ("tokenizer_source: base", "tokenizer_source: union", ["expected base"]),
    "key twice": ("dtype: float32", "merge_method: fda", ["line 13", "twice"]),
    "no models": ("models:", "moodels:", ["Did you mean 'models'"]),
    "two of one name": ("- model: ./movie", "- {model: m, name: paper}", ["two models are named"]),
    "two starts": ("merge_method: fda", "merge_method: tsv", ["choose one"]),
    "weight without use": (
        "start: task_arithmetic",
        "start: wudi\n  weight: 0.3",
        ["weight needs merge_method or start task_arithmetic"],
    ),
    "syntax": ("models:", "models: [", ["not valid YAML", "line"]),
}


@pytest.mark.parametrize("case", REFUSALS, ids=str)
def test_refusals_name_the_thing(write, case: str) -> None:
    old, new, said = REFUSALS[case]
    assert old in YAML
    with pytest.raises(InputError) as caught:
        load(write(YAML.replace(old, new, 1)))
    for words in said:
        assert words in str(caught.value)
    assert "config.yaml" in str(caught.value)


def test_python_objects_in_yaml_are_not_built(write, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    text = f"merge_method: !!python/object/apply:os.system ['touch {marker}']\n"
    with pytest.raises(InputError, match="not valid YAML"):
        load(write(text))
    assert not marker.exists()


def test_alias_bombs_are_refused_quickly(write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    text = "\n".join([*lines, "merge_method: fda", "base_model: b", "models: *a11"])
    begun = time.monotonic()
    with pytest.raises(InputError) as caught:
        load(write(text))
    assert time.monotonic() - begun < 5
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("text", ["", "- 1\n", "just words\n"])
def test_other_yaml_is_not_a_configuration(write, text: str) -> None:
    with pytest.raises(InputError, match="expected keys such as merge_method"):
        load(write(text))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "nothing.yaml")
    with pytest.raises(InputError, match="got a folder"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match=r"a file that is no text.*`fda-fast inspect`"):
        load(tmp_path / "binary.yaml")


def test_parse_takes_plain_dicts() -> None:
    config = parse({"merge_method": "wudi", "base_model": "b", "models": [{"model": "m"}]})
    assert isinstance(config, MergeConfig)
    assert config.models[0].model == "m"


def test_nearest_ignores_case_and_dashes() -> None:
    assert nearest("Task-Arithmetic", ["task_arithmetic", "tsv"]) == "task_arithmetic"
    assert nearest("zzz", ["task_arithmetic", "tsv"]) is None


def test_values_of_the_command_line_are_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    start = "merge_method: fda\nbase_model: a\nmodels: [{model: b}]\nparameters:"
    path.write_text(f"{start} {{steps: 3}}\n")
    for given, said in (
        ({"steps": 0}, "parameters.steps: expected greater than or equal to 1, got 0"),
        ({"start": "wodi"}, "parameters.start: expected .* Did you mean 'wudi'?"),
        ({"stpes": 3}, "parameters.stpes: unknown key. Did you mean 'steps'?"),
        ({"lr": [1, 2]}, "parameters.lr: expected one value for the whole model"),
    ):
        with pytest.raises(InputError, match=f"^command line: {said}"):
            load(path, given)
    assert load(path, {"lr": 0.1}).parameters.steps == 3
    path.write_text(f"{start} [steps]\n")
    with pytest.raises(InputError, match=r"line 4: parameters: expected .*, got \['steps'\]"):
        load(path, {"steps": 3})


def test_entries_of_models_are_explained(tmp_path: Path) -> None:
    for models, said in (
        ("[]", r"models: expected at least one entry `model: PATH`, got \[\]"),
        ("[./a]", r"models\.0: expected `model: PATH`, got './a'\. Write `- model: \./a`"),
    ):
        path = tmp_path / "merge.yaml"
        path.write_text(f"merge_method: fda\nbase_model: ./base\nmodels: {models}\n")
        with pytest.raises(InputError, match=said):
            load(path)
    with pytest.raises(InputError, match="expected a YAML configuration, got a folder"):
        load(tmp_path)
