"""Files that a user names: read whole up to a limit, written whole or not at all."""

import os
import stat
import tempfile

from .errors import MacsError

MEGABYTE = 1 << 20


def read(path: str | os.PathLike, what: str, most: int = 64 * MEGABYTE, fix: str = "") -> bytes:
    """The bytes of a regular file of at most `most`. Raises MacsError, about the argument `what`, for anything else:
    a device or a pipe could feed a reader for ever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer does not block
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise MacsError(what, f"{path} (no regular file)", "a regular file", fix)
            raw = file.read(most + 1)
    except OSError as error:
        raise MacsError(what, f"{path} ({error.strerror})", "a readable file", fix) from error
    except ValueError as error:  # a path that no file system takes
        if isinstance(error, MacsError):
            raise
        raise MacsError(what, f"{path!r} ({error})", "a path", fix) from error
    if len(raw) > most:
        raise MacsError(what, f"{path} of {found.st_size / MEGABYTE:.0f} MB", f"at most {most / MEGABYTE:g} MB", fix)
    return raw


def check_writable(path: str, what: str) -> None:
    """Raises MacsError unless `path` names a regular file, or none, in a folder that takes files."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise MacsError(what, repr(path), "a file in a folder that can be written")
    if not path or (os.path.exists(path) and not os.path.isfile(path)):
        raise MacsError(what, f"{path!r} (no regular file)", "a file's name")


def write(path: str, text: str, what: str) -> None:
    """Writes UTF-8 beside `path` and renames: a reader, or a full disk, sees the old file or the new one. Raises
    MacsError about the argument `what`.
    """
    check_writable(path, what)
    path = os.path.realpath(path)  # a link stays one
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=os.path.dirname(path), delete=False) as file:
            temporary = file.name
            file.write(text)
        os.chmod(temporary, 0o666 & ~_umask())  # as open() would have made it; a temporary file is its owner's alone
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            os.unlink(temporary)
        raise MacsError(what, f"{path} ({error.strerror})", "a file that can be written") from error


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
