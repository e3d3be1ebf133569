"""Documents of packages that are installed beside this program, each file checked against its package's own RECORD."""

from __future__ import annotations

import base64
import difflib
import hashlib
import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackagePath
from pathlib import Path
from typing import Any

from chrysalis_ray.config.genome import PackagesSource
from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.core.printable import printable
from chrysalis_ray.genome.documents import Document, decoded, hash_order, make_document
from chrysalis_ray.genome.globs import domain_of
from chrysalis_ray.genome.licences import UNKNOWN, Licensing

MAX_DOCUMENT_BYTES = 32 * 2**20

# Trove classifiers say less than SPDX; these leave one licence only.
CLASSIFIERS = {
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: ISC License (ISCL)": "ISC",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "License :: OSI Approved :: Python Software Foundation License": "PSF-2.0",
    "License :: OSI Approved :: The Unlicense (Unlicense)": "Unlicense",
    "License :: OSI Approved :: GNU General Public License v3 (GPLv3)": "GPL-3.0-only",
    "License :: OSI Approved :: GNU General Public License v2 (GPLv2)": "GPL-2.0-only",
}


def read_packages(source: PackagesSource, skipped: Counter[str], facts: dict[str, Any]) -> Iterator[Document]:
    """One document per text file that a package's RECORD lists, by package and path; in hash order where the source is capped.

    Counts ``not_text``, ``empty``, ``too_large``, ``outside`` (files that a package put elsewhere), ``unhashed`` (its RECORD
    has no hash) and ``missing`` (listed but not there). Puts every package's version into `facts`. Raises GenomeError for a
    package that is not installed, GenomeCorrupt for a file that is not what its RECORD says.
    """
    chosen = _chosen(source)
    versions = facts["packages"] = _versions(chosen)
    listed = [
        (f"{name}-{versions[name]}/{file.as_posix()}", name, file, domain)
        for name, distribution in chosen.items()
        for file, domain in _files(distribution, source, skipped)
    ]
    listed.sort(key=lambda entry: hash_order(entry[0]) if source.max_megabytes is not None else entry[0])
    licences = {name: _licensing(distribution, source.licence) for name, distribution in chosen.items()}
    for path, name, file, domain in listed:
        content = _checked(file, path, skipped)
        if content is None:
            continue
        found = decoded(content)
        if found is None or not found[0].strip():
            skipped["not_text" if found is None else "empty"] += 1
            continue
        licence, evidence = licences[name].of(path, found[0])
        key = f"packages/{name}/{file.as_posix()}"  # without the version: a file stays in its split when a package is updated
        yield make_document(found[0], path, key, domain, licence, found[1], evidence)


def _chosen(source: PackagesSource) -> dict[str, Distribution]:
    """Canonical name -> distribution, sorted; where one is installed twice, the one that Python imports."""
    there: dict[str, Distribution] = {}
    for distribution in importlib.metadata.distributions():
        if name := distribution.metadata["Name"]:
            there.setdefault(_canonical(name), distribution)
    if source.names == "all":
        return dict(sorted(there.items()))
    chosen = {}
    for name in sorted({_canonical(name) for name in source.names}):
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise GenomeError(f"the package {name!r} is not installed here{guess}", "install it, or leave it out of `names`")
        chosen[name] = there[name]
    return chosen


def _versions(chosen: Mapping[str, Distribution]) -> dict[str, str]:
    """Asked for once: every time it is asked, a distribution parses its metadata."""
    return {name: distribution.version for name, distribution in chosen.items()}


def _canonical(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _files(distribution: Distribution, source: PackagesSource, skipped: Counter[str]) -> Iterator[tuple[PackagePath, str]]:
    for file in distribution.files or ():
        if file.suffix == ".pyc":
            continue
        domain = domain_of(file.as_posix(), source.patterns)
        if domain is None:
            continue
        if ".." in file.parts or file.is_absolute():
            skipped["outside"] += 1
        elif file.hash is None:
            skipped["unhashed"] += 1
        else:
            yield file, domain


def _checked(file: PackagePath, path: str, skipped: Counter[str]) -> bytes | None:
    """The bytes of an installed file, if they are those of the RECORD; None where there are none to be had."""
    located = file.locate()
    try:
        with open(located, "rb") as stream:
            content = stream.read(MAX_DOCUMENT_BYTES + 1)
    except OSError:
        skipped["missing"] += 1
        return None
    if len(content) > MAX_DOCUMENT_BYTES:
        skipped["too_large"] += 1
        return None
    assert file.hash is not None
    if file.hash.mode not in hashlib.algorithms_guaranteed or file.hash.mode.startswith("shake"):
        skipped["unhashed"] += 1
        return None
    digest = hashlib.new(file.hash.mode, content, usedforsecurity=False).digest()
    if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value.rstrip("="):
        raise GenomeCorrupt(
            f"{located} is not the file that its package installed "
            f"({printable(path)}: {file.hash.mode} differs from its RECORD)",
            "install the package again, or leave it out of `names`",
        )
    return content


def _licensing(distribution: Distribution, declared: str) -> Licensing:
    """A package's own word on its licence: the expression of PEP 639, else a classifier that names one licence."""
    metadata = distribution.metadata
    for expression in metadata.get_all("License-Expression") or ():
        return Licensing({}, " ".join(expression.split()), "package expression")
    named = {CLASSIFIERS[line] for line in metadata.get_all("Classifier") or () if line in CLASSIFIERS}
    if len(named) == 1:
        return Licensing({}, named.pop(), "package classifier")
    return Licensing({}, declared, "declared" if declared != UNKNOWN else "none found")


def installed_files(source: PackagesSource) -> Iterator[tuple[str, Path]]:
    """(name, place) of every file that the source would read, in order, without reading any."""
    chosen = _chosen(source)
    versions = _versions(chosen)
    for name, distribution in chosen.items():
        for file, _ in _files(distribution, source, Counter()):
            yield f"{name}-{versions[name]}/{file.as_posix()}", Path(str(file.locate()))
