"""Blocks and state slots: which are free, which can be found by a digest, which goes next.

Knows no sequences; the cache hands these out to them.
"""

from collections import OrderedDict


class BlockPool:
    """Blocks with their number of holders. A free one can be found until it is taken anew."""

    def __init__(self, num_blocks: int) -> None:
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # free and found; next to be taken first
        self._num_holders = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._block_ids: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._kept)

    def count_free(self, block_ids: list[int]) -> int:
        """Count those of `block_ids` that nobody holds."""
        return sum(self._num_holders[block_id] == 0 for block_id in block_ids)

    def take(self) -> int:
        """Return a free block for new content: an empty one, or else the one longest unused."""
        if self._empty:
            block_id = self._empty.pop()
        else:
            block_id, _ = self._kept.popitem(last=False)
            self._forget(block_id)
        self._num_holders[block_id] = 1
        return block_id

    def share(self, block_id: int) -> None:
        """Add a holder to a block that was found."""
        if self._num_holders[block_id] == 0:
            del self._kept[block_id]
        self._num_holders[block_id] += 1

    def release(self, block_id: int) -> None:
        """Take a holder away."""
        self._num_holders[block_id] -= 1
        if self._num_holders[block_id]:
            return
        if self._digests[block_id] is None:
            self._empty.append(block_id)
        else:
            self._kept[block_id] = None

    def register(self, block_id: int, digest: bytes) -> None:
        """Let a computed block be found, unless another with the same content is."""
        if digest not in self._block_ids:
            self._block_ids[digest] = block_id
            self._digests[block_id] = digest

    def find(self, digest: bytes) -> int | None:
        """Return the block with this content."""
        return self._block_ids.get(digest)

    def _forget(self, block_id: int) -> None:
        digest = self._digests[block_id]
        assert digest is not None, "only blocks that can be found are kept"
        del self._block_ids[digest]
        self._digests[block_id] = None


class SlotPool:
    """State slots of running sequences and of snapshots; a sequence goes before a snapshot."""

    def __init__(self, num_slots: int) -> None:
        self.restored: list[tuple[int, int]] = []
        self.saved: dict[bytes, tuple[int, int]] = {}
        self._empty = list(range(num_slots - 1, -1, -1))
        self._snapshots: OrderedDict[bytes, int] = OrderedDict()  # longest unused first
        self._sources: set[bytes] = set()  # snapshots that this step copies

    @property
    def num_free(self) -> int:
        """Slots that hold nothing or a snapshot."""
        return len(self._empty) + len(self._snapshots) + len(self.saved)

    def has_snapshot(self, digest: bytes) -> bool:
        """Return whether the state after these tokens is kept."""
        return digest in self._snapshots

    def start_from(self, digest: bytes | None) -> int | None:
        """Return a slot, to be filled from the snapshot named, if any; None if all are in use.

        If the snapshot's own slot is the only one left, the sequence takes it over as it is.
        """
        if digest is None:
            return self._take()
        self._snapshots.move_to_end(digest)
        source, slot = self._snapshots[digest], self._take()
        if slot is not None and slot != source:
            self.restored.append((source, slot))
            self._sources.add(digest)
        return slot

    def save(self, slot: int, digest: bytes) -> bool:
        """Plan a snapshot of a slot; False where there is one already or no room."""
        if digest in self._snapshots or digest in self.saved:
            return False
        target = self._take()
        if target is None:
            return False
        self.saved[digest] = (slot, target)
        return True

    def end_step(self) -> None:
        """Let the step's snapshots be found."""
        for digest, (_, target) in self.saved.items():
            self._snapshots[digest] = target
        self.saved.clear()
        self.restored.clear()
        self._sources.clear()

    def give_up_step(self) -> None:
        """Forget the copies that were planned."""
        self._empty += [target for _, target in self.saved.values()]
        self.saved.clear()
        self.end_step()

    def release(self, slot: int) -> None:
        """Take a sequence's slot back."""
        self._empty.append(slot)

    def _take(self) -> int | None:
        """Return an empty slot, or that of the snapshot longest unused."""
        if self._empty:
            return self._empty.pop()
        oldest = next(iter(self._snapshots), None)
        # Those that this step copies are at the end: if the first is one of them, all are.
        if oldest is None or oldest in self._sources:
            return None
        return self._snapshots.pop(oldest)
