"""Packed objects unpacked in this process: what git says that they are, or git's to judge."""

import hashlib
import os
import struct
import subprocess
import tracemalloc
import zlib
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chrysalis_ray.core.errors import GenomeCorrupt
from chrysalis_ray.genome.sources import git_batch, git_packs
from chrysalis_ray.genome.sources.git_deltas import Misfit, patched
from chrysalis_ray.genome.sources.git_objects import ObjectReader, tree_of_commit
from chrysalis_ray.genome.sources.git_packs import DELTA_BY_NAME, DELTA_BY_PLACE, MOST_PACKS, Bases, Pack, PackedObjects
from tests.genome.test_genome_git import git, make_repository, read, words

MOST = 1_000_000
BLOB = 3

# packs made by git ----------------------------------------------------------------------------------------------------


def grown(folder, object_format="sha1"):
    """A repository of eight commits: files that change a little each time, one that is empty, one that is large."""
    folder.mkdir()
    git(folder, "init", "--quiet", "--template=", f"--object-format={object_format}", "--initial-branch=main")
    large = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(12_000))
    for turn in range(8):
        for number in range(6):
            text = "".join(words(100 * number + line) for line in range(20) if line != turn) + words(turn * 50 + number)
            (folder / f"{number}.txt").write_text(text)
        (folder / "large.bin").write_bytes(large[: 200_000 + turn] + b"more" + large[200_000:])
        (folder / "empty").write_bytes(b"")
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "-m", f"turn {turn}")
        if turn in (1, 4):
            git(folder, "repack", "-d", "--quiet")
    git(folder, "tag", "-a", "-m", "a tag", "v1")
    return folder


def everything(folder):
    """name -> (kind, content) of all objects of a repository, by git."""
    listed = git(folder, "cat-file", "--batch-all-objects", "--batch-check=%(objectname) %(objecttype)").splitlines()
    found = {}
    for line in listed:
        name, kind = line.split()
        done = subprocess.run(["git", "cat-file", kind, name], cwd=folder, capture_output=True, check=True)
        found[name] = (kind, done.stdout)
    return found


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return grown(tmp_path_factory.mktemp("packs") / "grown")


@pytest.fixture(scope="module")
def contents(repository):
    return everything(repository)


def opened(folder, id_bytes=20):
    return [Pack(path, id_bytes, Bases()) for path in sorted((folder / "pack").glob("*.idx"))]


def kinds_in(folder, names, id_bytes=20):
    """How many entries of each kind the packs of an object folder have."""
    packs = opened(folder, id_bytes)
    places = [(pack, place) for pack in packs for name in names if (place := pack.place_of(bytes.fromhex(name))) is not None]
    found = Counter(pack._entry(place, MOST).kind for pack, place in places)
    for pack in packs:
        pack.close()
    return found


def copied(repository, folder, *command):
    """A copy of the repository after one more git command; its object folder."""
    subprocess.run(["cp", "-r", repository, folder], check=True)
    if command:
        git(folder, *command)
    return folder / ".git" / "objects"


WAYS = {
    "as it grew": (),
    "one pack": ("repack", "-a", "-d", "-f", "--quiet"),
    "gc": ("gc", "--aggressive", "--prune=now", "--quiet"),
    "by name": ("-c", "repack.useDeltaBaseOffset=false", "repack", "-a", "-d", "-f", "--quiet"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_object_is_what_git_says_without_git(repository, contents, tmp_path, way, monkeypatch):
    objects = copied(repository, tmp_path / "copy", *WAYS[way])
    packs, loose = len(list((objects / "pack").glob("*.pack"))), len(list(objects.glob("??/*")))
    assert (packs > 1 and loose > 5) if way == "as it grew" else (packs == 1 and loose == 0)
    kinds = kinds_in(objects, contents)
    assert kinds[DELTA_BY_NAME if way == "by name" else DELTA_BY_PLACE] > 10
    monkeypatch.setenv("PATH", str(tmp_path))
    with ObjectReader(tmp_path / "copy" / ".git") as reader:
        found = {each.name: (each.kind, each.content) for each in reader.objects(contents, MOST)}
        assert found == contents
        assert reader.verified == len(contents)
        assert all(reader.read(name, kind) == content for name, (kind, content) in contents.items())


def test_a_repository_of_sha256(tmp_path, monkeypatch):
    folder = grown(tmp_path / "other", "sha256")
    git(folder, "gc", "--quiet")
    contents = everything(folder)
    assert kinds_in(folder / ".git" / "objects", contents, 32)[DELTA_BY_PLACE] > 10
    monkeypatch.setenv("PATH", str(tmp_path))
    with ObjectReader(folder / ".git") as reader:
        assert {each.name: (each.kind, each.content) for each in reader.objects(contents, MOST)} == contents


def test_few_bases_are_kept_and_all_comes_out_the_same(repository, contents, tmp_path, monkeypatch):
    objects = copied(repository, tmp_path / "copy", *WAYS["gc"])
    monkeypatch.setattr(git_packs, "CACHE_BYTES", 30_000)
    packed = PackedObjects([objects])
    assert all(packed.read(name, MOST) == told for name, told in sorted(contents.items()))
    (pack,) = packed._packs
    kept = [len(content) for _, content in pack._bases._kept.values()]
    assert sum(kept) == pack._bases._bytes <= 30_000
    assert kept
    packed.close()


def test_an_object_larger_than_wanted_is_hashed_and_dropped(repository, contents, tmp_path):
    copied(repository, tmp_path / "copy", *WAYS["gc"])
    with ObjectReader(tmp_path / "copy" / ".git") as reader:
        for each in reader.objects(contents, 3000):
            kind, content = contents[each.name]
            assert (each.kind, each.size) == (kind, len(content))
            assert each.content == (content if len(content) <= 3000 else None)


def index_of_version_1(objects):
    (index,) = (objects / "pack").glob("*.idx")
    index.unlink()
    git(objects, "index-pack", "--index-version=1", str(index.with_suffix(".pack")))


def lent_twice(objects):
    lender, owner = objects.parent / "lender", objects.parent / "owner"
    for folder in (lender, owner):
        (folder / "info").mkdir(parents=True)
    (objects / "pack").rename(owner / "pack")
    (lender / "info" / "alternates").write_text(f"{owner}\n")
    (objects / "info" / "alternates").write_text(f"{lender}\n")


@pytest.mark.parametrize("unusual", [index_of_version_1, lent_twice])
def test_what_is_unusual_is_read_by_git(repository, contents, tmp_path, unusual):
    objects = copied(repository, tmp_path / "copy", *WAYS["gc"])
    unusual(objects)
    packed = PackedObjects([objects])
    assert not any(packed.holds(name) for name in contents)
    with ObjectReader(tmp_path / "copy" / ".git") as reader:
        assert {each.name: (each.kind, each.content) for each in reader.objects(contents, MOST)} == contents


def test_more_packs_than_are_held_open_are_gits(repository, contents, tmp_path, monkeypatch):
    assert MOST_PACKS >= 50  # git gathers that many before it repacks
    monkeypatch.setattr(git_packs, "MOST_PACKS", 1)
    assert PackedObjects([repository / ".git" / "objects"]).read(next(iter(contents)), MOST) is None
    with ObjectReader(repository / ".git") as reader:
        assert {each.name: (each.kind, each.content) for each in reader.objects(contents, MOST)} == contents


def test_indexes_that_have_no_room_are_gits(repository, contents, tmp_path, monkeypatch):
    objects = repository / ".git" / "objects"
    sizes = [path.stat().st_size for path in sorted((objects / "pack").glob("*.idx"))]
    assert len(sizes) > 1
    for room, count in ((sum(sizes), len(sizes)), (sum(sizes) - 1, len(sizes) - 1), (min(sizes) - 1, 0)):
        monkeypatch.setattr(git_packs, "MOST_INDEX_BYTES", room)
        assert len(git_packs._opened([objects], 20)) == count
    with ObjectReader(repository / ".git") as reader:
        assert {each.name: (each.kind, each.content) for each in reader.objects(contents, MOST)} == contents


@pytest.mark.parametrize("object_format", ["sha1", "sha256"])
def test_documents_do_not_depend_on_how_the_objects_lie(tmp_path, object_format):
    _, second = make_repository(tmp_path / "larva", object_format)
    before = read(tmp_path / "larva", tmp_path, commit=second, domain="all")
    git(tmp_path / "larva", "gc", "--aggressive", "--prune=now", "--quiet")
    assert not list((tmp_path / "larva" / ".git" / "objects").glob("??"))
    assert read(tmp_path / "larva", tmp_path, commit=second, domain="all") == before


# damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A bare repository of five texts, three of them deltas by place or by name, in one pack: object folder, contents."""
    folder = tmp_path / "small.git"
    git(tmp_path, "init", "--quiet", "--bare", "small.git")
    texts = [words(7, 30) * 2, words(7, 30) * 2 + "more\n", words(7, 30) + "other\n" + words(7, 30), "short\n", ""]
    places, entries, names = {}, [], [name_of(text.encode()) for text in texts]
    entries.append(plain(BLOB, texts[0].encode()))
    entries.append(lambda at: by_place(at - places[0], delta_to(texts[0], texts[1])))
    entries.append(lambda at: by_name(names[0], delta_to(texts[0], texts[2])))
    entries += [plain(BLOB, texts[3].encode()), plain(BLOB, b"")]
    write_pack(folder / "objects", names, entries, places)
    git(folder, "fsck", "--full")
    return folder / "objects", {name: ("blob", text.encode()) for name, text in zip(names, texts, strict=True)}


@pytest.mark.parametrize("suffix", ["pack", "idx"])
def test_no_flipped_bit_of_a_pack_or_its_index_is_another_content(small, suffix):
    objects, contents = small
    (path,) = (objects / "pack").glob(f"*.{suffix}")
    path.chmod(0o644)
    good = path.read_bytes()
    refused = Counter()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        packed = PackedObjects([objects])
        for name, told in contents.items():
            found = packed.read(name, MOST)
            assert found in (None, told)
            refused[name] += found is None
        packed.close()
    assert all(refused.values())
    assert suffix == "idx" or sum(refused.values()) > len(good) * 0.9  # every byte of a pack is somebody's


@pytest.mark.parametrize("suffix", ["pack", "idx"])
def test_a_pack_or_index_that_is_cut_off_gives_nothing(small, suffix):
    objects, contents = small
    (path,) = (objects / "pack").glob(f"*.{suffix}")
    path.chmod(0o644)
    good = path.read_bytes()
    for length in range(0, len(good), 1 if suffix == "pack" else 7):
        path.write_bytes(good[:length])
        packed = PackedObjects([objects])
        assert not any(packed.holds(name) for name in contents)
        packed.close()


def test_a_damaged_pack_is_an_error_or_the_content(small):
    objects, contents = small
    (path,) = (objects / "pack").glob("*.pack")
    path.chmod(0o644)
    good = path.read_bytes()
    for place in range(14, len(good) - 20, 31):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        with ObjectReader(objects.parent) as reader:
            found = []
            with pytest.raises(GenomeCorrupt):
                found.extend((each.name, (each.kind, each.content)) for each in reader.objects(contents, MOST))
            assert all(contents[name] == told for name, told in found)


@pytest.mark.parametrize("suffix", ["pack", "idx"])
def test_what_is_no_file_is_no_pack(small, suffix):
    objects, contents = small
    (path,) = (objects / "pack").glob(f"*.{suffix}")
    path.unlink()
    os.mkfifo(path)
    packed = PackedObjects([objects])
    assert not any(packed.holds(name) for name in contents)


def test_a_commit_may_call_its_tree_anything(small):
    objects, _ = small
    (objects.parent / "commit").write_text("tree ../../etc/passwd\n\nhello\n")
    commit = git(objects.parent, "hash-object", "-w", "-t", "commit", "--literally", "commit")
    with ObjectReader(objects.parent) as reader:
        _, tree = tree_of_commit(reader, commit)
        with pytest.raises(GenomeCorrupt):
            reader.read(tree, "tree")


# packs made by an enemy -----------------------------------------------------------------------------------------------


def number(size):
    """A size, seven bits a byte."""
    out = bytearray()
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*out, size])


def head(kind, size):
    """The head of an entry."""
    return bytes([kind << 4 | size & 15]) if size < 16 else bytes([0x80 | kind << 4 | size & 15]) + number(size >> 4)


def plain(kind, content, size=None):
    return head(kind, len(content) if size is None else size) + zlib.compress(content)


def by_place(distance, delta, size=None):
    back = [distance & 0x7F]
    while distance := distance >> 7:
        distance -= 1
        back.insert(0, distance & 0x7F | 0x80)
    return head(DELTA_BY_PLACE, len(delta) if size is None else size) + bytes(back) + zlib.compress(delta)


def by_name(base, delta):
    return head(DELTA_BY_NAME, len(delta)) + bytes.fromhex(base) + zlib.compress(delta)


def copy(begin, length):
    """An instruction that copies, with all its bytes."""
    return b"\xff" + begin.to_bytes(4, "little") + length.to_bytes(3, "little")


def insert(content):
    return b"".join(bytes([len(part)]) + part for part in (content[at : at + 127] for at in range(0, len(content), 127)))


def delta_of(base_size, size, *instructions):
    return number(base_size) + number(size) + b"".join(instructions)


def delta_to(old, new):
    """A delta from one text to another that begins as it does."""
    same = next((at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    return delta_of(len(old), len(new), copy(0, same), insert(new[same:].encode()))


def name_of(content, kind=b"blob"):
    return hashlib.sha1(b"%s %d\0" % (kind, len(content)) + content).hexdigest()


def write_pack(objects, names, entries, places=None, moved=None, far=False):
    """A pack of `entries`, bytes or what gives them for their place, and its index; `places` gets where each begins. `moved`
    says where the index claims that some begin; `far` puts all offsets into the table of long ones."""
    places, checks = {} if places is None else places, {}
    pack = b"PACK" + struct.pack(">II", 2, len(entries))
    for at, entry in enumerate(entries):
        places[at] = len(pack)
        pack += entry(len(pack)) if callable(entry) else entry
        checks[at] = zlib.crc32(pack[places[at] :])
    pack += hashlib.sha1(pack).digest()
    rows = sorted((bytes.fromhex(name), (moved or {}).get(at, places[at]), checks[at]) for at, name in enumerate(names))
    fan = [sum(name[0] <= first for name, *_ in rows) for first in range(256)]
    index = b"\xfftOc" + struct.pack(">I256I", 2, *fan) + b"".join(name for name, *_ in rows)
    index += b"".join(struct.pack(">I", check) for *_, check in rows)
    if far:
        index += b"".join(struct.pack(">I", 1 << 31 | at) for at in range(len(rows)))
        index += b"".join(struct.pack(">q", place) for _, place, _ in rows)
    else:
        index += b"".join(struct.pack(">I", place) for _, place, _ in rows)
    index += pack[-20:]
    index += hashlib.sha1(index).digest()
    (objects / "pack").mkdir(parents=True, exist_ok=True)
    (objects / "pack" / "pack-x.pack").write_bytes(pack)
    (objects / "pack" / "pack-x.idx").write_bytes(index)


BASE = words(3).encode()
GOOD, BAD = name_of(BASE), name_of(b"whatever")
SHORT = delta_of(len(BASE), 4, copy(0, 4))
ENEMIES = {
    "a delta on itself": [by_name(BAD, SHORT)],
    "a delta on itself, by place": [by_place(0, SHORT)],
    "a base before the pack": [by_place(4000, SHORT)],
    "a base inside an object": [lambda at: by_place(at - 13, SHORT)],
    "a base that is nowhere": [by_name("ab" * 20, SHORT)],
    "an endless distance": [head(6, 9) + b"\xff" * 40 + zlib.compress(SHORT)],
    "a base of another size": [lambda at: by_place(at - 12, delta_of(len(BASE) + 1, 4, copy(0, 4)))],
    "a copy beyond the base": [lambda at: by_place(at - 12, delta_of(len(BASE), 400, copy(len(BASE) - 100, 400)))],
    "a copy from beyond the base": [lambda at: by_place(at - 12, delta_of(len(BASE), 4, copy(2**32 - 1, 4)))],
    "less than it says": [lambda at: by_place(at - 12, delta_of(len(BASE), 5, copy(0, 4)))],
    "more than it says": [lambda at: by_place(at - 12, delta_of(len(BASE), 3, copy(0, 4)))],
    "an instruction that is none": [lambda at: by_place(at - 12, delta_of(len(BASE), 0, b"\0"))],
    "an instruction that is cut off": [lambda at: by_place(at - 12, delta_of(len(BASE), 4, b"\xff\0\0"))],
    "an insertion that is cut off": [lambda at: by_place(at - 12, delta_of(len(BASE), 9, b"\x09abc"))],
    "a delta that is empty": [lambda at: by_place(at - 12, b"")],
    "a delta of another size": [lambda at: by_place(at - 12, SHORT, len(SHORT) + 1)],
    "a size that has no end": [b"\xbf" + b"\xff" * 4000],
    "a size that is cut off": [b"\xbf"],
    "a kind that is none": [plain(5, b"whatever")],
    "a kind that is reserved": [plain(0, b"whatever")],
    "a smaller size": [plain(BLOB, b"whatever", 7)],
    "a larger size": [plain(BLOB, b"whatever", 9)],
    "not deflated": [head(BLOB, 8) + b"whatever"],
    "something behind it": [plain(BLOB, b"whatever") + b"!"],
    "nothing at all": [b""],
    "another content": [plain(BLOB, b"whatsoever")],
    "another kind": [plain(1, b"whatever")],
    "a huge size": [plain(BLOB, b"whatever", 2**59)],
}


@pytest.mark.parametrize("enemy", ENEMIES)
def test_a_hostile_entry_is_no_object(tmp_path, enemy, monkeypatch):
    monkeypatch.setattr(git_batch, "PATIENCE", 0.5)  # git thinks forever over some of them
    git(tmp_path, "init", "--quiet", "--bare", "hostile.git")
    objects = tmp_path / "hostile.git" / "objects"
    write_pack(objects, [GOOD, BAD, name_of(b"last")], [plain(BLOB, BASE), *ENEMIES[enemy], plain(BLOB, b"last")])
    packed = PackedObjects([objects])
    assert packed.holds(BAD)
    assert packed.read(BAD, MOST) is None
    assert packed.read(GOOD, MOST) == ("blob", BASE)
    packed.close()
    if enemy != "something behind it":  # git does not mind
        with ObjectReader(objects.parent) as reader, pytest.raises(GenomeCorrupt, match="git object"):
            list(reader.objects([BAD], MOST))
    with ObjectReader(objects.parent) as reader:
        assert next(reader.objects([GOOD], MOST)).content == BASE


def test_deltas_that_stand_on_each_other_end(tmp_path, monkeypatch):
    monkeypatch.setattr(git_batch, "PATIENCE", 0.5)
    git(tmp_path, "init", "--quiet", "--bare", "hostile.git")
    objects = tmp_path / "hostile.git" / "objects"
    write_pack(objects, [GOOD, BAD], [by_name(BAD, SHORT), by_name(GOOD, SHORT)])
    packed = PackedObjects([objects])
    assert packed.read(BAD, MOST) is packed.read(GOOD, MOST) is None
    with ObjectReader(objects.parent) as reader, pytest.raises(GenomeCorrupt, match=r"says nothing for 0\.5 seconds"):
        list(reader.objects([BAD], MOST))


def chain(length):
    """Texts of which each is the one before and a line more; (names, entries), each a delta on the one before."""
    texts = [BASE]
    for turn in range(length):
        texts.append(texts[-1] + b"%d\n" % turn)
    places = {}

    def entry(at):
        told = delta_to(texts[at - 1].decode(), texts[at].decode())
        return lambda place: by_place(place - places[at - 1], told)

    entries = [plain(BLOB, BASE), *(entry(at) for at in range(1, length + 1))]
    return texts, entries, places


def test_a_long_chain_is_followed_and_a_longer_one_is_gits(tmp_path):
    git(tmp_path, "init", "--quiet", "--bare", "deep.git")
    objects = tmp_path / "deep.git" / "objects"
    texts, entries, places = chain(400)
    names = [name_of(text) for text in texts]
    write_pack(objects, names, entries, places)
    first = PackedObjects([objects])
    assert first.read(names[git_packs.DEEPEST], MOST) == ("blob", texts[git_packs.DEEPEST])
    assert PackedObjects([objects]).read(names[400], MOST) is None
    assert first.read(names[400], MOST) == ("blob", texts[400])  # from a base that is known
    with ObjectReader(objects.parent) as reader:
        assert [each.content for each in reader.objects(reversed(names), MOST)] == texts[::-1]


def test_a_bomb_is_left_before_it_is_large(tmp_path):
    git(tmp_path, "init", "--quiet", "--bare", "bomb.git")
    objects = tmp_path / "bomb.git" / "objects"
    zeros = bytes(60_000_000)
    names = [name_of(b"%d" % number) for number in range(5)]
    entries = [
        plain(BLOB, bytes(1000)),
        plain(BLOB, zeros, 10),
        plain(BLOB, zeros),
        lambda at: by_place(at - 12, delta_of(1000, 600_000_000, *[copy(0, 1000)] * 600_000)),
        lambda at: by_place(at - 12, delta_of(1000, 400_000_000, *[copy(0, 1000)] * 60)),
    ]
    write_pack(objects, names, entries)
    del zeros, entries
    packed = PackedObjects([objects])
    tracemalloc.start()
    assert all(packed.read(name, 100_000) is None for name in names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_the_work_of_deltas_is_bounded(tmp_path):
    objects = tmp_path / "objects"
    stutter = delta_of(len(BASE), 700_000, *[b"\x90\x01"] * 700_000)  # a byte at a time
    text = BASE[:1] * 700_000
    again = delta_of(700_000, 700_000, *[b"\x90\x01"] * 700_000)
    write_pack(
        objects,
        [GOOD, name_of(text), BAD],
        [plain(BLOB, BASE), lambda at: by_place(at - 12, stutter), by_name(name_of(text), again)],
    )
    packed = PackedObjects([objects])
    assert packed.read(BAD, 2 * MOST) is None  # two of them together are too much
    assert packed.read(name_of(text), 2 * MOST) == ("blob", text)


def test_long_offsets_are_followed_and_wrong_ones_are_no_index(tmp_path):
    names, entries = [GOOD, name_of(b"b")], [plain(BLOB, BASE), plain(BLOB, b"b")]
    write_pack(tmp_path, names, entries, far=True)
    assert PackedObjects([tmp_path]).read(names[1], MOST) == ("blob", b"b")
    for place in (0, 11, -1, -(2**63), 2**63 - 1, 10_000):
        write_pack(tmp_path, names, entries, moved={1: place}, far=True)
        assert not PackedObjects([tmp_path]).holds(GOOD)
    for place in (0, 11, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        write_pack(tmp_path, names, entries, moved={1: place})
        assert not PackedObjects([tmp_path]).holds(GOOD)
    write_pack(tmp_path, names, entries, moved={1: 12})  # two names for one place
    packed = PackedObjects([tmp_path])
    assert packed.read(names[1], MOST) is packed.read(GOOD, MOST) is None


# deltas ---------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_a_delta_gives_what_its_instructions_say(data):
    base = data.draw(st.binary(max_size=300))
    copies = st.integers(0, max(0, len(base) - 1)).flatmap(
        lambda begin: st.tuples(st.just(begin), st.integers(1, max(1, len(base) - begin)))
    )
    steps = data.draw(st.lists(copies if base else st.nothing() | st.binary(min_size=1, max_size=127), max_size=8))
    steps += data.draw(st.lists(st.binary(min_size=1, max_size=127), max_size=8))
    result = b"".join(step if isinstance(step, bytes) else base[step[0] : step[0] + step[1]] for step in steps)
    written = [insert(step) if isinstance(step, bytes) else shortest(*step) for step in steps]
    delta = delta_of(len(base), len(result), *written)
    assert patched(base, delta, len(result)) == result
    if result:
        with pytest.raises(Misfit):
            patched(base, delta, len(result) - 1)
    for end in range(len(delta)):
        with pytest.raises(Misfit):
            patched(base, delta[:end], MOST)
    place = data.draw(st.integers(0, len(delta) - 1))
    changed = delta[:place] + bytes([delta[place] ^ data.draw(st.integers(1, 255))]) + delta[place + 1 :]
    with suppress(Misfit):
        assert len(patched(base, changed, MOST)) <= MOST


def shortest(begin, length):
    """An instruction that copies, without the bytes that are zero."""
    told, out = 0x80, b""
    for bit, byte in enumerate(begin.to_bytes(4, "little") + length.to_bytes(3, "little")):
        if byte:
            told |= 1 << bit
            out += bytes([byte])
    return bytes([told]) + out


def test_a_copy_without_a_length_is_64_kib():
    base = bytes(range(256)) * 300
    assert patched(base, delta_of(len(base), 0x10000, b"\x82\x01"), MOST) == base[256 : 256 + 0x10000]
    with pytest.raises(Misfit, match="beyond"):
        patched(base, delta_of(len(base), 0x10000, b"\x82\xf0"), MOST)
