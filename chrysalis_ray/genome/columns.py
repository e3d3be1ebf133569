"""Arrow columns from Python's strings, by their bytes. `pyarrow.array` of a list does the same, but imports pandas first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def strings(values: Sequence[str]) -> pa.StringArray:
    """A column of short texts, together less than 2 GiB."""
    contents = [value.encode() for value in values]
    return pa.StringArray.from_buffers(len(contents), *_buffers(contents, np.int32))


def texts(values: Sequence[str]) -> pa.LargeStringArray:
    """A column of texts of any length."""
    contents = [value.encode() for value in values]
    return pa.LargeStringArray.from_buffers(len(contents), *_buffers(contents, np.int64))


def digests(values: Sequence[bytes], size: int) -> pa.FixedSizeBinaryArray:
    """A column of values of `size` bytes each."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(values), [None, pa.py_buffer(b"".join(values))])


def _buffers(contents: Sequence[bytes], offsets: type[np.signedinteger]) -> tuple[pa.Buffer, pa.Buffer]:
    ends = np.cumsum([0, *(len(content) for content in contents)], dtype=np.int64)
    return pa.py_buffer(ends.astype(offsets)), pa.py_buffer(b"".join(contents))
