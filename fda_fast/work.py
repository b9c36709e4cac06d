"""The work directory of a merge: what is finished, whose it is, and how it survives a kill.

Beside the output, as ``<output>.fda-work``:

    job.json                            what it belongs to (see ``WorkDirectory.open``)
    lock                                held while a process works here; its number
    anchors/<task>/<layer>.safetensors  finished anchors
    layers/<layer>.safetensors          finished merged layer; <layer>.json its losses
    output/                             the model being written

Every file appears complete or not at all, so a file that is there is finished.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import safe_open
from torch import Tensor

from fda_fast.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no flock; there the directory is not guarded
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".fda-work"
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class WorkDirectory:
    """A merge's unfinished work, kept beside its output.

    Args:
        output: the merge's output directory.
    """

    def __init__(self, output: Path) -> None:
        output = Path(os.path.abspath(output))
        self.path = output.parent / (output.name + SUFFIX)
        self.batch = 1
        self._lock: int | None = None
        self._created = False

    def open(self, identity: Mapping[str, Any], *, batch: int = 1, restart: bool = False) -> None:
        """Lock the directory for this job; create it, or find the job's own earlier work.

        Args:
            identity: everything that decides the result, as nested dicts of JSON values.
            batch: tasks to optimise together. Depends on the memory that is free and may change
                last bits, so a job keeps the number that it began with.
            restart: throw away whatever work is there.

        Raises:
            InputError: another process works here, or the work there is of another job; says
                what differs.
        """
        try:
            self.path.mkdir(parents=True)
            self._created = True
        except FileExistsError:
            if not self.path.is_dir() or self.path.is_symlink():
                raise InputError(
                    str(self.path), expected="a work directory", got="a file"
                ) from None
        self._acquire()
        try:
            job = self.path / "job.json"
            for unfinished in self.path.rglob(".*.tmp"):
                unfinished.unlink()
            if restart:
                self._clear()
            if job.exists():
                self.batch = self._compare(job, identity)
            elif any(entry.name != "lock" for entry in self.path.iterdir()):
                raise InputError(
                    f"{self.path} has files but no job.json",
                    fix="It is not a work directory of fda_fast, or a damaged one: remove it.",
                )
            else:
                content = {"identity": identity, "batch": batch}
                text = json.dumps(content, indent=1, sort_keys=True)
                write_atomically(job, text.encode())
                self.batch = batch
            for folder in ("anchors", "layers"):
                (self.path / folder).mkdir(exist_ok=True)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the lock; what is finished stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Delete the directory: the merge is written."""
        shutil.rmtree(self.path)
        self.close()

    def remove_if_fresh(self) -> None:
        """Delete the directory if this run made it and finished nothing in it."""
        if self._lock is None or not self._created:
            return
        if not any(self.path.glob("layers/*")) and not any(self.path.glob("anchors/*/*")):
            self.remove()

    def __enter__(self) -> WorkDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, InputError):
            self.remove_if_fresh()
        self.close()

    def anchors_path(self, task: str, layer: str) -> Path:
        """File of the anchors of one (layer, task); its folder exists afterwards."""
        folder = self.path / "anchors" / file_name(task)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{file_name(layer)}.safetensors"

    def layer_path(self, layer: str) -> Path:
        """File of a finished merged layer."""
        return self.path / "layers" / f"{file_name(layer)}.safetensors"

    def is_finished(self, layer: str) -> bool:
        """Whether the merged layer is there."""
        return self.layer_path(layer).exists()

    def save_layer(
        self, layer: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
    ) -> None:
        """Store a merged layer and what is reported about it; the tensors' file goes last.

        Args:
            layer: its name.
            tensors: by their names in the checkpoint.
            record: losses and cosines; JSON values.
        """
        path = self.layer_path(layer)
        write_atomically(path.with_suffix(".json"), json.dumps(record, sort_keys=True).encode())
        write_tensors(path, tensors)

    def load_record(self, layer: str) -> dict[str, Any]:
        """What ``save_layer`` was told beside the tensors."""
        path = self.layer_path(layer).with_suffix(".json")
        record: dict[str, Any] = json.loads(path.read_text())
        return record

    def load_tensor(self, layer: str, name: str, epoch: int | None = None) -> Tensor:
        """One tensor of a finished layer, or as it was after ``epoch`` if that was kept."""
        with safe_open(self.layer_path(layer), framework="pt") as file:
            snapshot = snapshot_key(name, epoch) if epoch is not None else ""
            return file.get_tensor(snapshot if snapshot in set(file.keys()) else name)

    def _acquire(self) -> None:
        while True:
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if fcntl is not None:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(handle, 20, 0).decode(errors="replace").strip()
                os.close(handle)
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise  # a file system without locks says so itself
                raise InputError(
                    f"{self.path} is in use by another process{f' ({holder})' if holder else ''}",
                    fix="Wait for it, or choose another output directory.",
                ) from None
            try:
                # The holder before us may have removed the directory while we opened the file.
                same = os.fstat(handle).st_ino == os.stat(self.path / "lock").st_ino
            except FileNotFoundError:
                same = False
            if same:
                self._lock = handle
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
                return
            os.close(handle)
            self.path.mkdir(parents=True, exist_ok=True)

    def _clear(self) -> None:
        if not (self.path / "job.json").exists() and not self._created:
            return  # not ours: open() refuses it
        for entry in self.path.iterdir():
            if entry.name == "lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _compare(self, job: Path, identity: Mapping[str, Any]) -> int:
        """The batch of the work that is there; refuses that of another job."""
        try:
            content = json.loads(job.read_text())
            before, batch = content["identity"], int(content["batch"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{job} is damaged", fix="Use --restart to begin anew.") from None
        now = json.loads(json.dumps(identity))
        differences = list(_differences(before, now))
        if differences:
            shown = "; ".join(differences[:6])
            more = f"; and {len(differences) - 6} more" if len(differences) > 6 else ""
            raise InputError(
                f"{self.path} holds the work of another merge ({shown}{more})",
                fix="Use --restart to throw it away, or choose another output directory.",
            )
        return batch


def snapshot_key(name: str, epoch: int) -> str:
    """Name in a finished layer's file of a tensor as it was after ``epoch``."""
    return f"{name}@{epoch}"


def file_name(name: str) -> str:
    """``name`` with everything that a file name should not hold replaced."""
    safe = "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name).lstrip(".")
    return safe or "_"


def _differences(before: Any, now: Any, at: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            where = f"{at}.{key}" if at else key
            yield from _differences(before.get(key), now.get(key), where)
    elif before != now:
        yield f"{at}: was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def write_atomically(path: Path, *chunks: bytes | memoryview) -> None:
    """Write a file that appears complete or not at all, even after a power cut.

    Raises:
        OSError: as the operating system says; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write float32 tensors as safetensors, atomically and always in the same bytes.

    Written here rather than by the safetensors package because that hides the error number of a
    full disk and needs the whole file in memory or a second pass to be atomic.

    Args:
        path: the file.
        tensors: float32, any shape, any device.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        size = 4 * math.prod(tensor.shape)
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    chunks = (
        tensor.detach().float().cpu().contiguous().reshape(-1).numpy().view("u1").data
        for tensor in tensors.values()
    )
    write_atomically(path, len(head).to_bytes(8, "little"), head, *chunks)


@contextmanager
def explained(work: WorkDirectory) -> Iterator[None]:
    """Say what a full disk means for the merge: nothing finished is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno or 0)}: finished work is kept in {work.path}; make room "
            "and run the same merge again to go on from there",
            error.filename or str(work.path),
        ) from error
