"""Sources of a genome that come packed: git repositories and their history, archives, installed packages; records of healing
hubs; and the marks and denials that keep text away."""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_serializer, model_validator
from pydantic_core.core_schema import SerializerFunctionWrapHandler

from chrysalis_ray.config.blueprint import Count, Positive, Written
from chrysalis_ray.config.population import Name

Mark = Literal[
    "not_utf8", "secret", "pii", "generated", "minified", "lfs_pointer", "near_duplicate", "incomplete", "use_denied"
]  # fmt: skip
MARKS: tuple[Mark, ...] = get_args(Mark)
EXCLUDED_BY_DEFAULT: tuple[Mark, ...] = ("lfs_pointer", "minified", "not_utf8", "secret")
ALWAYS_EXCLUDED: tuple[Mark, ...] = ("use_denied",)  # whatever `exclude` says: somebody said no

PROTOCOLS = ("https", "ssh", "file")
_OBJECT_ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_FORBIDDEN_IN_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-/.]|[/.]$|\.lock$")
_SCP_LIKE = re.compile(r"(?P<user>[\w.-]+@)?(?P<host>[\w.-]+):(?!//)(?P<path>.+)")


def is_object_id(commit: str) -> bool:
    """Whether `commit` is a full object id (SHA-1 or SHA-256), not a name that can move."""
    return bool(_OBJECT_ID.fullmatch(commit))


def is_remote(url: str) -> bool:
    """Whether `url` names a repository elsewhere (or a ``file://`` URL), not a path of this machine."""
    return "://" in url or bool(_SCP_LIKE.fullmatch(url) and not url.startswith(("/", ".", "~")))


def refused_url(url: str) -> str | None:
    """Why git must not be given `url`; None where it may. Nothing that git could read as an option, as a command of another
    transport (``ext::``), or that carries a password, gets through."""
    if not url.strip() or re.search(r"[\x00-\x1f\x7f]", url):
        return "is no address of a repository"
    if url.startswith("-"):
        return f"{url!r} starts with a dash, which git would read as an option"
    if re.match(r"[^/]*::", url):
        return f"{url!r} names a transport that runs a command; use {', '.join(PROTOCOLS)} or a path"
    scheme, found, rest = url.partition("://")
    if found:
        if scheme not in PROTOCOLS:
            return f"protocol {scheme!r} is not used here; use {', '.join(PROTOCOLS)} or a path"
        authority = rest.split("/")[0]
        user, at, host = authority.rpartition("@")
        if at and ":" in user:
            return "the address holds a password, which would be kept in every manifest; use ssh, or a credential in ~/.netrc"
        if scheme != "file" and not re.fullmatch(r"\[[0-9A-Fa-f:.]+\](:\d+)?|\w[\w.-]*(:\d+)?", host):
            return f"{host!r} is no host"
    elif (match := _SCP_LIKE.fullmatch(url)) and (match["host"].startswith("-") or match["path"].startswith("-")):
        return f"{url!r} holds what ssh would read as an option"
    return None


def refused_commit(commit: str) -> str | None:
    """Why `commit` names nothing that git may be asked for; None where it does."""
    if not commit or _FORBIDDEN_IN_REF.search(commit):
        return f"{commit!r} is neither a full commit id (40 or 64 hex digits) nor the name of a branch or tag"
    return None


def refused_glob(glob: str) -> str | None:
    """Why `glob` cannot match paths below a root; None where it can."""
    if not glob or glob.startswith("/") or ".." in glob.split("/"):
        return f"{glob!r} leaves the source; write a pattern below its root, e.g. '**/*.md'"
    return None


class GenomeBuild(Written):
    """How a genome is built. Whatever is written here, the same genome comes out.

    `engine` is what scans the documents for marks and likeness: ``processes`` of this machine, or ``ray``: tasks of Ray Data on
    the cluster that ``RAY_ADDRESS`` names, or on this machine. `processes` is how many at most; where it is not written, as
    many as the work and the machine suggest.
    """

    engine: Literal["processes", "ray"] = "processes"
    processes: Count | None = None


class DomainByGlob(Written):
    """The files of a source that match `glob` are of `domain`."""

    domain: Name
    glob: str

    @field_validator("glob")
    @classmethod
    def _below_the_root(cls, glob: str) -> str:
        if why := refused_glob(glob):
            raise ValueError(why)
        return glob


class PackedSource(Written):
    """What git, archive and package sources share: files that match `glob` are of `domain`, or `domains_by` says of which.

    With `domains_by` the first pattern that matches decides, and what matches none is left out. `licence` stands where no
    file of the source says another.
    """

    domain: Name | None = None
    domains_by: tuple[DomainByGlob, ...] = ()
    glob: str = "**/*"
    licence: str = "NOASSERTION"
    max_megabytes: Positive | None = None

    @property
    @abstractmethod
    def named(self) -> str:
        """What a person wrote to name the source."""

    @property
    def patterns(self) -> tuple[tuple[str, str], ...]:
        """(glob, domain), in the order in which they are tried."""
        if self.domain is not None:
            return ((self.glob, self.domain),)
        return tuple((entry.glob, entry.domain) for entry in self.domains_by)

    @field_validator("glob")
    @classmethod
    def _below_the_root(cls, glob: str) -> str:
        if why := refused_glob(glob):
            raise ValueError(why)
        return glob

    @model_validator(mode="after")
    def _one_way_to_a_domain(self) -> Self:
        if (self.domain is None) == (not self.domains_by):
            raise ValueError("write either `domain` or `domains_by` (a list of {domain, glob}), not both and not neither")
        if self.domains_by and "glob" in self.model_fields_set:
            raise ValueError("`glob` belongs to `domain`; with `domains_by` every entry has a glob of its own")
        return self


class GitSource(PackedSource):
    """A git repository at one commit: ``https``, ``ssh``, ``file``, a local repository or a bundle. Nothing is checked out.

    `commit` is a full object id; a branch or tag is resolved when the genome is built, and the id it had is sealed.
    `submodules` are recorded, or with ``follow`` fetched too, each at the commit that is pinned, their files below their path.
    """

    type: Literal["git"]
    url: str
    commit: Annotated[str, Field(description="an id, which `git rev-parse HEAD` prints, or the name of a branch or tag")]
    submodules: Literal["record", "follow"] = "record"

    @property
    def named(self) -> str:
        return self.url

    @field_validator("url")
    @classmethod
    def _safe_url(cls, url: str) -> str:
        if why := refused_url(url):
            raise ValueError(why)
        return url

    @model_serializer(mode="wrap")
    def _as_it_was_before(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A source that only records submodules is written as it was before they could be followed: it is the same recipe."""
        told: dict[str, Any] = serialise(self)
        return {key: value for key, value in told.items() if key != "submodules" or value != "record"}

    @field_validator("commit")
    @classmethod
    def _safe_commit(cls, commit: str) -> str:
        if why := refused_commit(commit):
            raise ValueError(why)
        return commit


class HistorySource(Written):
    """Older states of one git repository: every snapshot (a commit, branch or tag; the oldest first) is a domain of its own,
    ``<domain>-000``, ``<domain>-001`` and so on. The state of today is a source of type git.

    What a snapshot shares with another source, or with an earlier snapshot, belongs to that. `max_megabytes` holds for each
    snapshot. `heard`: a base that is small hears no history unless a mix names the domain (``large``), or ``always``.
    """

    type: Literal["history"]
    url: str
    domain: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}$")]
    snapshots: Annotated[tuple[str, ...], Field(min_length=1, max_length=1000)]
    glob: str = "**/*"
    licence: str = "NOASSERTION"
    max_megabytes: Positive | None = None
    heard: Literal["large", "always"] = "large"

    @property
    def named(self) -> str:
        return self.url

    @property
    def domains(self) -> tuple[str, ...]:
        """One per snapshot; their names sort as the snapshots stand."""
        return tuple(f"{self.domain}-{number:03d}" for number in range(len(self.snapshots)))

    def at(self, number: int) -> GitSource:
        """One snapshot as a source."""
        return GitSource(
            type="git",
            url=self.url,
            commit=self.snapshots[number],
            domain=self.domains[number],
            glob=self.glob,
            licence=self.licence,
            max_megabytes=self.max_megabytes,
        )

    @model_validator(mode="after")
    def _can_be_asked_for(self) -> Self:
        twins = sorted({snapshot for snapshot in self.snapshots if self.snapshots.count(snapshot) > 1})
        if twins:
            raise ValueError(f"the snapshot {twins[0]!r} is named twice")
        for why in (refused_url(self.url), refused_glob(self.glob), *map(refused_commit, self.snapshots)):
            if why:
                raise ValueError(why)
        return self


class ArchiveSource(PackedSource):
    """A zip or tar file (plain, gz, bz2, xz), read without unpacking it."""

    type: Literal["archive"]
    path: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None  # of the file; another file is refused

    @property
    def named(self) -> str:
        return self.path


class PackagesSource(PackedSource):
    """Files of packages installed beside this program, each checked against the hash its RECORD gives."""

    type: Literal["packages"]
    names: Literal["all"] | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    glob: str = "**/*.py"

    @property
    def named(self) -> str:
        return "packages" if self.names == "all" else ", ".join(self.names)


class RecordsSource(Written):
    """What healing hubs noted: one record a line of JSON (`HubRecord` in `config/records.py`). A record without consent to
    training is sealed, and never trained on. One that fills less than `complete_from` of what it should is marked."""

    type: Literal["records"]
    path: str
    domain: Name
    licence: str = "NOASSERTION"
    complete_from: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    max_megabytes: Positive | None = None


# denials ------------------------------------------------------------------------------------------------------------


class Denial(Written):
    """Text that must not be trained on, by the path of its document, by its licence, or by a file in the manner of robots.txt
    that speaks of the paths below `below`. Exactly one of the three."""

    paths: str | None = None  # a glob
    licence: str | None = None  # a pattern of SPDX expressions, such as "*-NC-*"
    robots: str | None = None  # a file, relative to the experiment
    below: str = ""
    reason: str = ""

    @model_validator(mode="after")
    def _one_of_three(self) -> Self:
        if sum(part is not None for part in (self.paths, self.licence, self.robots)) != 1:
            raise ValueError("write exactly one of `paths` (a glob), `licence` (a pattern) and `robots` (a file)")
        if self.below and self.robots is None:
            raise ValueError("`below` belongs to `robots`: the path that the file's root stands for")
        if self.paths is not None and (why := refused_glob(self.paths)):
            raise ValueError(why)
        return self
