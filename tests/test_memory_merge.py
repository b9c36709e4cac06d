"""merge() of models in memory: the same numbers as on disk, and nothing passed in is touched."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fda_fast
from fda_fast.errors import InputError
from fda_fast.memory_merge import Merged, merge_in_memory

SMALL: dict[str, Any] = {"anchors": 6, "tokens": 3, "steps": 6, "epochs": 3}
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}


def bert(folder: Path) -> nn.Module:
    from transformers import BertModel

    return BertModel.from_pretrained(folder)


def lora(tiny, **load: Any) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still says "gradient checkpointing"
        return PeftModel.from_pretrained(bert(tiny.base), tiny.folder / "lora", **load)


@pytest.fixture
def models(tiny) -> tuple[nn.Module, dict[str, nn.Module]]:
    movie, news, _ = tiny.experts
    return bert(tiny.base), {"movie": bert(movie), "news": bert(news), "lora": lora(tiny)}


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def small(pretrained: Any, experts: Any, **settings: Any) -> Any:
    return fda_fast.merge(pretrained, experts, **{**SMALL, **QUIET, **settings})


@pytest.mark.parametrize("start", ["pretrained", "task_arithmetic", "tsv", "wudi"])
def test_bit_for_bit_what_is_written_on_disk(tiny, models, tmp_path: Path, start: str) -> None:
    pretrained, experts = models
    fda_fast.merge(tiny.base, tiny.experts, tmp_path / "out", start=start, **SMALL, **QUIET)
    before = {name: snapshot(m) for name, m in {"": pretrained, **experts}.items()}
    merged = small(pretrained, experts, start=start)
    assert type(merged) is type(pretrained)
    assert same(merged.state_dict(), load_file(tmp_path / "out" / "model.safetensors"))
    for name, module in {"": pretrained, **experts}.items():
        assert same(module.state_dict(), before[name]), name
    assert not {p.data_ptr() for p in merged.parameters()} & {
        p.data_ptr() for p in pretrained.parameters()
    }


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv", "wudi"])
def test_plain_methods_too(tiny, models, tmp_path: Path, method: str) -> None:
    fda_fast.merge(tiny.base, tiny.experts, tmp_path / "out", method=method, **QUIET)
    merged = fda_fast.merge(*models, method=method, **QUIET)
    assert same(merged.state_dict(), load_file(tmp_path / "out" / "model.safetensors"))


def test_names_come_from_the_folders_that_were_read(tiny, models) -> None:
    pretrained, experts = models
    whole = {name: experts[name] for name in ("movie", "news")}
    assert same(
        small(pretrained, list(whole.values())).state_dict(), small(pretrained, whole).state_dict()
    )


def test_experts_may_be_paths(tiny, models) -> None:
    pretrained, experts = models
    named = dict(zip(experts, tiny.experts, strict=True))
    assert same(small(pretrained, named).state_dict(), small(pretrained, experts).state_dict())


def test_state_dicts_in_and_out(tiny, models) -> None:
    pretrained, experts = models
    expected = small(pretrained, {"movie": experts["movie"]}).state_dict()
    dicts = snapshot(pretrained), {"movie": snapshot(experts["movie"])}
    with torch.device("meta"):
        structure = type(pretrained)(pretrained.config)
    for model in (structure, pretrained, pretrained.config):
        merged = small(*dicts, model=model)
        assert isinstance(merged, dict)
        assert same(merged, expected)
    assert same(dicts[0], pretrained.state_dict())
    with pytest.raises(InputError, match=r"model.*module or transformers config"):
        small(*dicts)


def test_other_heads_are_ignored_with_a_note(tiny, models) -> None:
    from transformers import BertForSequenceClassification

    pretrained, experts = models
    expected = small(pretrained, {"movie": experts["movie"]})
    with_head = BertForSequenceClassification(pretrained.config)
    with_head.bert.load_state_dict(experts["movie"].state_dict())
    done = merge_in_memory(pretrained, {"movie": with_head}, **SMALL, **QUIET)
    assert isinstance(done, Merged) and isinstance(done.model, nn.Module)
    assert same(done.model.state_dict(), expected.state_dict())
    assert any("classifier" in note for note in done.notes)
    assert [layer.layer for layer in done.layers] == ["encoder.layer.0", "encoder.layer.1"]


@pytest.mark.filterwarnings("ignore:All adapters are already merged")  # by the oracle, peft
@pytest.mark.parametrize("kind", ["dora", "merged", "two adapters", "on a fine-tune"])
def test_other_peft_models_are_merged_in_a_copy(tiny, models, kind: str) -> None:
    from peft import LoraConfig

    pretrained, _ = models
    model = lora(tiny)
    if kind == "merged":
        model.merge_adapter()
    elif kind == "on a fine-tune":
        with torch.no_grad():
            model.get_base_model().embeddings.LayerNorm.weight.mul_(1.5)
    else:
        config = LoraConfig(r=2, target_modules=["query"], use_dora=kind == "dora")
        model.add_adapter("second", config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B.second" in name:
                    parameter.copy_(0.05 * torch.randn_like(parameter))
        if kind == "dora":
            model.set_adapter("second")
        else:
            model.base_model.set_adapter(["default", "second"])
    before = snapshot(model)
    by_peft = copy.deepcopy(model).merge_and_unload()
    assert same(
        small(pretrained, {"x": model}, start="task_arithmetic").state_dict(),
        small(pretrained, {"x": by_peft}, start="task_arithmetic").state_dict(),
    )
    assert same(model.state_dict(), before)


def test_a_base_with_adapter_layers_inside_is_refused(tiny, models) -> None:
    model = lora(tiny)
    for pretrained in (model, model.get_base_model()):
        with pytest.raises(InputError, match=r"PEFT adapter layers inside.*unload"):
            small(pretrained, {"movie": models[1]["movie"]})
    with pytest.raises(InputError, match="the PeftModel that they belong to"):
        small(models[0], {"movie": model.get_base_model()})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own import
def test_wrappers_are_seen_through(tiny, models) -> None:
    pretrained, experts = models
    expected = small(pretrained, {"movie": experts["movie"]})
    wrapped = small(nn.DataParallel(pretrained), {"movie": torch.compile(experts["movie"])})
    assert type(wrapped) is type(pretrained)
    assert same(wrapped.state_dict(), expected.state_dict())


def test_dtype_in_every_spelling(models) -> None:
    pretrained, experts = models
    arguments = (pretrained, {"movie": experts["movie"]})
    for dtype in ("bfloat16", torch.bfloat16, "torch.bfloat16"):
        merged = fda_fast.merge(*arguments, method="task_arithmetic", dtype=dtype, **QUIET)
        assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    with pytest.warns(FutureWarning, match="torch_dtype is deprecated"):
        older = fda_fast.merge(
            *arguments, method="task_arithmetic", torch_dtype=torch.bfloat16, **QUIET
        )
    assert same(older.state_dict(), merged.state_dict())
    with (
        pytest.warns(FutureWarning),
        pytest.raises(InputError, match="dtype and torch_dtype"),
    ):
        fda_fast.merge(*arguments, dtype="float32", torch_dtype="float16", **QUIET)


def test_anchors_of_a_merge_on_disk_serve(tiny, models, tmp_path: Path) -> None:
    pretrained, experts = models
    settings = {"init": "gaussian", "scale": "auto", **SMALL, **QUIET}
    fda_fast.merge(tiny.base, tiny.experts, tmp_path / "out", keep_anchors=True, **settings)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    reused = fda_fast.merge(pretrained, experts, anchors_from=tmp_path / "out/anchors", **settings)
    assert same(reused.state_dict(), expected)
    assert same(fda_fast.merge(pretrained, experts, **settings).state_dict(), expected)
    with pytest.raises(InputError, match="epochs: expected one number"):
        small(pretrained, experts, epochs=[1, 2])


def test_tied_weights_stay_tied() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        tie_word_embeddings=True,
    )
    pretrained = Qwen2ForCausalLM(config)
    expert = moved(pretrained)
    settings = {"anchors": 6, "steps": 2, "epochs": 2, "start": "task_arithmetic", **QUIET}
    merged: Any = fda_fast.merge(pretrained, [expert], **settings)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert not torch.equal(merged.lm_head.weight, pretrained.lm_head.weight)
    dicts: Any = fda_fast.merge(
        pretrained.state_dict(), [expert.state_dict()], model=pretrained, **settings
    )
    assert same(dicts, merged.state_dict())


class Block(nn.Module):
    """A residual MLP block that no family describes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(torch.tanh(self.up(x)) * self.up(x))


class Plain(nn.Module):
    """A model of no library: layers in a list, or in a Sequential as in timm."""

    def __init__(self, container: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        blocks = [Block(8) for _ in range(3)]
        self.blocks = nn.ModuleList(blocks) if container is nn.ModuleList else container(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def moved(model: nn.Module, by: float = 0.05) -> nn.Module:
    expert = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += by * torch.randn_like(parameter)
    return expert


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
def test_plain_modules(container: type[nn.Module]) -> None:
    torch.manual_seed(0)
    pretrained = Plain(container).train()
    experts = {"a": moved(pretrained), "b": moved(pretrained)}
    done = merge_in_memory(
        pretrained, experts, anchors=8, tokens=2, steps=20, epochs=30, adapt_lr=1e-2, **QUIET
    )
    merged: Any = done.model
    assert [layer.layer for layer in done.layers] == ["blocks.0", "blocks.1", "blocks.2"]
    assert merged.training and torch.equal(merged.embed.weight, pretrained.embed.weight)
    for layer in done.layers:
        assert layer.adaptation is not None and layer.adaptation[1] < layer.adaptation[0]
    x = torch.randn(5, 2, 4)
    assert merged(x).shape == (5, 2, 8)


def test_layers_that_take_no_tokens_are_refused() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(
                nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)) for _ in range(3)
            )

    pretrained = Images()
    with pytest.raises(InputError, match=r"layer stages\.0 \(Sequential\).*does not map"):
        small(pretrained, [moved(pretrained)])
    empty = nn.Linear(4, 4)
    with pytest.raises(InputError, match="no repeated layers in Linear"):
        small(empty, [moved(empty)])


def test_refusals(tiny, models, tmp_path: Path) -> None:
    pretrained, experts = models
    with pytest.raises(InputError, match="identical to the base model"):
        small(pretrained, [pretrained])
    with pytest.raises(InputError, match="restart has no meaning for models in memory"):
        small(pretrained, experts, restart=True)
    with pytest.raises(InputError, match="output has no meaning"):
        fda_fast.merge(pretrained, experts, tmp_path / "out")
    with pytest.raises(InputError, match="expected output, and no model"):
        fda_fast.merge(tiny.base, tiny.experts)
    with pytest.raises(InputError, match="max_memory has no meaning"):
        small(pretrained, experts, max_memory="1GB")
    with pytest.raises(InputError, match="paths, as the pretrained model is one"):
        fda_fast.merge(tiny.base, [pretrained], tmp_path / "out")
    with pytest.raises(InputError, match="a list or mapping of models"):
        small(pretrained, nn.Sequential(experts["movie"]))
    with pytest.raises(InputError, match="meta device"):
        small(pretrained, [bert(tiny.base).to("meta")])
    with pytest.raises(InputError, match=r"layer.*expected.*a PEFT adapter"):
        small(pretrained, [nn.Linear(3, 3)])
    assert list(tmp_path.iterdir()) == []
