"""Open a file, decompressed where its name says that it is compressed, and wherever its bytes make sense."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Literal

from selfalign.core.errors import StorageError
from selfalign.data.rows import Unusable, spelt

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from pyarrow import CompressedInputStream

Codec = Literal["gzip", "zstd"]
CODECS: dict[str, Codec] = {".gz": "gzip", ".zst": "zstd"}

_PIECE = 1 << 16
# A byte of gzip can stand for a thousand, and what comes before damage is unpacked from here byte by byte.
_FEED = 1 << 14


@dataclass(slots=True)
class Opened:
    """The bytes of a file, from its beginning on."""

    stream: io.BufferedReader
    _hashed: "_Hashed | None"
    _unpacked: "_Unpacked | None"

    @property
    def torn(self) -> Unusable | None:
        """Why an archive's bytes end where they do, once they have ended, where it holds more."""
        return self._unpacked.torn if self._unpacked else None

    def go_to(self, offset: int) -> None:
        """Pass over what comes before `offset`.

        There is no way into the middle of an archive but through it, and what is digested has to be read.
        """
        if self.stream.seekable():
            self.stream.seek(offset)
            return
        while offset and (piece := self.stream.read(min(offset, _PIECE))):
            offset -= len(piece)

    def sha256(self) -> str:
        """Of the file as it is stored, whatever has been read of it."""
        assert self._hashed is not None
        while self._hashed.read(_PIECE):
            pass
        return self._hashed.digest.hexdigest()


def codec_of(path: PurePath) -> Codec | None:
    """How a file is compressed, by the end of its name."""
    return CODECS.get(path.suffix.lower())


@contextmanager
def opened(path: Path, *, hashed: bool = False) -> Iterator[Opened]:
    """The file; `hashed` where its SHA-256 will be asked for. Raises StorageError where it cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            digested = _Hashed(file) if hashed else None
            raw: io.RawIOBase = digested or file
            unpacked = _Unpacked(path, raw, kind) if (kind := codec_of(path)) else None
            yield Opened(io.BufferedReader(unpacked or raw, _PIECE), digested, unpacked)
    except OSError as error:
        raise StorageError(f"{spelt(str(path))} cannot be read: {error.strerror or error}") from error


class _Hashed(io.RawIOBase):
    """Digests what is read."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer)
        n = self._file.readinto(view) or 0
        self.digest.update(view[:n])
        return n


class _Feed(io.RawIOBase):
    """Hands out a file in pieces, from `careful_from` on byte by byte, and knows how far it is."""

    def __init__(self, file: io.RawIOBase, careful_from: int | None = None) -> None:
        self._file = file
        self._careful_from = careful_from
        self.position = self.last = 0
        self.ended = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        careful = self._careful_from is not None and self.position >= self._careful_from
        piece = self._file.read(1 if careful else min(size, _FEED)) or b""
        self.position, self.last, self.ended = self.position + len(piece), self.position, not piece
        return piece


class _Unpacked(io.RawIOBase):
    """What an archive holds, up to where it ends early or makes no sense; `torn` is then why.

    Every reading asks for the same pieces from the beginning on, so that all end at the same byte.
    """

    def __init__(self, path: Path, file: io.RawIOBase, codec: Codec) -> None:
        self._path = path
        self._codec = codec
        self._feed = _Feed(file)
        self._stream = _decompressor(self._feed, codec)
        self._piece = memoryview(b"")
        self._unpacked = 0
        self.torn: Unusable | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer)
        if not self._piece and not self.torn:
            self._piece = memoryview(self._next())
        given, self._piece = self._piece[: len(view)], self._piece[len(view) :]
        view[: len(given)] = given
        return len(given)

    def _next(self) -> bytes:
        try:
            piece: bytes = self._stream.read(_PIECE)
        except OSError as error:
            self.torn = self._why(error)
            return self._remainder()
        self._unpacked += len(piece)
        return piece

    def _why(self, error: OSError) -> Unusable:
        if error.errno is not None:
            # Not the archive's fault: the file could not be read.
            raise error
        if self._feed.ended:
            return Unusable("archive_ends_early", f"the {self._codec} archive is cut off here; fetch it again")
        return Unusable(
            "unreadable_archive", f"the {self._codec} archive is damaged here or before ({error}); fetch it again"
        )

    def _remainder(self) -> bytes:
        """What a reading that failed would have given up to where it failed: byte by byte, from before it on."""
        with self._path.open("rb", buffering=0) as file:
            stream = _decompressor(_Feed(file, careful_from=self._feed.last), self._codec)
            left, found = self._unpacked, bytearray()
            try:
                while left and (piece := stream.read(min(_PIECE, left))):
                    left -= len(piece)
                while byte := stream.read(1):
                    found += byte
            except OSError as error:
                if error.errno is not None:
                    raise
            return bytes(found)


def _decompressor(feed: _Feed, codec: Codec) -> "CompressedInputStream":
    import pyarrow as pa

    return pa.CompressedInputStream(feed, codec)
