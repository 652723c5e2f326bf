"""Run `llmtrain` as on a file system that rejects some calls; none can be mounted in tests.

python limited_file_system.py flock,fsync,chmod,fallocate prepare text --out data
"""

import errno
import fcntl
import os
import stat
import sys
from typing import Any

_fsync = os.fsync


def _flock(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def _fsync_of_files(descriptor: int) -> None:
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    _fsync(descriptor)


def _chmod(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def _fallocate(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


_CALLS: dict[str, tuple[Any, str, Any]] = {
    "flock": (fcntl, "flock", _flock),
    "fsync": (os, "fsync", _fsync_of_files),
    "chmod": (os, "chmod", _chmod),
    "fallocate": (os, "posix_fallocate", _fallocate),
}

if __name__ == "__main__":
    for name in sys.argv.pop(1).split(","):
        setattr(*_CALLS[name])
    from llmtrain.cli.main import main

    main()
