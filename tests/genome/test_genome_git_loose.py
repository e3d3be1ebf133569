"""Loose objects unpacked in this process: the object that the name says, or git's to judge."""

import hashlib
import os
import zlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from chrysalis_ray.core.errors import GenomeCorrupt
from chrysalis_ray.genome.sources.git_loose import HEADER_BYTES, LooseObjects, object_folders, unpacked
from chrysalis_ray.genome.sources.git_objects import ObjectReader
from tests.genome.test_genome_git import git, words

MOST = 100_000


def packed(kind, content, level=1, algorithm=hashlib.sha1):
    """(file, name) of an object, by git's object format."""
    whole = kind + b" %d\0" % len(content) + content
    return zlib.compress(whole, level), algorithm(whole).hexdigest()


@settings(deadline=None)
@given(
    st.sampled_from([b"blob", b"tree", b"commit", b"tag"]),
    st.binary(max_size=2000),
    st.integers(0, 9),
    st.sampled_from([hashlib.sha1, hashlib.sha256]),
)
def test_what_was_packed_comes_out_and_no_more_than_wanted(kind, content, level, algorithm):
    file, name = packed(kind, content, level, algorithm)
    assert unpacked(file, name, MOST) == (kind.decode(), content)
    assert unpacked(file, name, len(content)) == (kind.decode(), content)
    assert not content or unpacked(file, name, len(content) - 1) is None
    assert unpacked(file, algorithm(b"another").hexdigest(), MOST) is None


def test_no_damage_of_a_file_is_another_content():
    content = words(1).encode() * 3
    file, name = packed(b"blob", content)
    refused = 0
    for place in range(len(file)):
        for bit in range(8):
            changed = file[:place] + bytes([file[place] ^ 1 << bit]) + file[place + 1 :]
            found = unpacked(changed, name, MOST)
            assert found in (None, ("blob", content))
            refused += found is None
    assert refused >= 8 * len(file) - 24  # a few bits fill up, or tell the packer's level
    for length in range(len(file)):
        assert unpacked(file[:length], name, MOST) is None
    assert unpacked(file + b"x", name, MOST) is None


@pytest.mark.parametrize(
    "whole",
    [b"blob 3\0four", b"blob 5\0four", b"blob 04\0four", b"blob -4\0four", b"note 4\0four", b"blob 4four", b"", b"blob \0"],
)
def test_a_header_that_is_none(whole):
    assert unpacked(zlib.compress(whole), hashlib.sha1(whole).hexdigest(), MOST) is None


def test_a_file_that_unpacks_to_a_thousandfold_is_left_off_early(monkeypatch):
    bomb = zlib.compress(b"blob 10\0" + bytes(50_000_000))
    lengths = []
    real = isal_zlib.decompressobj

    class Counting:
        def __init__(self):
            self._real = real()

        def decompress(self, *given):
            found = self._real.decompress(*given)
            lengths.append(len(found))
            return found

        def __getattr__(self, name):
            return getattr(self._real, name)

    monkeypatch.setattr("chrysalis_ray.genome.sources.git_loose.isal_zlib.decompressobj", Counting)
    assert unpacked(bomb, "0" * 40, 10) is None
    assert lengths == [10 + HEADER_BYTES]


@pytest.fixture
def store(tmp_path):
    """A bare store of forty files: every second in a pack, four of those as a file too; and the names."""
    git(tmp_path, "init", "--quiet", "--bare", "larva.git")
    folder = tmp_path / "larva.git"

    def add(number):
        (tmp_path / "file").write_text(words(number))
        return git(folder, "hash-object", "-w", str(tmp_path / "file"))

    names = {number: add(number) for number in range(0, 40, 2)}
    listed = folder / "names"
    listed.write_text("".join(f"{name}\n" for name in names.values()))
    with listed.open("rb") as stream:
        import subprocess

        command = ["git", "pack-objects", "--quiet", str(folder / "objects" / "pack" / "pack")]
        subprocess.run(command, cwd=folder, stdin=stream, check=True, capture_output=True)
    for number in range(8, 40, 2):
        name = names[number]
        (folder / "objects" / name[:2] / name[2:]).unlink()
    names |= {number: add(number) for number in range(1, 40, 2)}
    return folder, [names[number] for number in range(40)]


def test_files_and_packs_come_in_the_order_they_are_asked_for(store):
    folder, names = store
    loose = LooseObjects(object_folders(folder))
    assert [loose.holds(name) for name in names] == [number % 2 == 1 or number < 8 for number in range(40)]
    asked = [*names, *reversed(names)] * 9  # more than are under way at a time
    with ObjectReader(folder) as reader:
        found = list(reader.objects(asked, MOST))
        assert [blob.name for blob in found] == asked
        texts = {blob.name: blob.content for blob in found}
        assert [texts[name] for name in names] == [words(number).encode() for number in range(40)]
        assert reader.verified == len(asked)
        dropped = list(reader.objects(names, 10))
        assert [(blob.content, blob.size) for blob in dropped] == [(None, len(words(number))) for number in range(40)]


def test_a_damaged_file_is_read_from_the_pack_that_has_it_too_and_else_told(store):
    folder, names = store

    def damage(number):
        path = folder / "objects" / names[number][:2] / names[number][2:]
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-9])

    damage(4)
    with ObjectReader(folder) as reader:
        assert [blob.content for blob in reader.objects(names[3:6], MOST)] == [words(n).encode() for n in (3, 4, 5)]
    damage(5)
    with ObjectReader(folder) as reader, pytest.raises(GenomeCorrupt, match=names[5]):
        list(reader.objects(names[3:6], MOST))


def test_a_pipe_in_place_of_an_object_is_not_waited_for(store):
    folder, names = store
    path = folder / "objects" / names[1][:2] / names[1][2:]
    path.unlink()
    os.mkfifo(path)
    with ObjectReader(folder) as reader, pytest.raises(GenomeCorrupt, match="is no file"):
        list(reader.objects(names, MOST))


def test_what_a_store_borrows_is_read_where_it_lies(store, tmp_path):
    folder, names = store
    git(tmp_path, "init", "--quiet", "--bare", "borrower.git")
    other = tmp_path / "borrower.git"
    (other / "objects" / "info" / "alternates").write_text(f"{folder / 'objects'}\n")
    loose = LooseObjects(object_folders(other))
    assert Counter(loose.holds(name) for name in names) == {True: 24, False: 16}
    assert loose.read(names[1], MOST) == ("blob", words(1).encode())
    with ObjectReader(other) as reader:
        assert [blob.content for blob in reader.objects(names, MOST)] == [words(n).encode() for n in range(40)]
