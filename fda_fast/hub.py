"""Models of the Hugging Face Hub: looked up before anything is downloaded, then fetched."""

from __future__ import annotations

import fnmatch
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fda_fast.errors import InputError, with_path

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The first group that a repository has any of holds its weights.
_WEIGHTS = (
    ("model*.safetensors", "adapter_model.safetensors"),
    ("*.safetensors",),
    ("pytorch_model*.bin", "adapter_model.bin"),
)
_BESIDE = ("*.json", "*.jinja", "vocab.txt", "merges.txt", "*.model", "LICENSE*", "NOTICE")
_NESTED = ("1_Pooling/config.json",)
_CONFIGURATION = ("config.json", "adapter_config.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class HubModel:
    """A model on the Hub, looked up.

    Attributes:
        name: "org/name".
        commit: what its revision is at present.
        files: {name: bytes} of the files a merge needs.
    """

    name: str
    commit: str
    files: dict[str, int]


def is_hub_id(reference: str) -> bool:
    """Whether this could be ``org/name[@revision]``."""
    return bool(_HUB_ID.fullmatch(reference.partition("@")[0]))


def cached_snapshot(reference: str) -> Path | None:
    """Folder of ``org/name[@revision]`` in the local cache; no network.

    Found by its configuration: caches hold what somebody needed, seldom whole repositories.
    """
    if not is_hub_id(reference):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name, _, revision = reference.partition("@")
    for file in ("config.json", "adapter_config.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=revision or None)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def look_up(reference: str) -> HubModel | None:
    """What the Hub says of ``org/name[@revision]``; None if it cannot be asked.

    Raises:
        InputError: no such model or revision, or no access to it.

    Cost: one request.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = reference.partition("@")
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        info = HfApi().model_info(
            name, revision=revision or None, files_metadata=True, timeout=20.0
        )
    except GatedRepoError:
        raise InputError(
            f"{name} on the Hub is gated",
            fix="Ask for access on its page, then log in with `hf auth login`.",
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{name} on the Hub has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{name}: no such folder, and no such model on the Hub",
            fix="Check the spelling; a private model needs `hf auth login`.",
        ) from None
    except HfHubHTTPError as error:
        raise InputError(f"{name}: the Hub answers {str(error).splitlines()[0][:200]}") from None
    except HFValidationError as error:
        raise InputError(f"{name} is no name of a model: {error}") from None
    except Exception as error:
        if is_connection_error(error):
            return None
        raise
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
    chosen = choose_files(sizes)
    return HubModel(name, str(info.sha), {file: sizes[file] for file in chosen})


def choose_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files those that a merge reads: weights in one form, config, tokenizer."""
    top = [name for name in names if "/" not in name]
    beside = [n for n in top if any(fnmatch.fnmatchcase(n, p) for p in _BESIDE)]
    return sorted({*weights_of(top), *beside, *(name for name in names if name in _NESTED)})


def weights_of(names: Iterable[str]) -> list[str]:
    """Of a repository's files those that hold its weights, in the form that is read."""
    top = sorted(name for name in names if "/" not in name)
    for patterns in _WEIGHTS:
        weights = [n for n in top if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
        if weights:
            return weights
    return []


def fetch(reference: str, what: str) -> Path | None:
    """The folder of ``org/name[@revision]``: from the cache, or downloaded into it.

    A revision that is a whole commit hash and lies in the cache is taken from there without
    asking; anything else is looked up, and only files that are missing are downloaded. Without a
    connection, or with ``HF_HUB_OFFLINE=1``, the cache alone counts. Caches and tokens are those
    of huggingface_hub (``HF_HOME``, ``HF_HUB_CACHE``, ``HF_TOKEN``, ``HF_ENDPOINT``).

    Args:
        reference: the Hub id.
        what: what refers to it, for errors.

    Returns:
        The folder; None if it is not cached and the Hub cannot be asked.

    Raises:
        InputError: as ``find``.
    """
    from huggingface_hub import snapshot_download

    found = find(reference, what)
    if not isinstance(found, HubModel):
        return found
    # By the name that was given, which the cache then knows without a connection too.
    revision = reference.partition("@")[2] or None
    return Path(snapshot_download(found.name, revision=revision, allow_patterns=list(found.files)))


def find(reference: str, what: str) -> Path | HubModel | None:
    """Where ``org/name[@revision]`` is: whole in the cache, or on the Hub; nothing is downloaded.

    Args:
        reference: the Hub id.
        what: what refers to it, for errors.

    Returns:
        The folder in the cache; or the model on the Hub, if anything of it is missing here; None
        if it is not cached and the Hub cannot be asked.

    Raises:
        InputError: as ``look_up``; a model without weights; a disk too small for it.
    """
    from huggingface_hub import constants

    cached = cached_snapshot(reference)
    whole = cached is not None and _has_weights(cached)
    if whole and _COMMIT.fullmatch(reference.partition("@")[2]):
        return cached
    found = look_up(reference)
    if found is None:
        return cached if whole else None
    if not weights_of(found.files):
        raise InputError(with_path(what, reference), expected="weights on the Hub", got="none")
    there = cached_snapshot(f"{found.name}@{found.commit}")
    missing = missing_bytes(found)
    cache_folder = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(_existing(cache_folder)).free
    if missing > free:
        raise InputError(
            f"{with_path(what, reference)} does not fit the disk of the Hub's cache {cache_folder}",
            expected=f"{missing / 1e9:.2f} GB free",
            got=f"{free / 1e9:.2f} GB",
            fix="Free some, or set HF_HUB_CACHE to another disk.",
        )
    if not missing and there is not None and there == cached:
        return there
    return found


def missing_bytes(model: HubModel) -> int:
    """Bytes of a model's files that are not in the cache."""
    there = cached_snapshot(f"{model.name}@{model.commit}")
    return sum(
        size for name, size in model.files.items() if there is None or not (there / name).exists()
    )


def fetch_configuration(model: HubModel) -> Path:
    """Download config.json, adapter_config.json and the index of shards, and nothing else.

    Returns:
        The folder in the cache.

    Raises:
        InputError: the connection breaks.
    """
    from huggingface_hub import snapshot_download

    with _connected(model.name):
        folder = snapshot_download(
            model.name, revision=model.commit, allow_patterns=list(_CONFIGURATION)
        )
    return Path(folder)


def read_range(model: HubModel, file: str, start: int, count: int) -> bytes:
    """``count`` bytes from ``start`` of a file on the Hub.

    Raises:
        InputError: the Hub refuses, the connection breaks, or other bytes come.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    # Compressed, a range would be of other bytes.
    headers = build_hf_headers() | {
        "Range": f"bytes={start}-{start + count - 1}",
        "Accept-Encoding": "identity",
    }
    url = hf_hub_url(model.name, file, revision=model.commit)
    with _connected(model.name):
        response = get_session().get(url, headers=headers, timeout=20.0)
        hf_raise_for_status(response)
    if response.status_code != 206 or len(response.content) != count:
        raise InputError(
            f"{model.name}: {file} on the Hub",
            expected=f"bytes {start} to {start + count}",
            got=f"{len(response.content)} bytes, status {response.status_code}",
        )
    return bytes(response.content)


@contextmanager
def _connected(name: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise InputError(f"{name}: the Hub answers {str(error).splitlines()[0][:200]}") from None
    except Exception as error:
        if not is_connection_error(error):
            raise
        raise InputError(f"{name}: the connection to the Hub broke", got=str(error)[:200]) from None


def _has_weights(folder: Path) -> bool:
    """Whether a cached folder holds more than a configuration."""
    return bool(weights_of(path.name for path in folder.iterdir()))


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def is_connection_error(error: BaseException) -> bool:
    """Whether there is no way to the Hub, whichever HTTP library this huggingface_hub uses."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, OSError) or "TransportError" in names
