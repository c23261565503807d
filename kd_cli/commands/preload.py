"""torch's libraries, loaded while something else is done: on a second core, as Python's own import cannot."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
from pathlib import Path

__all__ = ["preload_torch"]

# In the order in which torch loads them, and as openly: the symbols of the first are for all.
LIBRARIES = (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch_cpu.so", os.RTLD_LOCAL))


def preload_torch() -> threading.Thread | None:
    """Start to load torch's shared libraries; `import torch` then finds them loaded, or waits for the rest.

    None where that is not known to help. A library that does not load is left to `import torch`, which says why.
    """
    if sys.platform != "linux" or "torch" in sys.modules or (os.cpu_count() or 1) < 2:
        return None
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0], "lib")
    if not all((folder / name).is_file() for name, _ in LIBRARIES):
        return None
    dlopen = ctypes.CDLL(None).dlopen  # ctypes.CDLL(path) would hold the interpreter while it loads
    dlopen.restype, dlopen.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]

    def load() -> None:
        for name, openly in LIBRARIES:
            if not dlopen(os.fsencode(folder / name), os.RTLD_NOW | openly):
                return

    thread = threading.Thread(target=load, name="preload torch")  # no daemon: a process must not end within dlopen
    thread.start()
    return thread
