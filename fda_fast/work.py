"""The work directory of a merge: what is finished, whose it is, and how it survives a kill.

Beside the output, as ``<output>.fda-work``:

    job.json                            what it belongs to (see ``WorkDirectory.open``)
    lock                                held while a process works here; its number
    lock-2-of-8                         the same of one shard; then ``lock`` is held in common
    anchors/<task>/<layer>.safetensors  finished anchors
    layers/<layer>.safetensors          finished merged layer; <layer>.json its losses,
                                        <layer>.times.json how long it took
    output/                             the model being written

Every file appears complete or not at all, so a file that is there is finished.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
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


class WorkDirectory:
    """A merge's unfinished work, kept beside its output.

    Args:
        output: the merge's output directory.
    """

    def __init__(self, output: Path) -> None:
        output = Path(os.path.abspath(output))
        self.path = output.parent / (output.name + SUFFIX)
        self.batch = 1
        self.part: int | None = None
        self._locks: list[int] = []
        self._created = False

    def open(
        self,
        identity: Mapping[str, Any],
        *,
        batch: int = 1,
        part: int | None = None,
        restart: bool = False,
        shard: str | None = None,
    ) -> None:
        """Lock the directory for this job; create it, or find the job's own earlier work.

        Args:
            identity: everything that decides the result, as nested dicts of JSON values.
            batch: tasks to optimise together. Depends on the memory that is free and may change
                last bits on a GPU, so a job keeps the number that it began with.
            part: anchors of a task that a step holds at once, None for all; likewise.
            restart: throw away whatever work is there.
            shard: "2/8" if other processes work on other parts meanwhile.

        Raises:
            InputError: another process works here (on the same shard), or the work there is of
                another job; says what differs.
        """
        try:
            self.path.mkdir(parents=True)
            self._created = shard is None
        except FileExistsError:
            if not self.path.is_dir() or self.path.is_symlink():
                raise InputError(
                    str(self.path), expected="a work directory", got="a file"
                ) from None
        if shard is not None and restart:
            raise InputError("restart cannot be combined with shard", fix=f"Remove {self.path}.")
        self._acquire("lock", shared=shard is not None)
        try:
            if shard is not None:
                self._acquire(f"lock-{shard.replace('/', '-of-')}")
            else:
                for unfinished in self.path.rglob(".*.tmp"):
                    unfinished.unlink()
            if restart:
                self._clear()
            self._join(identity, batch, part)
            for folder in ("anchors", "layers"):
                (self.path / folder).mkdir(exist_ok=True)
        except BaseException:
            self.close()
            raise

    def _join(self, identity: Mapping[str, Any], batch: int, part: int | None) -> None:
        """Make this the directory of the job, unless it is already, or is another's."""
        job = self.path / "job.json"
        if not job.exists():
            if any(not _is_ours(entry.name) for entry in self.path.iterdir()) and not job.exists():
                raise InputError(
                    f"{self.path} has files but no job.json",
                    fix="It is not a work directory of fda_fast, or a damaged one: remove it.",
                )
            content = {"identity": identity, "batch": batch, "part": part}
            text = json.dumps(content, indent=1, sort_keys=True)
            # Several shards may begin at once: the first one decides batch and part.
            write_atomically(job, text.encode(), replace=False)
        self.batch, self.part = self._compare(job, identity)

    def discard(self) -> None:
        """Throw away whatever work is there.

        Raises:
            InputError: another process works here.
        """
        if self.path.is_dir():
            self._acquire("lock")
            self._clear()
            self.close()

    def close(self) -> None:
        """Release the lock; what is finished stays."""
        while self._locks:
            os.close(self._locks.pop())

    def remove(self) -> None:
        """Delete the directory: the merge is written."""
        shutil.rmtree(self.path)
        self.close()

    def remove_if_fresh(self) -> None:
        """Delete the directory if this run made it and finished nothing in it."""
        if not self._locks or not self._created:
            return
        if not self.has_finished():
            self.remove()

    @property
    def is_open(self) -> bool:
        """Whether the directory is this object's to work in."""
        return bool(self._locks)

    def has_finished(self) -> bool:
        """Whether anything is there that another run need not do again."""
        finished = ("layers/*.safetensors", "anchors/*/*.safetensors", "scale.json")
        return any(any(self.path.glob(pattern)) for pattern in finished)

    def __enter__(self) -> WorkDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, InputError | KeyboardInterrupt):
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

    def save_times(self, layer: str, seconds: Mapping[str, float]) -> None:
        """Note how long a layer took, in seconds by phase."""
        path = self.layer_path(layer).with_suffix(".times.json")
        write_atomically(path, json.dumps(dict(seconds)).encode())

    def load_times(self, layer: str) -> dict[str, float]:
        """What ``save_times`` was told, in whichever run; nothing if it never was."""
        path = self.layer_path(layer).with_suffix(".times.json")
        seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        return seconds

    def load_tensor(self, layer: str, name: str, epoch: int | None = None) -> Tensor:
        """One tensor of a finished layer, or as it was after ``epoch`` if that was kept."""
        with safe_open(self.layer_path(layer), framework="pt") as file:
            snapshot = snapshot_key(name, epoch) if epoch is not None else ""
            return file.get_tensor(snapshot if snapshot in set(file.keys()) else name)

    def _acquire(self, name: str, *, shared: bool = False) -> None:
        while True:
            handle = os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if fcntl is not None:
                    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                    fcntl.flock(handle, how | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(handle, 20, 0).decode(errors="replace").strip()
                os.close(handle)
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise  # a file system without locks says so itself
                part = f", as part {name[5:]}," if name != "lock" else ""
                raise InputError(
                    f"{self.path} is in use{part} by another process"
                    f"{f' ({holder})' if holder else ''}",
                    fix="Wait for it, or choose another output directory.",
                ) from None
            try:
                # The holder before us may have removed the directory while we opened the file.
                same = os.fstat(handle).st_ino == os.stat(self.path / name).st_ino
            except FileNotFoundError:
                same = False
            if same:
                self._locks.append(handle)
                if not shared:
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
                return
            os.close(handle)
            self.path.mkdir(parents=True, exist_ok=True)

    def _clear(self) -> None:
        if not (self.path / "job.json").exists() and not self._created:
            return  # not ours: open() refuses it
        for entry in self.path.iterdir():
            if entry.name == "lock":  # held
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _compare(self, job: Path, identity: Mapping[str, Any]) -> tuple[int, int | None]:
        """Batch and part of the work that is there; refuses that of another job."""
        try:
            content = json.loads(job.read_text())
            before, batch = content["identity"], int(content["batch"])
            part = None if content.get("part") is None else int(content["part"])
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
        return batch, part


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


def _is_ours(name: str) -> bool:
    """Whether a name in a directory without job.json is of processes that only just begin."""
    return name == "job.json" or name.startswith(("lock", ".job.json."))


def write_atomically(path: Path, *chunks: bytes | memoryview, replace: bool = True) -> None:
    """Write a file that appears complete or not at all, even after a power cut.

    Args:
        path: the file.
        chunks: its content.
        replace: False leaves a file that is there meanwhile as it is.

    Raises:
        OSError: as the operating system says; the temporary file is removed.
    """
    # Two processes may write the same file at once: the same bytes, each under its own name.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                if not path.exists():
                    os.replace(temporary, path)
            temporary.unlink(missing_ok=True)
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
