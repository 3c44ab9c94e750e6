"""Everything that touches storage: the input snapshot, its rows, and the committed shards."""
