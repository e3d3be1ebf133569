"""The eight domains of this machine's own Python."""

import io
import subprocess
import sys
import tokenize
from collections import Counter

import pytest

from chrysalis_ray.config.experiment import PYTHON_DOMAINS, PythonSource
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome.documents import pieces
from chrysalis_ray.genome.sources import python_text
from chrysalis_ray.genome.sources.python_text import comments_of, library_files, library_root, read_python


def read(domain: str, megabytes: float = 0.05) -> list:
    return list(read_python(PythonSource(type="python", domains=(domain,), max_megabytes=megabytes), Counter()))


@pytest.mark.parametrize("domain", PYTHON_DOMAINS)
def test_a_domain_fills_its_cap_with_many_sources_and_never_passes_it(domain):
    documents = read(domain)
    total = sum(document.size for document in documents)
    assert 45_000 < total <= 50_000
    assert len({document.source_key for document in documents}) >= 6
    assert {document.domain for document in documents} == {domain}
    assert {document.licence for document in documents} == {"PSF-2.0"}


def test_reading_does_not_depend_on_the_hash_seed():
    program = (
        "import hashlib, sys; from collections import Counter;"
        "from chrysalis_ray.config.experiment import PythonSource;"
        "from chrysalis_ray.genome.sources.python_text import read_python;"
        "source = PythonSource(type='python', domains=('bytecode', 'api_docs', 'docstrings'), max_megabytes=0.03);"
        "print(hashlib.sha256(repr([(d.path, d.doc_id) for d in read_python(source, Counter())]).encode()).hexdigest())"
    )
    seen = {
        subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_documents_of_one_file_share_its_key():
    keys = {domain: {document.source_key for document in read(domain)} for domain in ("code", "docstrings", "bytecode")}
    assert keys["code"] & keys["docstrings"] & keys["bytecode"]


def test_comments_are_those_that_tokenize_finds():
    checked = 0
    for name in library_files()[:60]:
        try:
            text = (library_root() / name).read_text(encoding="utf-8")
            tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        except (UnicodeDecodeError, SyntaxError, tokenize.TokenError):
            continue
        expected = [token.string.lstrip("#").strip() for token in tokens if token.type == tokenize.COMMENT]
        assert [line for line in comments_of(text).split("\n") if line] == [line for line in expected if line], name
        checked += 1
    assert checked > 40


def test_disassembly_names_no_address():
    code = compile("def f(x):\n  def g(): return x\n  return x in {'b', 'a', ('c', 1)}\n", "f.py", "exec")
    text = python_text.disassembly(next(c for c in code.co_consts if hasattr(c, "co_code")))
    assert " at 0x" not in text
    assert "frozenset({'a', 'b', ('c', 1)})" in text


def test_a_cap_below_the_smallest_document_is_an_error():
    with pytest.raises(GenomeError, match="'code' within 1 bytes"):
        read("code", 1e-6)


def test_pieces_lose_nothing_and_keep_the_limit():
    text = "".join(f"def f{i}():\n    return {i}\n\n\n" for i in range(200))
    found = pieces(text, 300)
    assert "".join(found) == text
    assert max(map(len, found)) <= 300
    assert all(piece.startswith("def") for piece in found)
    assert pieces("", 10) == []
