"""The directory of a Ray that is started for one run: its sockets, its logs, the token that its callers need.

Short (the path of a socket has 107 characters), new for each run, and open to its user alone, so that what Ray writes
there with looser modes is closed all the same. The token is in a file that only the user reads; processes know where.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from partition.errors import ClusterError

_LONGEST = 36  # of the directory in which it is made: what Ray adds takes 70
_TOKEN_BYTES = 32
# of the environment, set by `enter`
VARIABLES = ("RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN")


@dataclass(frozen=True)
class RayHome:
    """Owned by the run that made it."""

    path: Path

    @classmethod
    def make(cls) -> RayHome:
        """Raises ClusterError when there is no room for a small file."""
        parent = tempfile.gettempdir()
        try:
            path = Path(tempfile.mkdtemp(prefix="dist-infer-", dir=parent if len(parent) <= _LONGEST else "/tmp"))
            with os.fdopen(os.open(path / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(_TOKEN_BYTES))
        except OSError as error:
            raise ClusterError(f"cannot make a directory for Ray's files: {error}") from error
        return cls(path)

    @property
    def logs(self) -> Path:
        """Where this Ray writes, once it has been started."""
        return self.path / "ray" / "session_latest" / "logs"

    def enter(self) -> None:
        """Let the Ray that this process starts be at home there. Before Ray is imported for the first time."""
        os.environ["RAY_TMPDIR"] = str(self.path)
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(self.path / "token")
        os.environ.pop("RAY_AUTH_TOKEN", None)  # another cluster's is no use here, and would be preferred

    def keep_logs(self, directory: Path) -> None:
        """Copy what the ranks and the replica wrote to `directory`; nothing where they never began."""
        with contextlib.suppress(OSError):
            directory.mkdir(mode=0o700, exist_ok=True)
            for file in self.logs.glob("worker-*"):
                if file.stat().st_size:
                    shutil.copyfile(file, directory / file.name)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
