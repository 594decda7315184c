"""Seeds from names: the same rollout gets the same seed whoever serves it, whenever, resumed or not."""

from __future__ import annotations

from hashlib import blake2b


def derive_seed(*names: object) -> int:
    """A 63-bit seed that depends on every name and on their order.

    Example:
        derive_seed(run_seed, "math", 17, 3) is the seed of rollout 3 of the 17th prompt of stage "math".
    """
    digest = blake2b("\x1f".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
