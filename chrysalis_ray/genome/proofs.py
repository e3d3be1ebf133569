"""Inclusion proofs of RFC 6962, section 2.1.1: a handful of hashes that show a document to be in a genome, to somebody who
knows nothing of it but the Merkle root."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome.sealing import leaf_hash


def audit_path(leaves: Sequence[bytes], index: int) -> list[str]:
    """The hex hashes that lead from leaf `index` to the root, the nearest first; log2 of the number of leaves at most."""
    if not 0 <= index < len(leaves):
        raise ValueError(f"there are {len(leaves)} leaves, none of number {index}")
    path = []
    level, at = list(leaves), index
    while len(level) > 1:
        sibling = at ^ 1
        if sibling < len(level):
            path.append(level[sibling].hex())
        level = [_node(level[left : left + 2]) for left in range(0, len(level), 2)]
        at //= 2
    return path


def _node(children: Sequence[bytes]) -> bytes:
    """An odd last node rises as it is."""
    return children[0] if len(children) == 1 else hashlib.sha256(b"\1" + children[0] + children[1]).digest()


def root_of_path(leaf: bytes, index: int, size: int, path: Sequence[str]) -> str | None:
    """The hex root that `path` leads to from `leaf`, number `index` of `size` (RFC 9162, 2.1.3.2); None where a path of this
    length cannot be one."""
    if not 0 <= index < size:
        return None
    at, last, reached = index, size - 1, leaf
    for step in path:
        if last == 0:
            return None
        sibling = bytes.fromhex(step)
        if at % 2 or at == last:
            reached = hashlib.sha256(b"\1" + sibling + reached).digest()
            while at % 2 == 0 and at:
                at, last = at // 2, last // 2
        else:
            reached = hashlib.sha256(b"\1" + reached + sibling).digest()
        at, last = at // 2, last // 2
    return reached.hex() if last == 0 else None


def prove(rows: Sequence[Mapping[str, Any]], doc_id: str) -> dict[str, Any]:
    """A self-contained proof that the document is one of the manifest's `rows`. Raises GenomeError when it is not."""
    index = next((number for number, row in enumerate(rows) if row["doc_id"] == doc_id), None)
    if index is None:
        raise GenomeError(f"the genome has no document {doc_id}", "`chrysalis genome show` finds documents by id or path")
    leaves = [leaf_hash(row["path"], row["doc_id"], row["bytes"]) for row in rows]
    row = rows[index]
    named = {"path": row["path"], "doc_id": doc_id, "bytes": row["bytes"]}
    return {**named, "index": index, "size": len(rows), "audit_path": audit_path(leaves, index)}


def is_proof(proof: Mapping[str, Any], merkle_root: str) -> bool:
    """Whether `proof` (of `prove`) shows that a document of this path, sha256 and size is in the genome of that root."""
    leaf = leaf_hash(proof["path"], proof["doc_id"], proof["bytes"])
    return root_of_path(leaf, proof["index"], proof["size"], proof["audit_path"]) == merkle_root
