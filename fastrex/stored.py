"""Zip archives whose entries are stored as they are (what ``torch.save`` and ``numpy.savez`` write), checked before
anything is allocated: such an archive cannot hold more than its own size.

Standard library only. What is refused is a ``ValueError``; a damaged archive makes ``zipfile`` raise nearly anything.
"""

from __future__ import annotations

import zipfile
from typing import IO

MAX_DIRECTORY = 8 * 2**20
MAX_ENTRIES = 100_000
END, END64, LOCATOR = 22, 56, 20  # bytes of the records behind the directory


class StoredZip:
    """The archive in ``file`` of ``size`` bytes; ``entries`` by exact name."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        # zipfile makes an object of every entry before it lets anyone count them.
        directory = _directory_size(file, size)
        if directory > MAX_DIRECTORY:
            raise ValueError(f"its directory takes {directory} bytes, more than {MAX_DIRECTORY}")
        self._archive = zipfile.ZipFile(file)
        found = self._archive.infolist()
        if len(found) > MAX_ENTRIES:
            raise ValueError(f"it has {len(found)} entries, more than {MAX_ENTRIES}")
        self.entries = {entry.filename: entry for entry in found}
        if len(self.entries) != len(found):
            raise ValueError("two of its entries have the same name")
        for entry in found:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise ValueError("it has compressed or encrypted entries, which its writer does not make")
            if entry.compress_size != entry.file_size:
                raise ValueError(f"its entry {entry.filename[:80]!r} has two sizes")
        if sum(entry.file_size for entry in found) > size:
            raise ValueError("its entries claim more bytes than the file has")

    def read(self, name: str) -> bytes:
        """All bytes of an entry that is there, verified by its checksum."""
        return self._archive.read(self.entries[name])


def _directory_size(file: IO[bytes], size: int) -> int:
    """What the record at the very end says; neither writer puts a comment behind it."""
    file.seek(max(0, size - END - LOCATOR - END64))
    tail = file.read(END + LOCATOR + END64)
    end = tail[-END:]
    if len(end) < END or not end.startswith(b"PK\x05\x06") or end[-2:] != b"\0\0":
        raise zipfile.BadZipFile("it does not end as a zip file does")
    if not tail[-END - LOCATOR :].startswith(b"PK\x06\x07"):
        return int.from_bytes(end[12:16], "little")
    record, locator = tail[:END64], tail[END64 : END64 + LOCATOR]
    # Where the locator points elsewhere, readers disagree about which record counts.
    place = size - END - LOCATOR - END64
    if not record.startswith(b"PK\x06\x06") or int.from_bytes(locator[8:16], "little") != place:
        raise zipfile.BadZipFile("it does not end as a zip file does")
    return int.from_bytes(record[40:48], "little")
