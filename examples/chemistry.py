"""Merges a published chemistry BERT with its two third-party fine-tunes, as they were published.

    python examples/chemistry.py

The rxnfp package (MIT) holds a BERT pretrained on reaction SMILES and two models fine-tuned from it
by its authors: one to classify reactions of the Pistachio collection, whose tensors are stored
without the "bert." prefix, and one for Schneider's 50 classes, with its classification head. All
three are PyTorch .bin files; fda_fast reads them without executing what a pickle may hold.

The merged model is loaded with transformers, and its reaction fingerprint (the [CLS] state) is
compared with each expert's on textbook reactions. The package has no labelled reactions, so there
is no accuracy here: closeness to both experts at once is what merging is after.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from assets import RXNFP, AssetError, fetch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.utils import logging as transformers_logging

import fda_fast

# Halfway along the sum of the two task vectors: their plain average.
SCALING = 0.5
CONSTRUCT: dict[str, Any] = {"anchors": 64, "tokens": 5, "steps": 100}
ADAPT: dict[str, dict[str, Any]] = {
    "pretrained": {"adapt_distance": "cosine", "adapt_lr": 1e-3, "epochs": 30},
    "task_arithmetic": {"adapt_distance": "cosine", "adapt_lr": 1e-2, "epochs": 10},
}
EXPERTS = {"pistachio": "bert_ft", "schneider": "bert_ft_10k_25s"}

# The reactions are ordinary textbook ones, written down here: precursors >> product.
REACTIONS = {
    "Fischer esterification": "CC(=O)O.CCO>>CCOC(C)=O",
    "amide coupling": "O=C(O)c1ccccc1.NCc1ccccc1>>O=C(NCc1ccccc1)c1ccccc1",
    "Suzuki coupling": "Brc1ccccc1.Cc1ccc(B(O)O)cc1>>Cc1ccc(-c2ccccc2)cc1",
    "Boc protection": "CC(C)(C)OC(=O)OC(=O)OC(C)(C)C.NCCc1ccccc1>>CC(C)(C)OC(=O)NCCc1ccccc1",
    "Boc removal": "CC(C)(C)OC(=O)N1CCN(c2ccccc2)CC1.O=C(O)C(F)(F)F>>c1ccc(N2CCNCC2)cc1",
    "nitro reduction": "O=[N+]([O-])c1ccc(Cl)cc1.[Fe]>>Nc1ccc(Cl)cc1",
    "Williamson ether": "Oc1ccccc1.CCBr.[K+]>>CCOc1ccccc1",
    "reductive amination": "O=Cc1ccccc1.C1COCCN1>>c1ccc(CN2CCOCC2)cc1",
    "aromatic substitution": "O=[N+]([O-])c1ccc(F)cc1.C1CCNCC1>>O=[N+]([O-])c1ccc(N2CCCCC2)cc1",
    "saponification": "COC(=O)c1ccc(Br)cc1.[Li+].[OH-]>>O=C(O)c1ccc(Br)cc1",
    "Grignard addition": "CC(=O)c1ccccc1.C[Mg]Br>>CC(C)(O)c1ccccc1",
    "sulfonamide": "CS(=O)(=O)Cl.Nc1ccccc1>>CS(=O)(=O)Nc1ccccc1",
    "Sonogashira coupling": "Ic1ccccc1.C#CC(C)(C)O.[Cu]>>CC(C)(O)C#Cc1ccccc1",
    "alcohol oxidation": "OCc1ccccc1.O=[Mn]=O>>O=Cc1ccccc1",
    "ketone reduction": "O=C(c1ccccc1)c1ccccc1.[BH4-].[Na+]>>OC(c1ccccc1)c1ccccc1",
    "acetylation": "CC(=O)OC(C)=O.O=C(O)c1ccccc1O>>CC(=O)Oc1ccccc1C(=O)O",
    "Buchwald-Hartwig": "Brc1ccccc1.C1COCCN1.[Pd]>>c1ccc(N2CCOCC2)cc1",
    "Diels-Alder": "C=CC=C.O=C1C=CC(=O)O1>>O=C1OC(=O)C2CC=CCC12",
    "urea formation": "O=C=Nc1ccccc1.NCc1ccccc1>>O=C(NCc1ccccc1)Nc1ccccc1",
    "acyl chloride": "O=C(O)c1ccccc1.O=S(Cl)Cl>>O=C(Cl)c1ccccc1",
    "azide-alkyne cycloaddition": "[N-]=[N+]=NCc1ccccc1.C#Cc1ccccc1>>c1ccc(Cn2cc(-c3ccccc3)nn2)cc1",
    "Heck reaction": "Ic1ccccc1.C=CC(=O)OC>>COC(=O)/C=C/c1ccccc1",
    "Wittig reaction": "O=Cc1ccccc1.CCOC(=O)C=P(c1ccccc1)(c1ccccc1)c1ccccc1>>CCOC(=O)/C=C/c1ccccc1",
    "bromination": "COc1ccccc1.BrBr>>COc1ccc(Br)cc1",
}

# One token per atom, bracketed atom, bond or ring-closure digit (the reaction arrow is one too).
SMILES_TOKEN = re.compile(
    r"\[[^\]]+\]|%\([0-9]{3}\)|%[0-9]{2}|Br|Cl|>>|[BCNOSPFIbcnosp0-9()\\/.=#\-+:~@?*$>|]"
)


def tokenise(reactions: list[str], vocabulary: Path) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [reactions, longest]."""
    words = vocabulary.read_text(encoding="utf-8").split("\n")
    number = {word: i for i, word in reversed(list(enumerate(words))) if word}
    rows = []
    for smiles in reactions:
        tokens = SMILES_TOKEN.findall(smiles)
        if "".join(tokens) != smiles:
            raise ValueError(f"not a SMILES: {smiles}")
        rows.append(
            [number[t] if t in number else number["[UNK]"] for t in ("[CLS]", *tokens, "[SEP]")]
        )
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), number["[PAD]"])
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


@torch.inference_mode()
def fingerprints(model: BertModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The models' own reaction fingerprint: the last state of [CLS]; [reactions, 256]."""
    return model.eval()(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]


def load_published(name: str) -> BertModel:
    """One of the published .bin files, by transformers' own rules."""
    folder = fetch(RXNFP) / name
    config = BertConfig.from_pretrained(folder, local_files_only=True)
    state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    state = {key.removeprefix("bert."): value for key, value in state.items()}
    model = BertModel(config)
    missing = model.load_state_dict(state, strict=False).missing_keys
    if missing:
        raise RuntimeError(f"{folder} lacks {missing}")
    return model


class Comparison:
    """Fingerprints of the experts on ``REACTIONS``, to hold merged models against."""

    def __init__(self) -> None:
        folder = fetch(RXNFP)
        self.ids, self.mask = tokenise(list(REACTIONS.values()), folder / "bert_ft" / "vocab.txt")
        models = {task: load_published(name) for task, name in EXPERTS.items()}
        self.expert = {t: fingerprints(m, self.ids, self.mask) for t, m in models.items()}

    def of(self, model: BertModel) -> dict[str, float]:
        """Mean cosine with each expert's fingerprint, and the mean of those; in [-1, 1]."""
        mine = fingerprints(model, self.ids, self.mask)
        scores = {
            task: torch.cosine_similarity(mine, theirs, dim=1).mean().item()
            for task, theirs in self.expert.items()
        }
        return {**scores, "both": sum(scores.values()) / len(scores)}


def run(output: Path, *, quick: bool = False) -> dict[str, dict[str, float]]:
    """Merges by Task Arithmetic and by FDA from two starts; cosines by method.

    Args:
        output: folder for the merged checkpoints; must not exist, or be empty.
        quick: a few steps only: shows that everything runs, not what FDA reaches.
    """
    folder = fetch(RXNFP)
    base = folder / "bert_pretrained"
    experts = {task: folder / name for task, name in EXPERTS.items()}
    compare = Comparison()
    found = {"pretrained": compare.of(load_published("bert_pretrained"))}

    def score(label: str, name: str, **settings: Any) -> Path:
        merged = output / name
        fda_fast.merge(base, experts, merged, **settings)
        found[label] = compare.of(BertModel.from_pretrained(merged, local_files_only=True))
        return merged

    score("Task Arithmetic", "task-arithmetic", method="task_arithmetic", scaling=SCALING)
    construct = {"anchors": 8, "tokens": 4, "steps": 4, "epochs": 2} if quick else CONSTRUCT
    adapt = {} if quick else ADAPT
    first = score(
        "FDA from pretrained",
        "fda-pretrained",
        keep_anchors=True,
        **{**adapt.get("pretrained", {}), **construct},
    )
    score(
        "FDA from Task Arithmetic",
        "fda-task-arithmetic",
        start="task_arithmetic",
        scaling=SCALING,
        anchors_from=first / "anchors",
        **{**adapt.get("task_arithmetic", {}), **construct},
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    parser.add_argument("--output", type=Path, default=Path("demo-output/chemistry"))
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.output.exists():
        shutil.rmtree(args.output)  # of an earlier run
    begun = time.perf_counter()
    found = run(args.output, quick=args.quick)
    table = Table("cosine of [CLS]", title=f"Fingerprints of {len(REACTIONS)} reactions")
    for column in ("pistachio", "schneider", "both"):
        table.add_column(f"with {column}" if column != "both" else "mean", justify="right")
    for method, scores in found.items():
        table.add_row(method, *(f"{scores[key]:.3f}" for key in ("pistachio", "schneider", "both")))
    Console().print(table)
    print(f"{time.perf_counter() - begun:.0f} s. Merged models: {args.output}")


if __name__ == "__main__":
    try:
        main()
    except AssetError as error:
        sys.exit(f"error: {error}")
