"""The authors' scripts and ours on the same tiny checkpoints: same files, losses and weights.

    git clone https://github.com/Sphere-AI-Lab/FDA theirs
    pip install --no-deps --target site open_clip_torch==2.0.2 transformers==4.44.1 \
        tokenizers==0.19.1 huggingface_hub==0.24.6 requests urllib3 idna certifi charset-normalizer
    python benchmarks/official_parity.py --repo theirs --site site

Their code runs in processes of its own (`official_theirs.py`, which lists what stands in for the
datasets, the card and the sizes it expects), ours through `fda_fast.compat.official`. Everything is
made in a temporary folder: tiny CLIP image encoders as pickled modules of open_clip 2.0.2, RoBERTas
saved by transformers 4.44.1, Llamas likewise with the layers split as NLG wants them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import write_json
from official_compare import (
    anchors,
    files_of,
    histories,
    layout,
    norm,
    relative,
    without_key_bias,
)
from official_theirs import LAYERS, SHIMS
from safetensors.torch import load_file
from torch import Tensor

from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.compat.official import adapting
from fda_fast.compat.official.commands import main as official

STEPS, EPOCHS = 20, 5
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-3
PARTS = {"vision": "Vision", "nlu": "NLU", "nlg": "NLG"}
NAMES = ("init_by_gauss_random", "init_by_weights")


@dataclass(frozen=True)
class Case:
    """One construct command."""

    modality: str
    name: str
    anchors: int
    loss: str = "cos"

    @property
    def label(self) -> str:
        return f"{self.modality} {self.name} {self.anchors} {self.loss}"


CONSTRUCT = [
    *(Case("vision", name, 8) for name in NAMES),
    Case("vision", "init_by_weights", 64),  # more rows than the weights have: midpoints
    *(Case("vision", NAMES[0], 8, loss) for loss in ("mse", "l1")),
    *(Case("nlu", f"{name}_pos", 8) for name in NAMES),
    *(Case("nlu", NAMES[0], 8, loss) for loss in ("mse", "l1")),
    *(Case("nlg", name, 40) for name in NAMES),
    Case("nlg", "init_by_weights", 200),  # midpoints again
]
ADAPT = [
    (Case("vision", NAMES[0], 8), "pretrained", "cos", 1e-4),
    (Case("vision", NAMES[1], 8), "ta", "cos", 1e-2),
    (Case("vision", NAMES[1], 8), "ta", "l1", 1e-2),
    (Case("vision", NAMES[0], 8), "tsv", "mse", 1e-2),
    (Case("nlu", f"{NAMES[0]}_pos", 8), "pretrained", "mse", 5e-5),
    (Case("nlu", f"{NAMES[1]}_pos", 8), "ta", "mse", 1e-2),
    (Case("nlg", NAMES[0], 40), "merged", "cos", 1e-2),
    (Case("nlg", NAMES[1], 40), "merged", "mse", 1e-2),
]


class Run:
    """Both codes over one set of checkpoints."""

    def __init__(self, repo: Path, site: Path, work: Path) -> None:
        self._repo, self._site, self._work = repo, site, work
        self.anchors = {"theirs": work / "anchors_theirs", "ours": work / "anchors_ours"}
        self._theirs("make")

    def construct(self, case: Case) -> dict[str, Any]:
        """Both construct; files, layouts, losses and anchors compared."""
        flags = [*self._flags(case), "--save_dual_anchors"]
        if case.modality != "nlg":
            flags += ["--anchor_loss", case.loss]
        shutil.rmtree(self._work / "dual_anchors", ignore_errors=True)
        theirs = self._script(case, "construct_fda.py", flags + self._saved(case, "theirs"))
        if case.modality == "nlg":
            shutil.copytree(self._work / "dual_anchors", self.anchors["theirs"], dirs_exist_ok=True)
            shutil.rmtree(self._work / "dual_anchors")
        with histories() as found:
            ran = official(
                [
                    *(case.modality, "construct"),
                    *(flags + self._saved(case, "ours")),
                    *("--as-published", "--device", "cpu", "--quiet"),
                ]
            )
        assert ran == 0
        ours, exact = (torch.stack(each) for each in zip(*found, strict=True))
        losses = torch.tensor(theirs, dtype=torch.float64)
        losses = losses.reshape(LAYERS, -1, STEPS).transpose(1, 2)  # layers, steps, tasks
        files = {who: files_of(root) for who, root in self.anchors.items()}
        if files["theirs"].keys() != files["ours"].keys():
            raise SystemExit(f"{case.label}: files {files['theirs'].keys() ^ files['ours'].keys()}")
        layouts = {w: {n: layout(p) for n, p in fs.items()} for w, fs in files.items()}
        if layouts["theirs"] != layouts["ours"]:
            raise SystemExit(f"{case.label}: layouts differ")
        difference = (ours - losses).abs()
        row = {
            "case": case.label,
            "files": len(files["ours"]),
            "layout": next(layout(p) for n, p in files["ours"].items() if n.endswith(".npy")),
            "losses": list(losses.shape),
            "first_loss": losses[:, 0].mean().item(),
            "last_loss": losses[:, -1].mean().item(),
            "max_loss_difference": difference.max().item(),
            "steps_within_tolerance": int((difference.amax((0, 2)) <= LOSS_TOLERANCE).sum()),
            "their_error": (losses - exact).abs().max().item(),
            "our_error": (ours - exact).abs().max().item(),
            "max_anchor_difference": max(
                relative(a, b)
                for name in files["ours"]
                if name.endswith(".npy")
                for a, b in [(anchors(files["theirs"][name]), anchors(files["ours"][name]))]
            ),
        }
        closer = row["our_error"] <= row["their_error"] / 4
        if not (row["max_loss_difference"] <= LOSS_TOLERANCE or closer):
            raise SystemExit(f"{case.label}: losses differ by {row['max_loss_difference']:.2g}")
        return row

    def adapt(self, case: Case, start: str, loss: str, lr: float) -> list[dict[str, Any]]:
        """Both adapt to the anchors of both; the merged weights compared."""
        rows = []
        self.construct(case)
        for whose in ("theirs", "ours"):
            flags = [
                *self._flags(case),
                *("--adapt_loss", loss, "--adapt_lr", str(lr)),
                *("--adapt_epochs", str(EPOCHS), "--adapt_batch_size", "16"),
            ]
            place = []
            if case.modality == "nlg":
                flags = [flag.replace("--gen_", "--opt_") for flag in flags]
                flags += ["--merged_model_path", str(self._work / "math" / "merged")]
                self._rename_for_their_adapt(whose)
                place = ["--model_location", str(self._work / "MergeLM_models")]
                place += ["--read_anchors_path", str(self._work / "dual_anchors")]
                place += ["--save_merged_model_path", str(self._work / "our_models")]
            else:
                flags += ["--init_params", start, "--read_anchors_path", str(self.anchors[whose])]
            self._script(case, "adapt.py", flags)
            theirs = self._their_weights(case)
            folder = adapted_folder(
                [case.modality, "adapt", *flags, *place, "--device", "cpu", "--quiet"]
            )
            ours = our_weights(folder, theirs)
            rows.append(self._compare(case, start, loss, whose, theirs, ours))
        return rows

    def _compare(
        self,
        case: Case,
        start: str,
        loss: str,
        whose: str,
        theirs: dict[str, Tensor],
        ours: dict[str, Tensor],
    ) -> dict[str, Any]:
        """Differences relative to how far adaptation moved the weights from its start.

        A key bias has a gradient of zero but for rounding, which Adam makes a step of full size:
        two runs agree in it by chance only, so it is left out.
        """
        begun = self._start(case, start, theirs)
        moved = {n: without_key_bias(n, theirs[n] - begun[n]) for n in theirs}
        off = {n: without_key_bias(n, theirs[n] - ours[n]) for n in theirs}
        row = {
            "case": f"{case.label}, {start} {loss}",
            "anchors_of": whose,
            "tensors": len(theirs),
            "moved": norm(moved.values()),
            "difference": norm(off.values()) / norm(moved.values()),
            "largest_difference": max(t.abs().max().item() for t in off.values()),
        }
        if not row["difference"] <= WEIGHT_TOLERANCE:
            raise SystemExit(f"{row['case']}: weights differ by {row['difference']:.2g}")
        return row

    def _start(self, case: Case, start: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights that adaptation begins with."""
        if case.modality == "nlg":
            return Checkpoint.open(self._work / "math" / "merged").read(list(like))
        if case.modality == "vision":
            base, pattern = self._work / "ViT-B-32" / "zeroshot.pt", "ViT-B-32/*/finetuned.pt"
        else:
            base, pattern = self._work / "roberta-base", "*/roberta-base_lr1e-05"
        found = Checkpoint.open(base).read(list(like))
        if start == "pretrained":
            return found
        if start == "tsv":
            return Checkpoint.open(base.with_name("merged_tsv.pt")).read(list(like))
        experts = [Checkpoint.open(path).read(list(like)) for path in self._work.glob(pattern)]
        return {n: t + 0.3 * sum(expert[n] - t for expert in experts) for n, t in found.items()}

    def _their_weights(self, case: Case) -> dict[str, Tensor]:
        if case.modality != "nlg":
            return torch.load(self._work / "their_merged.pt", weights_only=True)
        files = sorted((self._work / "save_merge_models").rglob("math/model.safetensors"))
        found = load_file(files[-1])
        shutil.rmtree(self._work / "save_merge_models")
        return {name: tensor for name, tensor in found.items() if ".mlp." in name}

    def _rename_for_their_adapt(self, whose: str) -> None:
        target = self._work / "dual_anchors"
        shutil.rmtree(target, ignore_errors=True)
        for path in self.anchors[whose].rglob("*.npy"):
            new = target / str(path.relative_to(self.anchors[whose])).replace("-gen-", "-opt-")
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, new)

    def _flags(self, case: Case) -> list[str]:
        flags = ["--name", case.name, "--anchor_num", str(case.anchors), "--scale", "0.01"]
        if case.modality == "nlg":
            return [*flags, "--do_math", "--do_code", "--gen_steps", str(STEPS), "--gen_lr", "0.01"]
        model = "ViT-B-32" if case.modality == "vision" else "roberta-base"
        flags += ["--model", model, "--model_location", str(self._work)]
        return [*flags, "--opt_steps", str(STEPS), "--opt_lr", "0.01"]

    def _saved(self, case: Case, whose: str) -> list[str]:
        root = self.anchors[whose]
        shutil.rmtree(root, ignore_errors=True)
        if case.modality != "nlg":
            return ["--save_anchors_path", str(root)]
        if whose == "theirs":
            return []  # a literal in their script
        models = str(self._work / "MergeLM_models")
        return ["--save_anchors_path", str(root), "--model_location", models]

    def _script(self, case: Case, script: str, flags: list[str]) -> list[float]:
        log = self._work / "log.json"
        part = PARTS[case.modality]
        self._theirs("run", "--part", part, "--script", script, "--log", str(log), "--", *flags)
        losses: list[float] = json.loads(log.read_text())["losses"]
        return losses

    def _theirs(self, action: str, *rest: str) -> None:
        runner = Path(__file__).with_name("official_theirs.py")
        command = [sys.executable, str(runner), action, "--repo", str(self._repo)]
        done = subprocess.run(
            [*command, "--work", str(self._work), *rest],
            cwd=self._work,
            env={**os.environ, "PYTHONPATH": str(self._site), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"their side failed:\n{done.stderr[-3000:]}")


def adapted_folder(argv: list[str]) -> Path:
    """Where our adapt command put the merged model."""
    written: list[Path] = []
    run = adapting.run

    def noted(*args: Any, **kwargs: Any) -> list[Path]:
        written.extend(run(*args, **kwargs))
        return written

    adapting.run = noted
    try:
        assert official(argv) == 0
    finally:
        adapting.run = run
    return written[0]


def our_weights(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a merged model, which is then removed: the next run writes it again."""
    found = Checkpoint.open(path).read(list(like))
    shutil.rmtree(path if path.is_dir() else path.parent)
    twin = path.with_name("code")
    if path.name == "math" and twin.is_dir():
        shutil.rmtree(twin)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repo", type=Path, required=True, help="checkout of the authors' code")
    parser.add_argument("--site", type=Path, required=True, help="folder of their libraries")
    parser.add_argument("--out", type=Path, help="folder of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args.repo.resolve(), args.site.resolve(), Path(folder))
        construction, adaptation = [], []
        for case in CONSTRUCT:
            construction.append(run.construct(case))
            print(json.dumps(construction[-1]), flush=True)
        for case, start, loss, lr in ADAPT:
            for row in run.adapt(case, start, loss, lr):
                adaptation.append(row)
                print(json.dumps(row), flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=args.repo, capture_output=True, text=True
    )
    payload = {
        "theirs": {
            "commit": commit.stdout.strip(),
            "transformers": "4.44.1",
            "open_clip_torch": "2.0.2",
            "shims": SHIMS,
        },
        "transformers": transformers.__version__,
        "steps": STEPS,
        "epochs": EPOCHS,
        "loss_tolerance": LOSS_TOLERANCE,
        "weight_tolerance": WEIGHT_TOLERANCE,
        "construct": construction,
        "adapt": adaptation,
    }
    print(write_json("official", payload, folder=args.out))


if __name__ == "__main__":
    main()
