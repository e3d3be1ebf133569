"""The `git` binary, in neutral surroundings: no configuration but ours, no hooks, no other protocols, no questions."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from chrysalis_ray.config.genome import PROTOCOLS
from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.core.redaction import redact_text

NEUTRAL = (
    "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false",
    "-c", "protocol.allow=never", "-c", "protocol.ext.allow=never",
    *(part for protocol in PROTOCOLS for part in ("-c", f"protocol.{protocol}.allow=always")),
    "-c", "protocol.version=2", "-c", "fetch.recurseSubmodules=false", "-c", "gc.auto=0", "-c", "maintenance.auto=false",
    "-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=60", "-c", "credential.helper=",
)  # fmt: skip
KEPT_VARIABLES = frozenset(
    {"PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "SSH_AUTH_SOCK", "SSL_CERT_FILE", "SSL_CERT_DIR", "http_proxy", "https_proxy",
     "HTTPS_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "LD_LIBRARY_PATH"}
)  # fmt: skip
PATIENCE = 300.0  # seconds, for an answer out of a repository of this machine
# Read by the `upload-pack` of a local repository too, which need not look for deltas in what is copied over a pipe.
OURS, OURS_TEXT = "fetching.config", "[pack]\n\twindow = 0\n\tcompression = 1\n"


def git(arguments: Sequence[str], cwd: Path, patience: float | None = None) -> bytes:
    """Standard output of one git command in neutral surroundings. Raises GenomeError with git's own last words, GenomeCorrupt
    where it is not done after `patience` seconds: in a repository of this machine a pipe may lie where a file should, for which
    git waits forever."""
    process = subprocess.Popen(
        [binary(), *NEUTRAL, *arguments],
        cwd=cwd,
        env=environment(cwd / OURS),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=None if patience is None else 0,  # it is ended with the programs that it started
    )
    try:
        said, complaint = process.communicate(timeout=patience)
    except BaseException as error:
        with suppress(ProcessLookupError):  # it was over already when a Ctrl-C came
            process.kill() if patience is None else os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise GenomeCorrupt(
                f"`git {redact_text(' '.join(arguments))}` is not done after {patience:g} seconds",
                "the repository is malformed; clone it again",
            ) from None
        raise
    if process.returncode:
        raise GenomeError(f"git {arguments[0]} failed: {last_words(complaint)}", "check address, access and commit")
    return said


def binary() -> str:
    """Where `git` is. Raises GenomeError where it is not."""
    found = shutil.which("git")
    if found is None:
        raise GenomeError(
            "a git source needs the `git` program, which is not there", "install git (Debian: apt-get install git)"
        )
    return found


def environment(configuration: Path | None = None) -> dict[str, str]:
    """Nothing of the user's configuration but, if it is there, ours; no question at a terminal, no lazily fetched object."""
    ours = configuration if configuration is not None and configuration.is_file() else os.devnull
    kept = {key: value for key, value in os.environ.items() if key in KEPT_VARIABLES}
    return kept | {
        "GIT_ALLOW_PROTOCOL": ":".join(PROTOCOLS),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": str(ours),
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "true",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_SSH_COMMAND": "ssh -oBatchMode=yes -oConnectTimeout=30 -oPermitLocalCommand=no",
        "LC_ALL": "C",
    }


def last_words(stderr: bytes) -> str:
    """The end of what git complained of, on one line, without secrets."""
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    return redact_text(" | ".join(lines[-4:])[-400:]) or "it said nothing"
