"""What a call leaves for its caller on a module that threads share."""

import threading
import weakref
from typing import Any


class OfThread(threading.local):
    def __init__(self):
        self.values: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by module


class PerThread:
    """An attribute with a value of its own in each thread; copies of an object begin without one."""

    def __init__(self):
        self.here = OfThread()

    def __get__(self, module: Any, kind: type | None = None) -> Any:
        if module not in self.here.values:
            raise AttributeError("this thread has made no forward pass")
        return self.here.values[module]

    def __set__(self, module: Any, value: Any) -> None:
        self.here.values[module] = value
