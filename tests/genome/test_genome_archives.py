"""Archives and installed packages as sources; what is hostile is refused with one typed error."""

import base64
import bz2
import gzip
import hashlib
import io
import lzma
import random
import tarfile
import zipfile
from collections import Counter

import pytest

from chrysalis_ray.config.genome import ArchiveSource, PackagesSource
from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.genome.sources import archives
from chrysalis_ray.genome.sources.archives import read_archive
from chrysalis_ray.genome.sources.fingerprints import _look
from chrysalis_ray.genome.sources.packages import read_packages


def text(number):
    return " ".join(f"{number}w{random.Random(number * 99 + i).randrange(50)}" for i in range(60)).encode()


FILES = {
    "larva-1.0/LICENSE": b"Apache License\n  Version 2.0, January 2004\n",
    "larva-1.0/one.py": text(1),
    "larva-1.0/deep/er/two.py": b"\xef\xbb\xbf" + text(2),
    "larva-1.0/deep/latin.py": b"\xe9" + text(3),
    "larva-1.0/notes.md": text(4) + b"\r\n",
    "larva-1.0/picture.png": b"\x89PNG\0",
    "larva-1.0/empty.py": b"",
}


def zipped(files=FILES, **more):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tarred(files=FILES, entries=()):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, kind, target in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            archive.addfile(entry)
    return stream.getvalue()


PACKERS = {
    "zip": lambda: zipped(),
    "tar": lambda: tarred(),
    "tar.gz": lambda: gzip.compress(tarred()),
    "tar.bz2": lambda: bz2.compress(tarred()),
    "tar.xz": lambda: lzma.compress(tarred()),
}


def read(tmp_path, content, **more):
    (tmp_path / "archive").write_bytes(content)
    more = more or {"domain": "code", "glob": "**/*.py"}
    source = ArchiveSource.model_validate({"type": "archive", "path": "archive", **more})
    skipped, facts = Counter(), {}
    return list(read_archive(source, tmp_path, skipped, facts)), {k: v for k, v in skipped.items() if v}, facts


@pytest.mark.parametrize("kind", PACKERS)
def test_every_kind_of_archive_gives_the_same_documents(tmp_path, kind):
    content = PACKERS[kind]()
    documents, skipped, facts = read(tmp_path, content)
    assert {d.path: d.content for d in documents} == {
        f"archive/larva-1.0/{name}": FILES[f"larva-1.0/{name}"] for name in ("one.py", "deep/er/two.py", "deep/latin.py")
    }
    assert {(d.licence, d.evidence) for d in documents} == {("Apache-2.0", "file larva-1.0/LICENSE")}
    assert skipped == {"empty": 1, "unmatched": 3}
    assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "files": 7}


def test_globs_and_domains(tmp_path):
    by_glob = [{"domain": "deep", "glob": "*/deep/**"}, {"domain": "rest", "glob": "**/*"}]
    documents, skipped, _ = read(tmp_path, zipped(), domains_by=by_glob)
    assert {d.path.split("/", 2)[2]: d.domain for d in documents} == {
        "LICENSE": "rest", "one.py": "rest", "notes.md": "rest", "deep/er/two.py": "deep", "deep/latin.py": "deep",
    }  # fmt: skip
    assert skipped == {"empty": 1, "not_text": 1}


def test_a_named_sha256_pins_the_file(tmp_path):
    content = zipped()
    pinned = {"domain": "d", "sha256": hashlib.sha256(content).hexdigest()}
    assert read(tmp_path, content, **pinned)[0]
    with pytest.raises(GenomeError, match="another file than the one you named"):
        read(tmp_path, zipped({**FILES, "more.py": b"x"}), **pinned)


@pytest.mark.parametrize("name", ["/etc/passwd", "../up.py", "a/../../up.py", "a\\..\\up.py", "C:\\up.py"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    for content in (zipped({**FILES, name: b"x"}), gzip.compress(tarred({**FILES, name: b"x"}))):
        with pytest.raises(GenomeError, match="leads out of the archive"):
            read(tmp_path, content)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.LNKTYPE, "larva-1.0/one.py"),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
)
def test_links_and_devices_are_refused(tmp_path, kind, target):
    with pytest.raises(GenomeError, match="is a link or a device"):
        read(tmp_path, tarred(entries=[("larva-1.0/odd.py", kind, target)]))


def test_a_symbolic_link_in_a_zip_is_refused(tmp_path):
    stream = io.BytesIO(zipped())
    with zipfile.ZipFile(stream, "a") as archive:
        entry = zipfile.ZipInfo("larva-1.0/link.py")
        entry.create_system, entry.external_attr = 3, 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(GenomeError, match="is a link or a device"):
        read(tmp_path, stream.getvalue())


def test_an_encrypted_member_is_refused(tmp_path):
    content = bytearray(zipped({"a.py": text(1)}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    with pytest.raises(GenomeError, match="is encrypted"):
        read(tmp_path, bytes(content))


# bombs


def test_bombs_are_told_by_what_they_unpack_to(tmp_path):
    blanks = b" " * (archives.RATIO_COUNTS_FROM + 1)
    for content in (zipped({"a.py": blanks}), gzip.compress(tarred({"a.py": blanks})), lzma.compress(tarred({"a.py": blanks}))):
        assert len(content) < 100_000
        with pytest.raises(GenomeError, match="refused as a bomb"):
            read(tmp_path, content)


def test_many_small_members_of_a_zip_are_one_bomb(tmp_path):
    blanks = b" " * (archives.RATIO_COUNTS_FROM // 8)
    with pytest.raises(GenomeError, match="refused as a bomb"):
        read(tmp_path, zipped({f"{n}.py": blanks for n in range(9)}))


def test_total_and_members_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_TOTAL", 1000)
    with pytest.raises(GenomeError, match="more than 1,000 bytes"):
        read(tmp_path, zipped())
    monkeypatch.setattr(archives, "MAX_MEMBERS", 6)
    monkeypatch.setattr(archives, "MAX_TOTAL", 10**6)
    for content in (zipped(), tarred()):
        with pytest.raises(GenomeError, match="more than 6 members"):
            read(tmp_path, content)


def test_a_header_that_claims_gigabytes_costs_nothing(tmp_path):
    content = bytearray(tarred({"a.py": b"x" * 600}))
    header = bytearray(content[:512])
    header[124:136] = b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(GenomeError, match="cannot be read as a zip or tar"):
        read(tmp_path, gzip.compress(bytes(header) + bytes(content[512:])))


# damage


@pytest.mark.parametrize("kind", PACKERS)
def test_one_flipped_byte_is_never_a_wrong_document(tmp_path, kind):
    """A plain tar has no checksum over its files: there the sealed (or pinned) sha256 of the archive tells."""
    good = PACKERS[kind]()
    expected = {d.path: d.content for d in read(tmp_path, good)[0]}
    for position in range(3, len(good), max(1, len(good) // 40)):
        bad = good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :]
        with pytest.raises(GenomeError, match="another file"):
            read(tmp_path, bad, domain="d", sha256=hashlib.sha256(good).hexdigest())
        if kind not in ("tar", "zip"):
            try:
                assert {d.path: d.content for d in read(tmp_path, bad)[0]} == expected  # a time, a flag: nothing that is read
            except GenomeError:
                continue


@pytest.mark.parametrize("kind", PACKERS)
def test_a_cut_archive_is_refused(tmp_path, kind):
    good = PACKERS[kind]()
    for length in (0, 3, len(good) // 3, len(good) // 2):
        with pytest.raises(GenomeError, match="cannot be read as a zip or tar"):
            read(tmp_path, good[:length])


def test_a_tar_with_one_damaged_header_does_not_end_there(tmp_path):
    good = bytearray(tarred())
    where = good.index(b"larva-1.0/deep/er/two.py")
    good[where + 3] ^= 1
    with pytest.raises(GenomeError, match="bad checksum"):
        read(tmp_path, bytes(good))


# installed packages


def packages(**more):
    source = PackagesSource.model_validate({"type": "packages", "domain": "packages", **more})
    skipped, facts = Counter(), {}
    return list(read_packages(source, skipped, facts)), {k: v for k, v in skipped.items() if v}, facts


def install(folder, name, files, tamper=None, metadata="License-Expression: MIT\n"):
    info = folder / f"{name}-1.5.dist-info"
    info.mkdir(parents=True)
    lines = []
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"tampered" if path == tamper else content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(content)}")
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.5\n{metadata}")
    (info / "RECORD").write_text(
        "\n".join([*lines, f"{name}-1.5.dist-info/RECORD,,", "../../bin/x.py,sha256=x,1", "gone.py,sha256=x,1"])
    )


def test_files_of_an_installed_package_with_licence_and_version(tmp_path, monkeypatch):
    install(
        tmp_path,
        "Wing_Case",
        {"wing/a.py": text(1), "wing/b.py": b"# SPDX-License-Identifier: ISC\n" + text(2), "wing/c.txt": b"c"},
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    documents, skipped, facts = packages(names=["wing.case"])
    assert [(d.path, d.content, d.licence, d.evidence) for d in documents] == [
        ("wing-case-1.5/wing/a.py", text(1), "MIT", "package expression"),
        ("wing-case-1.5/wing/b.py", b"# SPDX-License-Identifier: ISC\n" + text(2), "ISC", "tag"),
    ]
    assert skipped == {"outside": 1, "missing": 1}
    assert facts == {"packages": {"wing-case": "1.5"}}


def test_a_file_that_its_package_did_not_install_is_found(tmp_path, monkeypatch):
    install(tmp_path, "wing", {"wing/a.py": text(1), "wing/b.py": text(2)}, tamper="wing/b.py", metadata="")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(GenomeCorrupt, match=r"wing/b\.py is not the file that its package installed"):
        packages(names=["wing"])


def test_a_package_that_is_not_installed_is_guessed(tmp_path):
    with pytest.raises(GenomeError, match="'nunpy' is not installed here; did you mean 'numpy'"):
        packages(names=["nunpy"])


def test_real_packages_are_what_they_installed():
    documents, _, facts = packages(names=["typer", "PyYAML"], glob="**/*")
    assert set(facts["packages"]) == {"typer", "pyyaml"}
    assert len(documents) > 20
    assert {d.licence for d in documents if d.path.startswith("typer-")} >= {"MIT"}
    assert _look(PackagesSource(type="packages", domain="d", names=("typer",)), None)
