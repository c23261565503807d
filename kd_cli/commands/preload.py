"""Load torch's shared libraries in a thread while Hydra composes, which Python's own import cannot do."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
from pathlib import Path

__all__ = ["preload_torch"]

# In torch's own order and with its flags: RTLD_GLOBAL makes the first one's symbols visible to the others.
LIBRARIES = (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch_cpu.so", os.RTLD_LOCAL))


def preload_torch() -> threading.Thread | None:
    """Start a thread that loads torch's shared libraries; a later `import torch` finds them loaded or waits for them.

    Return None where this does not help: outside Linux, on one core, or when torch is imported already. A library that
    fails to load is left to `import torch`, whose error says why.
    """
    if sys.platform != "linux" or "torch" in sys.modules or (os.cpu_count() or 1) < 2:
        return None
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0], "lib")
    if not all((folder / name).is_file() for name, _ in LIBRARIES):
        return None
    dlopen = ctypes.CDLL(None).dlopen  # ctypes.CDLL(path) holds the interpreter's lock while it loads
    dlopen.restype, dlopen.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]

    def load() -> None:
        for name, flags in LIBRARIES:
            if not dlopen(os.fsencode(folder / name), os.RTLD_NOW | flags):
                return

    thread = threading.Thread(target=load, name="preload torch")  # not a daemon: the process must not end inside dlopen
    thread.start()
    return thread
