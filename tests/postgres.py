"""Run a command with SAMARA_TEST_POSTGRES naming a PostgreSQL server of its own, then stop it.

    python tests/postgres.py python -m pytest tests/unit/registry

Says SKIPPED and why, with status 0, where no PostgreSQL is installed. A server that is running
already can be used instead: set SAMARA_TEST_POSTGRES and run pytest directly.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START_SECONDS = 60


def programs() -> tuple[str, str] | None:
    """Paths of ``initdb`` and ``postgres``, from PATH or where Debian keeps them."""
    folders = [None, *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    for folder in folders:
        found = [shutil.which(name, path=folder and str(folder)) for name in ("initdb", "postgres")]
        if all(found):
            return found[0], found[1]
    return None


def server_user() -> str | None:
    """Whom to run as: PostgreSQL refuses to run as root. None: as we are."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in known), "")


def skip(reason: str) -> int:
    """Say why nothing was run."""
    sys.stdout.write(f"postgres: SKIPPED, {reason}\n")
    return 0


def main(command: list[str]) -> int:
    """Run the command against a fresh server."""
    found, user = programs(), server_user()
    if found is None:
        return skip("neither on PATH nor in /usr/lib/postgresql is there an initdb with a postgres")
    if user == "":
        return skip("this is root, and there is no user 'postgres' or 'nobody' to run it as")
    initdb, postgres = found
    # A socket's path has 107 bytes at most: TMPDIR may be too deep for it.
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as name:
        folder = Path(name)
        if user:
            shutil.chown(folder, user)
        data = str(folder / "data")
        done = subprocess.run(
            [initdb, "-D", data, "-U", "samara", "-A", "trust", "-E", "UTF8", "--no-sync"],
            user=user,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return skip(f"initdb failed: {done.stderr.strip().splitlines()[-1:]}")
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}"]
        server = subprocess.Popen(
            [postgres, "-D", data, *options],
            user=user,
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            socket, limit = folder / ".s.PGSQL.5432", time.monotonic() + START_SECONDS
            while not socket.exists() and time.monotonic() < limit and server.poll() is None:
                time.sleep(0.05)
            if not socket.exists():
                return skip("the server did not start")
            url = f"postgresql+psycopg://samara@/postgres?host={folder}"
            environment = {**os.environ, "SAMARA_TEST_POSTGRES": url}
            return subprocess.run(command, env=environment, check=False).returncode
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
