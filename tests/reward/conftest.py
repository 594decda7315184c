"""One pool for the whole package: its fork servers start once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reward import RewardPool, TaskLimits


@pytest.fixture(scope="session")
def pool() -> Iterator[RewardPool]:
    with RewardPool(math=TaskLimits(deadline_s=10.0), code=TaskLimits(deadline_s=10.0)) as shared:
        yield shared


@pytest.fixture(scope="session")
def hasty_pool() -> Iterator[RewardPool]:
    with RewardPool(math=TaskLimits(deadline_s=1.0), code=TaskLimits(deadline_s=1.0)) as shared:
        yield shared
