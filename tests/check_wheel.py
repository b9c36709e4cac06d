"""Compare the names inside the built wheel with the tree: nothing forgotten, nothing extra."""

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(folder: str) -> int:
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    tree = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fda_fast").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    tree |= {f"fda_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    tree.add("fda_fast/py.typed")
    for kind in ("*.yaml", "*.css"):
        tree |= {str(path.relative_to(ROOT)) for path in (ROOT / "fda_fast").rglob(kind)}
    missing = sorted(tree - inside)
    python = {name for name in inside if name.endswith(".py")}
    extra = sorted(python - tree)
    binary = [n for n in inside if n.startswith("fda_fast/_C") and n.endswith((".so", ".pyd"))]
    licence = [name for name in inside if name.endswith("LICENSE")]
    problems = [f"missing: {name}" for name in missing] + [f"extra: {name}" for name in extra]
    if not binary:
        problems.append("missing: the native extension fda_fast/_C")
    if not licence:
        problems.append("missing: LICENSE")
    print("\n".join(problems) or f"{wheel.name}: {len(inside)} files, as the tree")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
