"""Who holds which block and which state slot, and what computed tokens can be found again.

Plain integers; the memory that they stand for is in `model/state.py`. Which sequence runs when is
the scheduler's to say.
"""

from array import array
from hashlib import blake2b

from granite_ray.engine.pools import BlockPool, SlotPool
from granite_ray.engine.sequence import Sequence

DIGEST_BYTES = 16
"""Two different beginnings share a digest once in 2^64 blocks or so."""


class Cache:
    """The blocks of all sequences, and their state slots where the model has Mamba layers.

    A full block is known by the digest of all tokens up to its end. Once computed it can be
    found by that digest: sequences that begin alike share it, and what nobody holds stays until
    its memory is needed. Mamba state cannot be cut out of the middle, so a sequence of a model
    that has it starts only from a snapshot, taken at a junction, at a block's end.

    `restored` and `saved` are the copies between state slots of the step being scheduled.
    """

    def __init__(self, num_blocks: int, block_size: int, num_slots: int, has_state: bool) -> None:
        self.max_num_tokens = num_blocks * block_size
        self._block_size = block_size
        self._has_state = has_state
        self._blocks = BlockPool(num_blocks)
        self._slots = SlotPool(num_slots)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._blocks.num_free

    @property
    def num_free_slots(self) -> int:
        """State slots that no sequence holds, those of snapshots included."""
        return self._slots.num_free

    @property
    def restored(self) -> tuple[tuple[int, int], ...]:
        """Copies of snapshots to the sequences that start from them in this step."""
        return tuple(self._slots.restored)

    @property
    def saved(self) -> tuple[tuple[int, int], ...]:
        """Copies of sequences' states to snapshots, after this step's forward pass."""
        return tuple(self._slots.saved.values())

    def admit(self, sequence: Sequence, num_spare_blocks: int) -> bool:
        """Give a sequence a slot, and blocks for all its tokens: what is found, the rest new.

        Returns:
            Whether there was room; if not, nothing has changed. `num_spare_blocks` stay free.
        """
        found = self._find_beginning(sequence)
        num_new = self._num_missing_blocks(sequence) - len(found)
        if num_new + num_spare_blocks > self.num_free_blocks - self._blocks.count_free(found):
            return False
        if self._has_state:
            digest = self._digest(sequence, len(found)) if found else None
            slot = self._slots.start_from(digest)
            if slot is None:
                return False
            sequence.state_slot = slot
        for block_id in found:
            self._blocks.share(block_id)
        sequence.block_table = found + [self._blocks.take() for _ in range(num_new)]
        sequence.num_computed_tokens = len(found) * self._block_size
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Give a running sequence the blocks that its new tokens need; whether there were any."""
        num_missing = self._num_missing_blocks(sequence)
        if num_missing > self.num_free_blocks:
            return False
        for _ in range(num_missing):
            sequence.block_table.append(self._blocks.take())
        return True

    def stop_at_junction(self, sequence: Sequence, num_tokens: int) -> int:
        """Return how far a run of `num_tokens` may go: to the first junction that wants a snapshot.

        Where it stops, the snapshot is planned. None is wanted where there is one already, and
        none is taken where all slots are in use.
        """
        if not self._has_state:
            return num_tokens
        for num_blocks in self._junctions_ahead(sequence):
            distance = num_blocks * self._block_size - sequence.num_computed_tokens
            if distance > num_tokens:
                break
            if self._slots.save(sequence.state_slot, self._digest(sequence, num_blocks)):
                return distance
        return num_tokens

    def junctions_ahead(self, sequence: Sequence) -> list[bytes]:
        """Return the digests, up to each of its junctions, that a sequence has yet to compute."""
        return [self._digest(sequence, count) for count in self._junctions_ahead(sequence)]

    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        """Take note that a sequence's next tokens are computed; full blocks can now be found."""
        num_full = sequence.num_computed_tokens // self._block_size
        sequence.num_computed_tokens += num_tokens
        for index in range(num_full, sequence.num_computed_tokens // self._block_size):
            self._blocks.register(sequence.block_table[index], self._digest(sequence, index + 1))

    def end_step(self) -> None:
        """Take note that the step's copies are made; its snapshots can now be found."""
        self._slots.end_step()

    def give_up_step(self) -> None:
        """Take note that the step's copies were not made."""
        self._slots.give_up_step()

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's blocks and slot back; what was computed can still be found."""
        for block_id in reversed(sequence.block_table):  # a beginning outlives what follows it
            self._blocks.release(block_id)
        sequence.block_table = []
        if sequence.state_slot >= 0:
            self._slots.release(sequence.state_slot)
            sequence.state_slot = -1

    def _find_beginning(self, sequence: Sequence) -> list[int]:
        """Return the blocks of the longest computed beginning that a sequence can start from.

        Its last token is always left to compute: the logits after it are wanted.
        """
        found: list[int] = []
        num_usable = 0
        for index in range((len(sequence.token_ids) - 1) // self._block_size):
            digest = self._digest(sequence, index + 1)
            block_id = self._blocks.find(digest)
            if block_id is None:
                break
            found.append(block_id)
            if not self._has_state or self._slots.has_snapshot(digest):
                num_usable = len(found)
        return found[:num_usable]

    def _junctions_ahead(self, sequence: Sequence) -> list[int]:
        """Return the junctions not yet reached, each as the number of full blocks before it."""
        num_computed, junctions = sequence.num_computed_tokens, sequence.junctions
        if not junctions or num_computed >= junctions[-1]:  # as in every decode
            return []
        counts = [junction // self._block_size for junction in junctions]
        return [count for count in counts if count > num_computed // self._block_size]

    def _num_missing_blocks(self, sequence: Sequence) -> int:
        return -(-len(sequence.token_ids) // self._block_size) - len(sequence.block_table)

    def _digest(self, sequence: Sequence, num_blocks: int) -> bytes:
        """Return the digest of a sequence's first blocks, and remember it: tokens never change."""
        digests, size = sequence.block_digests, self._block_size
        while len(digests) < num_blocks:
            start = len(digests) * size
            token_ids = array("q", sequence.token_ids[start : start + size])
            assert len(token_ids) == size, "a junction lies behind the tokens that are known"
            parent = digests[-1] if digests else b""
            digests.append(blake2b(parent + token_ids.tobytes(), digest_size=DIGEST_BYTES).digest())
        return digests[num_blocks - 1]
