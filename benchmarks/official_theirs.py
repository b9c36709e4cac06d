"""The authors' scripts in a process of their own, on tiny models and a CPU: one half of
`official_parity.py`, which says how to run it.

Their files are read from a checkout and never changed. What stands between them and a tiny model
on a CPU is taken out of the way from outside, and every such intervention is listed in ``SHIMS``,
which the result file repeats.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LAYERS, WIDTH, TOKENS = 2, 32, 5
SHIMS = {
    "sizes": "integers in the functions train and initialize_X, when they are compiled: widths 768"
    f" and 5120 are {WIDTH}, 50 tokens are {TOKENS}, 12 and 40 layers are {LAYERS}",
    "paths": "texts beginning with /home/shikexuan or /data/shikexuan, when they are compiled: the"
    " working folder takes their place",
    "cuda": "Tensor.cuda and Module.cuda give back what they are called on",
    "torch.load": "weights_only=False, the default of the torch they were written for",
    "from_pretrained": "device_map is left out, which would need accelerate",
    "dropout": "the tiny RoBERTa has none: NLU/adapt.py leaves it on from a merged start",
    "gt": "NLG/construct_fda.py: the undefined name gt is None",
    "evaluation": "src.eval, data loaders, metrics, trainers, tokenizers and torchvision are empty"
    " modules; NLU/adapt.py is stopped where it begins to evaluate",
    "backward": "Tensor.backward notes the loss; torch.save notes the weights of a merged model",
}
_SIZES = {
    "Vision": {768: WIDTH, 50: TOKENS, 12: LAYERS},
    "NLU": {768: WIDTH, 12: LAYERS},
    "NLG": {5120: WIDTH, 40: LAYERS},
}
_EMPTY = (
    "torchvision", "ftfy", "timm", "datasets", "pandas", "scipy", "sklearn", "vllm", "tiktoken",
    "src.eval", "utils.glue_data_loader", "utils.customized_trainers", "utils.metrics",
    "utils.llm_data_loader", "utils.evaluate_llms_utils",
)  # fmt: skip


class _Shrink(ast.NodeTransformer):
    """Other sizes and folders in the syntax tree of a script."""

    def __init__(self, sizes: dict[int, int], work: Path) -> None:
        self._sizes, self._work, self._inside = sizes, work, False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        before, self._inside = self._inside, self._inside or node.name in ("train", "initialize_X")
        self.generic_visit(node)
        self._inside = before
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        if self._inside and type(value) is int and value in self._sizes:
            return ast.copy_location(ast.Constant(self._sizes[value]), node)
        if isinstance(value, str):
            for prefix in ("/home/shikexuan", "/data/shikexuan"):
                if value.startswith(prefix):
                    text = f"{self._work}{value.removeprefix(prefix)}"
                    return ast.copy_location(ast.Constant(text), node)
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles their modules after ``_Shrink``."""

    shrink: _Shrink

    def source_to_code(self, data: Any, path: Any, **_: Any) -> types.CodeType:  # type: ignore[override]
        tree = ast.fix_missing_locations(self.shrink.visit(ast.parse(data)))
        return compile(tree, path, "exec", dont_inherit=True)

    def get_code(self, fullname: str) -> types.CodeType:
        # Never from __pycache__: theirs is committed.
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class _Finder(importlib.abc.MetaPathFinder):
    """Empty modules for what cannot be had, their modules through ``_Loader``."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == empty or name.startswith(f"{empty}.") for empty in _EMPTY):
            return importlib.machinery.ModuleSpec(name, _Nothing(), is_package=True)
        file = self._home.joinpath(*name.split("."))
        if file.with_suffix(".py").is_file():
            file = file.with_suffix(".py")
            return importlib.util.spec_from_file_location(
                name, file, loader=_Loader(name, str(file))
            )
        return None


class _Nothing(importlib.abc.Loader):
    def create_module(self, spec: Any) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


class _Empty(types.ModuleType):
    """Has whatever is asked for: a class that does nothing and returns itself."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _Any(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Anything(metaclass=_Any):
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __class_getitem__(cls, _: Any) -> type:
        return cls

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __getitem__(self, _: Any) -> float:
        return 0.0


class _BeginsToEvaluate(Exception):
    pass


def run(repo: Path, part: str, script: str, work: Path, flags: list[str]) -> dict[str, Any]:
    """One of their scripts, start to end; returns the losses and the merged weights' file."""
    home = repo / part
    _Loader.shrink = _Shrink(_SIZES[part], work)
    _on_cpu(home)
    losses: list[float] = []
    plain_backward, plain_save = Tensor.backward, torch.save

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(self.item())
        plain_backward(self, *args, **kwargs)

    def save(thing: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if Path(str(file)).name.startswith("merged_model_by_"):
            plain_save(_weights(thing), work / "their_merged.pt")
            return
        plain_save(thing, file, *args, **kwargs)

    Tensor.backward, torch.save = backward, save  # type: ignore[method-assign]
    sys.argv = [script, *flags]
    loader = _Loader("__main__", str(home / script))
    scope = {"__name__": "__main__", "__file__": str(home / script), "gt": None}
    stop = None if part != "NLU" else _stop_at_tokenizer()
    try:
        exec(loader.get_code("__main__"), scope)
    except _BeginsToEvaluate:
        if stop is None:
            raise
    return {"losses": losses}


def _on_cpu(home: Path) -> None:
    sys.path.insert(0, str(home))
    sys.meta_path.insert(0, _Finder(home))
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    load = torch.load
    torch.load = lambda *args, **kw: load(*args, **{"weights_only": False, **kw})
    import transformers

    for name in ("Trainer", "TrainerState", "TrainingArguments"):
        setattr(transformers, name, _Anything)
    for kind in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSequenceClassification,
    ):
        kind.from_pretrained = _without_device_map(kind.from_pretrained)
    transformers.AutoTokenizer.from_pretrained = lambda *_, **__: _NoTokenizer()


def _without_device_map(from_pretrained: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_map", None)
        return from_pretrained(*args, **kwargs)

    return call


class _NoTokenizer:
    def save_pretrained(self, folder: str) -> None:
        pass


def _stop_at_tokenizer() -> bool:
    import transformers

    def stop(*_: Any, **__: Any) -> None:
        raise _BeginsToEvaluate

    transformers.AutoTokenizer.from_pretrained = stop
    return True


def _weights(model: Any) -> dict[str, Tensor]:
    """The layers of a merged model; their parameters may be plain tensors by then."""
    if hasattr(model, "roberta"):
        prefix, layers = "roberta.encoder.layer", model.roberta.encoder.layer
    else:
        prefix = "model.visual.transformer.resblocks"
        layers = model.model.visual.transformer.resblocks
    found = {}
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            for name in ("weight", "bias", "in_proj_weight", "in_proj_bias"):
                tensor = getattr(module, name, None)
                if isinstance(tensor, Tensor):
                    found[".".join(filter(None, (f"{prefix}.{index}", path, name)))] = (
                        tensor.detach().clone()
                    )
    return found


def make(repo: Path, work: Path) -> None:
    """Tiny checkpoints in their formats, by the libraries they use."""
    _Loader.shrink = _Shrink({}, work)
    _on_cpu(repo / "Vision")
    torch.manual_seed(0)
    _vision(work)
    _nlu(work)
    _nlg(work)


def _finetuned(model: nn.Module, size: float) -> nn.Module:
    import copy

    expert = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expert.parameters():
            change = torch.randn_like(parameter)
            parameter += size * change * parameter.norm().clamp_min(0.1) / change.norm()
    return expert


def _vision(work: Path) -> None:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from src.modeling import ImageEncoder
    from utils import dataset_list

    images = CLIPVisionCfg(layers=LAYERS, width=WIDTH, head_width=8, patch_size=4, image_size=8)
    texts = CLIPTextCfg(context_length=4, vocab_size=16, width=16, heads=2, layers=1)
    encoder = ImageEncoder.__new__(ImageEncoder)
    nn.Module.__init__(encoder)
    encoder.model = CLIP(16, images, texts, quick_gelu=True)
    del encoder.model.transformer
    encoder = _finetuned(encoder, 0.1)  # real norms and biases are not ones and zeros
    home = work / "ViT-B-32"
    home.mkdir()
    torch.save(encoder, home / "zeroshot.pt")
    for task in dataset_list:
        (home / task).mkdir()
        torch.save(_finetuned(encoder, 0.05), home / task / "finetuned.pt")
    torch.save(_finetuned(encoder, 0.03), home / "merged_tsv.pt")  # any merged model will do


def _nlu(work: Path) -> None:
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=20,
        type_vocab_size=1,
        # NLU/adapt.py leaves dropout on from a merged start: without it results can be compared.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    base = _finetuned(RobertaForMaskedLM(config), 0.1)
    base.save_pretrained(work / "roberta-base")
    classifier = RobertaForSequenceClassification(config)
    classifier.roberta.load_state_dict(base.roberta.state_dict(), strict=False)
    for task in ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"):
        _finetuned(classifier, 0.05).save_pretrained(work / task / "roberta-base_lr1e-05")


def _nlg(work: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        initializer_range=0.1,
    )
    models = work / "MergeLM_models"
    base = LlamaForCausalLM(config)
    experts = [_finetuned(base, 0.05) for _ in range(2)]
    merged = _finetuned(base, 0.0)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            for expert in experts:
                parameter += 0.5 * (expert.get_parameter(name) - base.get_parameter(name))
    folders = {
        models / "Llama-2-13b-hf": base,
        models / "WizardMath-13B-V1.0": experts[0],
        models / "llama-2-13b-code-alpaca": experts[1],
        work / "math" / "merged": merged,
        work / "code" / "merged": merged,
    }
    for folder, model in folders.items():
        model.save_pretrained(folder)
        (folder / "split").mkdir()
        parts = {"model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm}
        parts |= {"lm_head": model.lm_head}
        parts |= {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
        names = {name: name.replace("layers", "layer").replace(".", "_") for name in parts}
        for name, part in parts.items():
            torch.save(part, folder / "split" / f"{names[name]}.pt")
        index = {name: f"{file}.pt" for name, file in names.items()}
        (folder / "split" / "model_index.json").write_text(json.dumps(index))
        if folder.parent == models:
            (folder / "model.safetensors").unlink()  # the pickled parts are all there is


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("make", "run"))
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", choices=tuple(_SIZES))
    parser.add_argument("--script")
    parser.add_argument("--log", type=Path)
    # Everything behind "--" is for their script.
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    flags = sys.argv[cut + 1 :]
    args = parser.parse_args(sys.argv[1:cut])
    torch.set_num_threads(1)
    if args.action == "make":
        make(args.repo, args.work)
        return
    found = run(args.repo, args.part, args.script, args.work, flags)
    args.log.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
