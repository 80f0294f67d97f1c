"""Who holds which pages of the KV pool. A page is `page_tokens` slots of every head in every layer's cache.

Which pages a request has is the same in all layers, and pages are alike: any free one will do, so nothing fragments.
Neighbours are preferred, because what lies in neighbouring pages is read at once.
"""

from collections.abc import Hashable

import numpy as np
import numpy.typing as npt


class KVPool:
    """`pages` pages; each is free or held by one owner."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self._free = np.ones(pages, np.bool_)
        self._held: dict[Hashable, npt.NDArray[np.int64]] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return int(self._free.sum())

    def pages_for(self, slots: int) -> int:
        """Pages that hold so many slots."""
        return -(-slots // self.page_tokens)

    def holds(self, owner: Hashable) -> bool:
        """Whether the owner was given pages, be it none, and has not released them."""
        return owner in self._held

    def held(self, owner: Hashable) -> npt.NDArray[np.int64]:
        """The owner's pages, in the order of its slots."""
        return self._held[owner]

    def hold(self, owner: Hashable, slots: int) -> None:
        """Give an owner, who holds none, pages for so many slots. Raises `ValueError` where too few are free."""
        count = self.pages_for(slots)
        if owner in self._held or count > self.free:
            raise ValueError(f"{count} pages for {owner!r}: {self.free} are free, or it holds some already")
        pages = self._neighbours(count)
        self._free[pages] = False
        self._held[owner] = pages

    def release(self, owner: Hashable) -> None:
        """Take back all that the owner holds, if anything."""
        pages = self._held.pop(owner, None)
        if pages is not None:
            self._free[pages] = True

    def _neighbours(self, count: int) -> npt.NDArray[np.int64]:
        """Free pages: of the shortest run of neighbours that is long enough, else of the longest runs."""
        edges = np.flatnonzero(np.diff(np.concatenate(([0], self._free.view(np.int8), [0]))))
        starts, ends = edges[::2], edges[1::2]
        lengths = ends - starts
        if count and (fitting := np.flatnonzero(lengths >= count)).size:
            first = starts[fitting[np.argmin(lengths[fitting])]]
            return np.arange(first, first + count, dtype=np.int64)
        longest = np.argsort(-lengths, kind="stable")
        chosen = [np.arange(starts[run], ends[run], dtype=np.int64) for run in longest]
        return np.concatenate([*chosen, np.zeros(0, np.int64)])[:count]
