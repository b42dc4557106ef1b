"""In the place of the processes in which experiments train: one run after the other, here. A process takes seconds
to import what is imported here already. tests/test_runs.py has the processes."""

from collections.abc import Callable
from concurrent.futures import Future


class InThisProcess:
    """What experiments/runs.py uses of ProcessPoolExecutor."""

    def __init__(self, *_):
        pass

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_) -> None:
        pass

    def shutdown(self, **_) -> None:
        pass

    def submit(self, call: Callable, *args) -> Future:
        done = Future()
        try:
            done.set_result(call(*args))
        except BaseException as e:
            done.set_exception(e)
        return done
