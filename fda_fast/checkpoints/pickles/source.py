"""Bytes of a file read forward, with every declared length held against what is left of it."""

from __future__ import annotations

from fda_fast.checkpoints.pickles.values import Malformed
from fda_fast.checkpoints.tensorfile import TensorFile

_CHUNK = 1 << 18


class Budget:
    """What one file may cost to interpret, whatever it holds.

    A pickle can refer to one large thing over and over in a few bytes, so the size of the file
    bounds neither time nor memory: these counts do.
    """

    operations = 2_000_000
    """Opcodes and elements copied: 70B models need some 100,000; a second or two."""
    text = 256_000_000
    """Bytes of names, texts and short byte strings held in memory."""

    def __init__(self) -> None:
        self._operations, self._text = self.operations, self.text

    def spend(self, operations: int = 1, text: int = 0) -> None:
        """Count; raises Malformed when it was too much."""
        self._operations -= operations
        self._text -= text
        if self._operations < 0 or self._text < 0:
            raise Malformed("a pickle too large to be a checkpoint's")


class Source:
    """The bytes [begin, end) of a file.

    Attributes:
        file: the file.
        position: of the next byte, in the file.
        end: position behind the last byte.
    """

    def __init__(self, file: TensorFile, begin: int, end: int) -> None:
        self.file, self.position, self.end = file, begin, end
        self._buffer, self._start = b"", begin

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes; Malformed if there are not as many."""
        self.check(count)
        at = self.position - self._start
        if at < 0 or at + count > len(self._buffer):
            size = min(max(count, _CHUNK), self.end - self.position)
            self._buffer, self._start = self.file.read_bytes(self.position, size), self.position
            at = 0
        found = self._buffer[at : at + count]
        if len(found) != count:
            raise Malformed("it ends too early")
        self.position += count
        return found

    def skip(self, count: int) -> int:
        """Pass ``count`` bytes without reading them; the position of the first."""
        self.check(count)
        position = self.position
        self.position += count
        return position

    def line(self, limit: int) -> bytes:
        """The bytes up to the next line feed, which is passed; Malformed beyond ``limit``."""
        count = min(limit + 1, self.end - self.position)
        at = self.position - self._start
        if at < 0 or at + count > len(self._buffer):
            self.take(count)
            self.position -= count
            at = self.position - self._start
        end = self._buffer.find(b"\n", at, at + count)
        if end < 0:
            raise Malformed(f"a line of more than {limit} bytes")
        self.position += end + 1 - at
        return self._buffer[at:end]

    def check(self, count: int) -> None:
        """Malformed if fewer than ``count`` bytes are left."""
        if not 0 <= count <= self.end - self.position:
            raise Malformed(f"a length of {count} bytes where {self.end - self.position} are left")
