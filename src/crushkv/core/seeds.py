"""Seeds that differ where draws have to differ, and are the same in every engine."""


def layer_seed(seed: int, layer: int, seen: int) -> int:
    """The seed of one eviction in one layer, given how many tokens the row has seen."""
    return ((seed * 1_000_003 + layer) * 1_000_003 + seen) % 2**63
