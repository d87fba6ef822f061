"""TensorBoard's event files, scalars only: so the logs need no further package."""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path


class EventFile:
    """Writes scalars that ``tensorboard --logdir FOLDER`` shows.

    A file is a row of records (TFRecord), each a length, a checksum of it, an ``Event`` in protobuf, and a checksum.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = (folder / name).open("ab")
        self._write(_text(3, b"brain.Event:2"), step=0)

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """Write the scalars of a step."""
        values = b"".join(_text(1, _text(1, tag.encode()) + _float(2, value)) for tag, value in scalars.items())
        self._write(_text(5, values), step)
        self._file.flush()

    def close(self) -> None:
        """End the file."""
        self._file.close()

    def _write(self, what: bytes, step: int) -> None:
        event = _key(1, 1) + struct.pack("<d", time.time()) + _key(2, 0) + _varint(step) + what
        header = struct.pack("<Q", len(event))
        checked = header + struct.pack("<I", _masked_crc(header)) + event + struct.pack("<I", _masked_crc(event))
        self._file.write(checked)


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _varint(number: int) -> bytes:
    pieces = bytearray()
    while number > 0x7F:
        pieces.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*pieces, number])


def _text(field: int, content: bytes) -> bytes:
    return _key(field, 2) + _varint(len(content)) + content


def _float(field: int, value: float) -> bytes:
    return _key(field, 5) + struct.pack("<f", value)


def _crc_table() -> list[int]:
    table = []
    for number in range(256):
        for _ in range(8):
            number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
        table.append(number)
    return table


_TABLE = _crc_table()


def _masked_crc(data: bytes) -> int:
    """Return CRC-32C as TFRecord wants it: rotated, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
