"""Where the submodules of a commit lie: what ``.gitmodules`` says of each, believed no further than the address of a source.

A commit pins a submodule by path and commit; only its address stands in a file, which anybody could have written. So an address
passes the same gate as one that a person wrote (`refused_url`), and one more: what came from elsewhere may not point into this
machine. Relative addresses are resolved as git does (gitmodules(5)), but never beyond the host. The file is parsed by
``git config``, which runs nothing; its other keys (``update``, ``branch``, ...) are not looked at.
"""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from socket import inet_aton

from chrysalis_ray.config.genome import is_remote, refused_url
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.redaction import redact_text
from chrysalis_ray.genome.documents import shown_path
from chrysalis_ray.genome.sources.git_objects import LINK, SUBMODULE, ObjectReader, TreeEntry
from chrysalis_ray.genome.sources.git_program import git

FILE = b".gitmodules"
FILE_BYTES = 2**20
DEEPEST = 8  # a submodule of a submodule of ...
MOST = 256  # of one source, all depths together
REMEDY = "leave `submodules: follow` out (they are recorded then), or name what is missing as a source of its own"


@dataclass(frozen=True)
class Submodule:
    """`path` below the root of its parent, `url` as a person could have written it for a source, the pinned `commit`."""

    path: str
    url: str
    commit: str


def submodules_of(reader: ObjectReader, entries: Sequence[TreeEntry], parent_url: str) -> list[Submodule]:
    """The submodules of a commit, by path. `parent_url` is the address of the repository as it was written. Raises GenomeError
    for one whose address is missing, or must not be followed."""
    links = [entry for entry in entries if entry.mode == SUBMODULE]
    urls = _written_urls(reader, entries, parent_url) if links else {}
    found = []
    for entry in sorted(links, key=lambda entry: entry.path):
        shown = shown_path(entry.path)
        if entry.path not in urls:
            raise GenomeError(f"the submodule {shown!r} has no url in .gitmodules", REMEDY)
        found.append(Submodule(shown, _followed_url(urls[entry.path], parent_url, shown), entry.name))
    return found


def _written_urls(reader: ObjectReader, entries: Sequence[TreeEntry], parent_url: str) -> dict[bytes, str]:
    """path -> url, as ``.gitmodules`` says."""
    file = next((entry for entry in entries if entry.path == FILE), None)
    if file is None:
        return {}
    (blob,) = reader.objects([file.name], FILE_BYTES)
    if file.mode == LINK or blob.kind != "blob" or blob.content is None:
        raise GenomeError(f"{parent_url}: .gitmodules is no file of at most {FILE_BYTES} bytes", REMEDY)
    with tempfile.TemporaryDirectory(prefix="chrysalis-git-") as scratch:
        written = Path(scratch) / "modules"
        written.write_bytes(blob.content)
        try:
            told = git(["config", "--file", str(written), "--no-includes", "--null", "--list"], Path(scratch))
        except GenomeError as error:
            raise GenomeError(f"{parent_url}: .gitmodules cannot be read ({error.message})", REMEDY) from error
    values: dict[bytes, dict[bytes, bytes]] = {}
    for line in told.split(b"\0"):
        key, _, value = line.partition(b"\n")
        section, _, rest = key.partition(b".")
        name, _, variable = rest.rpartition(b".")
        if section == b"submodule" and name:
            values.setdefault(name, {})[variable] = value
    urls: dict[bytes, str] = {}
    for module in values.values():
        if b"path" in module and b"url" in module:
            path, url = module[b"path"].rstrip(b"/"), module[b"url"].decode("utf-8", "replace")
            if urls.setdefault(path, url) != url:
                raise GenomeError(f"{parent_url}: .gitmodules gives the submodule {shown_path(path)!r} two urls", REMEDY)
    return urls


def _followed_url(url: str, parent_url: str, path: str) -> str:
    """The address that `url` of a submodule means. Raises GenomeError where git must not be given it."""
    relative = url.startswith(("./", "../"))
    where = _resolved(url, parent_url) if relative else url
    if where is None:
        why: str | None = f"{url!r} leads out of {parent_url!r}"
    elif not relative and not is_remote(url) and not url.startswith("/"):
        why = refused_url(url) or f"{url!r} is neither an address nor relative to its repository (./ or ../)"
    else:
        why = refused_url(where)
    if why is None and where is not None and is_local(where) and not is_local(parent_url):
        why = f"{where!r} lies on this machine, but its repository came from elsewhere"
    if why is not None or where is None:
        raise GenomeError(f"the submodule {path!r} is not followed: {redact_text(why or '')}", REMEDY)
    return where


def is_local(url: str) -> bool:
    """Whether `url` names something of this machine: a path, or a host that is this one, or that its network alone knows
    (link-local, where clouds answer with credentials)."""
    if not is_remote(url) or url.startswith("file://"):
        return True
    host = _host(url)
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        told = ip_address(host) if ":" in host else IPv4Address(inet_aton(host))  # 127.1 and 0x7f000001 are addresses, too
    except (OSError, ValueError):
        return False
    number = getattr(told, "ipv4_mapped", None) or told
    return bool(number.is_loopback or number.is_unspecified or number.is_link_local)


def _host(url: str) -> str:
    """The host of a remote address, in small letters."""
    rest = url.partition("://")[2] or url
    host = rest.split("/")[0].rpartition("@")[2]
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return host.lower().rstrip(".")


def _resolved(url: str, parent_url: str) -> str | None:
    """`url`, which begins with ``./`` or ``../``, from `parent_url` on; None where it leads above the host, or the root."""
    parent = parent_url.rstrip("/")
    if not is_remote(parent):
        joined = posixpath.normpath(posixpath.join(parent, url))
        if parent.startswith("~") and not joined.startswith("~"):
            return None
        return joined if joined.startswith(("/", ".", "~")) else f"./{joined}"
    if "://" in parent:
        scheme, _, rest = parent.partition("://")
        host, slash, path = rest.partition("/")
        head = f"{scheme}://{host}{slash}"
    else:
        host, colon, path = parent.partition(":")
        head = f"{host}{colon}" + ("/" if path.startswith("/") else "")
        path = path.lstrip("/")
    joined = posixpath.normpath(posixpath.join(path, url))
    return None if joined in (".", "..") or joined.startswith(("../", "/")) else head + joined
