"""A PostgreSQL of the test's own: made in a temporary folder, run as a user without rights, gone afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NoServerError(Exception):
    """Why none can be started here."""


def _program(name: str) -> str:
    """A program of the server; Debian keeps them away from the path."""
    found = shutil.which(name) or next(
        (str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)), None
    )
    if found is None:
        raise NoServerError(f"no {name}; install it, such as with: apt-get install postgresql")
    return found


def _user() -> str | None:
    """Whom to run it as: it refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise NoServerError("this is root, and there is no other user to run it as")


@contextmanager
def running() -> Iterator[str]:
    """Start a server. Yields its URL without a database, such as `postgresql://tester@127.0.0.1:50000`.

    Raises:
        NoServerError: none can be started here.
    """
    initdb, control, user = _program("initdb"), _program("pg_ctl"), _user()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="overture-pg-") as folder:
        if user is not None:
            shutil.chown(folder, user)

        def run(*words: str) -> None:
            done = subprocess.run(words, user=user, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            if done.returncode:
                raise NoServerError(f"{words[0]}: {done.stderr.decode(errors='replace').strip()[-300:]}")

        data = f"{folder}/data"
        run(initdb, "--auth=trust", "--username=tester", "--encoding=UTF8", "--no-sync", "--pgdata", data)
        options = f"-p {port} -h 127.0.0.1 -k {folder} -c fsync=off -c max_connections=60"
        run(control, "start", "--wait", "--pgdata", data, "--log", f"{folder}/log", "--options", options)
        try:
            yield f"postgresql://tester@127.0.0.1:{port}"
        finally:
            run(control, "stop", "--wait", "--mode=immediate", "--pgdata", data)
