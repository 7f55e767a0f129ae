"""Where runs are written down: a directory of this user on this machine, open to nobody else.

    $XDG_STATE_HOME/dist-infer/HOST/NAME/     without it ~/.local/state
        lock            held (flock) by the process that runs under this name, for as long as it lives
        run.json        what is known of it, written by that process alone
        *.log           what a detached run printed; what its ranks wrote, once it has failed

The host is part of the path because home directories are often shared and processes are not.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from partition.errors import ConfigError

_PRIVATE = 0o700


def state_directory() -> Path:
    """Of this machine; made, with mode 0700, when it is not there. ConfigError when it cannot be."""
    found = os.environ.get("XDG_STATE_HOME", "")
    with writing_down():
        base = Path(found) if os.path.isabs(found) else Path.home() / ".local" / "state"
        base.mkdir(parents=True, exist_ok=True)
        return private_directory(private_directory(base / "dist-infer") / _host())


@contextlib.contextmanager
def writing_down() -> Iterator[None]:
    """Around what is done in these directories: ConfigError when it cannot be."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        raise ConfigError(
            f"no place to write down what runs here: {error}. Set XDG_STATE_HOME to a directory that can be written"
        ) from error


def run_directory(name: str) -> Path:
    """Of the run of that name, whether it is there or not. name: as a run file's `name` may be."""
    if not name or name.startswith(".") or "/" in name:
        raise ConfigError(f"{name!r} is no name of a run: `dist-infer status` shows those that there are")
    return state_directory() / name


def private_directory(path: Path) -> Path:
    """This path as a directory that only this user can enter. PermissionError when it is somebody else's."""
    path.mkdir(mode=_PRIVATE, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user")
    if status.st_mode & 0o077:
        path.chmod(_PRIVATE)
    return path


def _host() -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in socket.gethostname()) or "localhost"
