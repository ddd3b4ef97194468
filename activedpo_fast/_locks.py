"""Locks on folders, so that only one process writes to a feature store or a run at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from activedpo_fast._files import FilePath, reason_of
from activedpo_fast.errors import ActiveDPOError

logger = logging.getLogger(__name__)

LOCK = ".lock"

# Folders locked by this process: the thread that holds each, and the descriptor of its lock file.
_held: dict[Path, tuple[int, int]] = {}
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def locked_folder(path: FilePath) -> Iterator[None]:
    """Make a folder if it is not there, and keep all others from locking it.

    The lock is `flock` on the file `.lock` in it, which the system releases when this process
    ends, however it ends. The file has the process and its host, and is removed at the end, as is
    a folder that was made here and is still empty. The thread that holds a lock may lock the
    folder again. On a file system without locks, a warning is logged.

    Raises:
        ActiveDPOError: another process or thread holds the lock; the message names it.
    """
    folder = Path(path).resolve()
    if _held.get(folder, (0, 0))[0] == threading.get_ident():
        yield
        return
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = _acquire(folder / LOCK, Path(path))
        _held[folder] = threading.get_ident(), descriptor
        try:
            yield
        finally:
            del _held[folder]
            with suppress(OSError):  # the folder may be gone
                (folder / LOCK).unlink()
            os.close(descriptor)
    finally:
        with suppress(OSError):  # not empty
            for parent in made:
                parent.rmdir()


def _acquire(file: Path, folder: Path) -> int:
    """Return a descriptor of the lock file, locked."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise ActiveDPOError(f"{folder} cannot be locked: {file}: {reason_of(error)}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed it since it was opened: then another one counts.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                    os.ftruncate(descriptor, 0)
                    holder = f"process {os.getpid()} on {socket.gethostname()}"
                    with suppress(OSError):  # a full disk; the lock holds without a name, too
                        os.pwrite(descriptor, holder.encode(), 0)
                    return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise ActiveDPOError(
                f"{folder} is being written to by {holder}: wait for it to end, or use another "
                "folder"
            ) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                logger.warning(
                    "%s cannot be locked (%s): see to it that no other process writes to it",
                    folder,
                    reason_of(error),
                )
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def _forget() -> None:
    """Leave the locks to the parent: a child must not keep them alive after its end."""
    for _, descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
