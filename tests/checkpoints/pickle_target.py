"""Opens files in a process of its own that would tell if anything in them ran.

Usage: pickle_target.py open FILE...             one JSON line per file
       pickle_target.py mutate SEED COUNT FILE...  COUNT mutations of each file; one JSON line

Watches: audit events of running, importing, writing and connecting; modules that appear;
the canary (a file, in the current directory); the time of every file; the peak of memory.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.models.auto.configuration_auto  # noqa: F401

from fda_fast.checkpoints.layout import ModelLayout
from fda_fast.checkpoints.pickles import read_npy
from fda_fast.checkpoints.reader import Checkpoint
from fda_fast.errors import InputError

CANARY = Path("canary")
# Address space beyond what the libraries take: a file that makes more than this fails the test.
MEMORY = 3 << 30
WATCHED = (
    *("exec", "compile", "import", "os.", "subprocess.", "socket.", "ctypes.", "shutil."),
    *("pickle.", "marshal.", "code.", "tempfile.", "pty.", "webbrowser.", "urllib."),
)
OPCODES = b"().0125BCFGIJKLMNPQRSTUVX]abcdeghijlopqrstu}\x80\x81\x82\x85\x88\x8c\x8f\x93\x94\xff"
HARMLESS = ("os.listdir", "os.scandir")
events: list[str] = []
watching = False


def audit(event: str, args: tuple[Any, ...]) -> None:
    if not watching:
        return
    if event == "open":
        mode = args[1]
        if isinstance(mode, str) and set(mode) & set("wax+"):
            events.append(f"{event} {args[0]} {mode}")
    elif event.startswith(WATCHED) and event not in HARMLESS:
        events.append(f"{event} {args!r:.200}")


def use(path: Path) -> str:
    """Everything the library does with a file before and while reading it."""
    if path.suffix == ".npy":
        value = read_npy(path)
        return type(value).__name__
    checkpoint = Checkpoint.open(path, "expert x")
    names = list(checkpoint.names)
    # What is shared may be read thousands of times over; a merge reads each name once, by layer.
    checkpoint.read(names[:50])
    if checkpoint.modules and checkpoint.config is None:
        try:
            ModelLayout.from_checkpoint(checkpoint)
        except InputError as error:
            assert str(error).isprintable(), repr(str(error))
    return f"{len(names)} tensors"


def watch(path: Path) -> dict[str, Any]:
    """What using the file came to."""
    global watching
    events.clear()
    before = set(sys.modules)
    begun = time.monotonic()
    watching = True
    try:
        outcome, message = "used", use(path)
    except InputError as error:
        outcome, message = "refused", str(error)
        if not message.isprintable() or len(message) > 3000:
            outcome = "unprintable"
    except BaseException as error:
        outcome, message = "failed", f"{type(error).__name__}: {error}"[:300]
    finally:
        watching = False
    return {
        "file": path.name,
        "outcome": outcome,
        "message": message[:3000],
        "seconds": time.monotonic() - begun,
        "events": list(events),
        "modules": sorted(set(sys.modules) - before),
        "canary": CANARY.exists(),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }


def mutate(content: bytes, chance: random.Random) -> bytes:
    """One to four edits: bits flipped, bytes cut out, doubled, inserted or cut off."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(max(1, len(data)))
        kind = chance.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and data:
            data[at] = chance.choice(
                b"().0125BCFGIJKLMNQRSTUVX]abcdeghijlopqrstu}\x80\x81\x85\x93\xff"
            )
        elif kind == 2:
            del data[at : at + chance.randint(1, 16)]
        elif kind == 3:
            data[at:at] = data[at : at + chance.randint(1, 16)]
        elif kind == 4:
            data[at:at] = chance.randbytes(chance.randint(1, 8))
        else:
            del data[chance.randrange(len(data) // 2, len(data) + 1) :]
    return bytes(data)


def mutate_inside(content: bytes, chance: random.Random) -> bytes:
    """A zip whose pickle is mutated and whose directory is intact; None-zips as a whole."""
    if not content.startswith(b"PK"):
        return mutate(content, chance)
    target = BytesIO()
    with zipfile.ZipFile(BytesIO(content)) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            inner = old.read(item)
            if item.filename.endswith("data.pkl"):
                inner = mutate(inner, chance)
            new.writestr(item.filename, inner)
    return target.getvalue()


def mutations(seed: int, count: int, paths: list[Path]) -> dict[str, Any]:
    """Totals over mutations of the files, and every result that is not as it should be."""
    for path in paths:
        watch(path)  # what the library loads of its own for an honest file of this kind
    outcomes = {"used": 0, "refused": 0}
    wrong, slowest = [], 0.0
    for path in paths:
        chance = random.Random(f"{seed} {path.name}")
        content = path.read_bytes()
        for index in range(count):
            change = mutate if index % 2 else mutate_inside
            target = Path(f"mutated{path.suffix}")
            target.write_bytes(change(content, chance))
            result = watch(target)
            slowest = max(slowest, result["seconds"])
            unwanted = result["events"] or result["modules"] or result["canary"]
            if unwanted or result["outcome"] not in outcomes:
                wrong.append({**result, "file": f"{path.name} {index}"})
            else:
                outcomes[result["outcome"]] += 1
    return {**outcomes, "wrong": wrong[:5], "slowest": slowest, "peak": result["peak"]}


def main() -> None:
    torch.set_num_threads(1)
    sys.addaudithook(audit)
    kind, *arguments = sys.argv[1:]
    paths = [Path(a) for a in (arguments if kind == "open" else arguments[2:])]
    # What the library loads at its first use is loaded by an honest file.
    torch.save(torch.nn.Linear(2, 2), "warm.pt")
    np.save("warm.npy", {"a": np.ones(2)})
    for warm in ("warm.pt", "warm.npy"):
        watch(Path(warm))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    if kind == "open":
        for path in paths:
            print(json.dumps(watch(path)), flush=True)
    else:
        print(json.dumps(mutations(int(arguments[0]), int(arguments[1]), paths)))


if __name__ == "__main__":
    main()
