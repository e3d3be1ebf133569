"""What rows of tokens have been seen so far: keys and values of every layer, so that a token more costs a token.

Rows of unlike lengths stand flush right: what fills them up at the left is a document of its own, whose tokens see each other
and are seen by nobody else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Past:
    """The tokens of N rows that a trunk has seen; `filling_N` of each, from the left, only fill it up."""

    def __init__(self, filling_N: Tensor) -> None:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache()  # of no config: layers with a window get whole rows, which `Trunk` keeps within it
        self.filling_N = filling_N
        self.length = 0

    def positions(self, count: int) -> Tensor:
        """The positions [N, count] of the next tokens, each within its document."""
        place_T = torch.arange(self.length, self.length + count, device=self.filling_N.device)
        filling_N1 = self.filling_N[:, None]
        return torch.where(place_T < filling_N1, place_T, place_T - filling_N1)

    def see(self, count: int) -> Tensor:
        """Whom `count` more tokens may look at, bool [N, 1, count, all so far and they]; they are counted from now on."""
        whole, filling_N11 = self.length + count, self.filling_N[:, None, None]
        query_T1 = torch.arange(self.length, whole, device=self.filling_N.device)[:, None]
        key_1L = torch.arange(whole, device=self.filling_N.device)[None]
        self.length = whole
        same = (key_1L >= filling_N11) | (query_T1 < filling_N11)
        return (same & (key_1L <= query_T1))[:, None]
