"""The Ray cluster of a run: one that is up already, or one on this machine that ends with the run."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray would run its workers at nice 15: whatever else this machine does would starve the run.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray

from rlpost.config import RecipeError
from rlpost.workers.orphans import ended_with_this_process

CONNECT_LIMIT_S = 5.0
# That Ray's token authentication is on asks nothing of anyone.
logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


@contextlib.contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Join the cluster at `address`, or start one on this machine that ends with the run.

    Raises:
        RecipeError: when the recipe names a cluster that does not answer.
    """
    with contextlib.ExitStack() as cleanup:
        if address is not None:
            check_answers(address)
            try:
                ray.init(address=address, log_to_driver=False)
            except ConnectionError as error:
                raise _no_cluster(address, error) from error
        else:
            # Not one that RAY_ADDRESS, or another run on this machine, has left.
            try:
                ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
            except SystemExit:  # Ray's own answer to SIGTERM
                raise KeyboardInterrupt from None
            cleanup.enter_context(ended_with_this_process())
        cleanup.callback(ray.shutdown)
        yield


def check_answers(address: str) -> None:
    """Raise RecipeError unless somebody answers at `address`: Ray itself would wait for minutes, deaf to signals."""
    url = urlsplit(address if "//" in address else f"//{address}")
    if url.hostname is None or url.port is None:
        return  # such as "auto", for which Ray looks at this machine
    try:
        socket.create_connection((url.hostname, url.port), timeout=CONNECT_LIMIT_S).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> RecipeError:
    return RecipeError(
        f"ray_address = {address!r} does not answer ({error}): start it (ray start --head), open the port, or leave"
        " ray_address out to use this machine alone"
    )
