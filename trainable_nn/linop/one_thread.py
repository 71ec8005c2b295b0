"""numpy's BLAS on one thread, for the products and factors of a proof.

A proof is hundreds of products of a few milliseconds. OpenBLAS's threads spin while they wait for each other, so where cores are
busy such a product took twenty times its own work.
"""

import functools
from collections.abc import Callable

import numpy  # noqa: F401, whose BLAS must be there before the controller looks for it
from threadpoolctl import ThreadpoolController


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def one_thread(f: Callable) -> Callable:
    """f, with numpy's BLAS on one thread while it runs; torch's own threads are left alone."""

    @functools.wraps(f)
    def limited(*arguments, **options):
        with _controller().limit(limits=1, user_api="blas"):
            return f(*arguments, **options)

    return limited
