"""A whole merge of a synthetic model of billion-parameter size, within a memory budget.

    python benchmarks/bench_merge.py FOLDER                    # some minutes, 9 GB of disk
    python benchmarks/bench_merge.py FOLDER --model llama-tiny # the same in small

Measures, each merge in a process of its own: peak resident memory under --max-memory, with all
layers and with a third of them; bytes read of every file; where the time went and how much of it
overlapped; what `plan` had said. Then the small model is killed at random times and resumed, and
resumed after its disk was full. FOLDER receives everything and is left empty.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import write_json
from synthetic import CONFIGS, make

from fda_fast.times import TIMES

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"anchors": 64, "steps": 4, "epochs": 4, "batch_size": 64}


def config(models: list[Path], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "merge_method": "fda",
        "base_model": str(models[0]),
        "models": [{"model": str(path)} for path in models[1:]],
        "parameters": settings,
    }


def child(order: dict[str, Any]) -> dict[str, Any]:
    """One merge, with the bytes that are read of every weight file counted."""
    from fda_fast.checkpoints.tensorfile import TensorFile
    from fda_fast.config import parse
    from fda_fast.merge import run
    from fda_fast.resources import Resources

    torch.set_num_threads(order["threads"])
    counted: dict[str, int] = defaultdict(int)
    original = TensorFile._read_one

    def counting(self: TensorFile, stream: Any, info: Any) -> Any:
        counted[str(self.path)] += info.span
        return original(self, stream, info)

    TensorFile._read_one = counting  # type: ignore[method-assign]
    report = run(
        parse(order["config"]),
        order["output"],
        progress=False,
        resources=Resources.of("cpu", max_memory=order["max_memory"]),
    )
    return {
        "peak_bytes": report.peak_memory,
        "seconds": {name: round(value, 2) for name, value in report.seconds.items()},
        "read": dict(counted),
        "input": _io("rchar"),
    }


def _io(key: str) -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def isolated(what: str, order: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", what],
        input=json.dumps(order),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def plan_child(order: dict[str, Any]) -> dict[str, Any]:
    """What ``plan`` says of the same merge."""
    from fda_fast.config import parse
    from fda_fast.planning import plan_merge
    from fda_fast.resources import Resources

    torch.set_num_threads(order["threads"])
    resources = Resources.of("cpu", max_memory=order["max_memory"])
    planned = plan_merge(parse(order["config"]), Path(order["output"]), resources)
    return {"seconds": planned.seconds, "peak_bytes": planned.memory_bytes}


def measured(models: list[Path], given: argparse.Namespace, layers: int) -> dict[str, Any]:
    output = given.folder / "out"
    order = {
        "config": config(models, SETTINGS),
        "output": str(output),
        "max_memory": given.max_memory,
        "threads": given.threads,
    }
    said = isolated("plan", order)
    found = isolated("merge", order)
    sizes = {
        str(path.relative_to(given.folder)): path.stat().st_size
        for model in models
        for path in sorted(model.glob("*.safetensors"))
    }
    read = {str(Path(path).relative_to(given.folder)): n for path, n in found["read"].items()}
    seconds = found["seconds"]
    side = seconds["read"] + seconds["save"]
    row = {
        "layers": layers,
        "parameters": sum(p.stat().st_size for p in models[0].glob("*.safetensors")) // 2,
        "peak_bytes": found["peak_bytes"],
        "planned_peak_bytes": said["peak_bytes"],
        "seconds": seconds,
        "planned_seconds": said["seconds"],
        "overlapped_seconds": round(side - seconds["wait"], 2),
        "read_over_size": {
            name: round(read.get(name, 0) / size, 4) for name, size in sizes.items()
        },
        "output_bytes": sum(p.stat().st_size for p in output.glob("*.safetensors")),
    }
    shutil.rmtree(output)
    print(json.dumps(row, indent=1), flush=True)
    return row


def kills(models: list[Path], given: argparse.Namespace) -> dict[str, Any]:
    """Random kills of real commands, by the script that the tests use."""
    path = given.folder / "kills.yaml"
    path.write_text(json.dumps(config(models, {"anchors": 64, "steps": 60, "epochs": 20})))
    script = ROOT / "tests" / "kill_resume.py"
    runs = given.folder / "kills"
    done = subprocess.run(
        [sys.executable, str(script), str(path), str(runs), "--kills", str(given.kills)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(given.threads)},
    )
    print(done.stdout, done.stderr[-2000:], flush=True)
    shutil.rmtree(runs)
    killed = done.stdout.count("killed after")
    return {"kills": killed, "same_bytes": done.returncode == 0}


def full_disk(models: list[Path], given: argparse.Namespace) -> dict[str, Any] | None:
    """A file system that fills up in the middle, is freed again, and the merge resumed."""
    disk = given.folder / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        return None
    size = 200 << 20
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    try:
        path = given.folder / "full.yaml"
        path.write_text(json.dumps(config(models, {"anchors": 64, "steps": 60, "epochs": 20})))
        merge = [sys.executable, "-m", "fda_fast", "merge", str(path), "-q", "--device", "cpu"]
        env = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
        process = subprocess.Popen(
            [*merge, str(disk / "out")], stderr=subprocess.PIPE, text=True, env=env
        )
        layers = disk / "out.fda-work" / "layers"
        while process.poll() is None and not list(layers.glob("*.safetensors")):
            time.sleep(0.005)
        filler = open(disk / "filler", "wb", buffering=0)  # noqa: SIM115
        try:
            while True:
                filler.write(b"\0" * (1 << 20))
        except OSError:
            pass
        filler.close()
        _, said = process.communicate()
        kept = len(list(layers.glob("*.safetensors")))
        (disk / "filler").unlink()
        subprocess.run([*merge, str(disk / "out")], check=True, env=env)
        whole = given.folder / "whole"
        subprocess.run([*merge, str(whole)], check=True, env=env)
        files = (p for p in whole.rglob("*") if p.is_file() and p.name != TIMES)
        names = [p.relative_to(whole) for p in files]
        same = all((disk / "out" / n).read_bytes() == (whole / n).read_bytes() for n in names)
        shutil.rmtree(whole)
        return {
            "exit_code": process.returncode,
            "said": said.strip().replace(str(given.folder), "FOLDER"),
            "layers_kept": kept,
            "same_bytes_after_resume": same,
        }
    finally:
        subprocess.run(["umount", disk], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--model", default="llama-1b", choices=CONFIGS)
    parser.add_argument("--max-memory", default="6GiB")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--keep-models", action="store_true")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--child", choices=["merge", "plan"])
    given = parser.parse_args()
    if given.child:
        order = json.loads(sys.stdin.read())
        print(json.dumps((child if given.child == "merge" else plan_child)(order)))
        return
    given.folder = given.folder.resolve()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    whole = CONFIGS[given.model]["num_hidden_layers"]
    rows = []
    for layers in (max(1, whole // 3), whole):
        folder = given.folder / f"{given.model}-{layers}"
        models = [folder / name for name in ("base", "expert-1", "expert-2")]
        if not models[-1].exists():
            make(folder, given.model, layers=layers)
        rows.append(measured(models, given, layers))
        if not given.keep_models:
            shutil.rmtree(folder)
    small = make(given.folder / "small", "llama-tiny", shard_size="200KB")
    result = {
        "model": given.model,
        "settings": SETTINGS,
        "max_memory": given.max_memory,
        "rows": rows,
        "random_kills": kills(small, given) if given.kills else None,
        "full_disk": full_disk(small, given),
    }
    print(json.dumps({k: result[k] for k in ("random_kills", "full_disk")}, indent=1))
    shutil.rmtree(given.folder / "small")
    if not given.no_record:
        print(write_json("merge", result))
    if not given.keep_models:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
