"""SHA-256 of a file whose bytes pass by anyway, on their way from or to the disk.

Why: an average reads gigabytes of inputs that must be hashed too, and its output must be hashed before it
is committed. Done in the same pass each byte is read once, and hashed while it is in a core's cache.

    digest = PassingHash(); digest.add(0, header); digest.add(len(header), numbers); digest.of(size)
"""

import hashlib


class PassingHash:
    """The hash of a file as far as its bytes came in their order; those that come out of it are left out."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._position = 0

    def add(self, position: int, data: bytes | memoryview) -> None:
        """Take the bytes that lie at `position` of the file."""
        if position == self._position:
            self._sha256.update(data)
            self._position += len(data)

    def of(self, size: int) -> str | None:
        """The hex digest, if all `size` bytes of the file have come."""
        return self._sha256.hexdigest() if self._position == size else None
