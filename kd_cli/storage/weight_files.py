"""Files of weights from anywhere, read without running code of theirs.

A file is read once: the bytes that are hashed are the bytes that are parsed. Its format is recognised by its content,
never by its name.
"""

from __future__ import annotations

import collections
import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_cli.errors import CheckpointError
from kd_cli.storage.files import checksum_of

SAVE = (
    "save the weights alone: safetensors.torch.save_file(model.state_dict(), FILE) or "
    "torch.save(model.state_dict(), FILE)"
)
FILLED = (  # what torch says of a class that it does not know, and of one that it knows as an object but fills
    (r"GLOBAL ([\w.]+) was not an allowed global", "object"),
    (r"Can only SETITEMS? for .* but got <class '([\w.]+)'>", "mapping"),
    (r"Can only (?:append|extend) .* but got <class '([\w.]+)'>", "list"),
)
ENOUGH_CLASSES = 1000  # names of unknown classes after which a file is given up
FORMATS = (  # what other programs write, by the first bytes
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for", "git lfs pull"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it", None),
    (b"\x1f\x8b", "compressed by gzip", "decompress it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"\x93NUMPY", "a NumPy array", None),
    (b"GGUF", "a GGUF file", None),
    (b"<", "a web page or XML", "download the file itself"),
    (b"{", "JSON text", None),
)

FOLDER = 0x10  # the attribute that marks a folder in a zip archive


class Inert:
    """Stands for an object of a class that a file names and that is not created: its data, without its code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return Inert(*args)

    def __setitem__(self, key: object, value: object) -> None:  # torch 2.6 fills what later versions refuse to fill
        raise TypeError(f"Can only SETITEM for dict, but got {type(self)}")

    def __eq__(self, other: object) -> bool:  # torch calls only what equals an allowed class
        return self is other or (isinstance(other, type) and issubclass(other, Inert))

    __hash__ = object.__hash__

    def data(self) -> dict[Any, Any]:
        """Its attributes; of a module, its parameters, buffers and modules by name."""
        state = getattr(self, "state", None)  # which is set without a call of __init__
        found = dict(state) if isinstance(state, Mapping) else {}
        if isinstance(found.get("_parameters"), Mapping) and isinstance(found.get("_modules"), Mapping):
            unsaved = found.get("_non_persistent_buffers_set")
            buffers = found.get("_buffers") or {}
            kept = {
                name: value for name, value in buffers.items() if not isinstance(unsaved, set) or name not in unsaved
            }
            return {**found["_parameters"], **kept, **found["_modules"]}
        return found


@dataclass(frozen=True)
class WeightFile:
    """The tensors of a file by dotted names, such as `state_dict.conv1.weight`, which stands under `state_dict`."""

    path: Path
    checksum: str
    tensors: dict[str, Any]
    homes: dict[str, str]  # the dotted name of the mapping that holds a tensor, by the tensor's name
    keys: tuple[str, ...]  # the names at its top, for messages
    not_read: tuple[str, ...]  # names of classes whose objects were not created


def read_weight_file(path: Path) -> WeightFile:
    """Read a file of weights. CheckpointError when it is unreadable, damaged or of another kind."""
    path = path.expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    unknown: list[str] = []
    if is_safetensors(content):
        tree = _read_safetensors(path, content)
    else:
        _refuse_other_formats(path, content)
        tree, unknown = _read_torch(path, content)
    keys = tree.data() if isinstance(tree, Inert) else tree if isinstance(tree, Mapping) else {}
    found = list(_tensors(tree))
    tensors, homes = {name: tensor for name, tensor, _ in found}, {name: home for name, _, home in found}
    return WeightFile(path, checksum_of(content), tensors, homes, tuple(map(str, keys)), tuple(unknown))


def is_safetensors(content: bytes) -> bool:
    """Whether the bytes begin as a safetensors file does: the length of a header, and the header, which is JSON."""
    length = int.from_bytes(content[:8], "little")
    return len(content) > 8 and content[8:9] == b"{" and length < 100 << 20


def _read_safetensors(path: Path, content: bytes) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read as weights: a damaged safetensors file: {str(error).splitlines()[0]}",
            hint="copy or download it again",
        ) from error


def _refuse_other_formats(path: Path, content: bytes) -> None:
    """CheckpointError for what is plainly no file of torch.save."""
    if not content.strip(b"\0"):
        raise CheckpointError(f"{path} cannot be read as weights: it is empty", hint="copy or download it again")
    for start, kind, hint in FORMATS:
        if content.lstrip()[: len(start)].lower() == start.lower():
            raise CheckpointError(f"{path} cannot be read as weights: it is {kind}", hint=hint or SAVE)


def _read_torch(path: Path, content: bytes) -> tuple[Any, list[str]]:
    """What torch.save wrote; objects of unknown classes become `Inert`, whose classes are named beside it."""
    zipped = content[:2] == b"PK"
    if zipped:
        _check_archive(path, content)
    import torch

    unknown: dict[str, str] = {}
    try:
        if zipped:
            found = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
            unknown = dict.fromkeys(found, "object")
        return _load(content, unknown), sorted(unknown)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as weights: {_reason(error, zipped)}", hint=SAVE) from error


def _load(content: bytes, unknown: dict[str, str]) -> Any:
    """torch.load with classes without code for the unknown ones, which are added to `unknown` as they are found.

    What they are, an object, a mapping or a list, shows when torch fills them.
    """
    import torch

    while True:
        stubs: list[Any] = [_inert(name, kind) for name, kind in unknown.items()]
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(stubs):
                warnings.simplefilter("ignore")  # of torch, on files of old versions
                return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:
            for pattern, kind in FILLED:
                found = re.search(pattern, str(error))
                if found is not None and unknown.get(found[1]) != kind and len(unknown) < ENOUGH_CLASSES:
                    unknown[found[1]] = kind
                    break
            else:
                raise


def _inert(name: str, kind: str) -> type:
    """A class without code that torch takes for the class of this name."""
    module, _, own = name.rpartition(".")
    if kind == "object":
        return type(own, (Inert,), {"__module__": module or "builtins"})
    filled: type = {"mapping": collections.OrderedDict, "list": list}[kind]
    return type(own, (), {"__module__": module or "builtins", "__new__": lambda cls, *args: filled()})


def _reason(error: Exception, zipped: bool) -> str:
    """Why torch could not read a file, in words for its user."""
    text = str(error)
    if (blocked := re.search(r"unsupported GLOBAL ([\w.]+)", text)) is not None:
        return f"it names {blocked[1]}, which no file of weights needs"
    if "Unsupported operand" in text:
        return "it is a pickle of a protocol that torch does not read without running code"
    if zipped and "WeightsUnpickler error" in text:
        return "it holds objects that torch does not read without running code"
    return "it is damaged, or no file of torch.save"


def _check_archive(path: Path, content: bytes) -> None:
    """Compare the archive's checksums, which torch.load does not. CheckpointError for damage and foreign archives."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
            # torch.serialization.set_crc32_options(False) writes zeros in place of checksums
            damaged = archive.testzip() if any(info.CRC for info in archive.infolist()) else None
            # torch.load leaves the memory of a tensor as it is where the archive calls its file a folder
            folders = [info.filename for info in archive.infolist() if info.file_size and info.external_attr & FOLDER]
    except Exception as error:  # whatever zipfile and its decoders make of damaged bytes
        raise CheckpointError(
            f"{path} cannot be read as weights: it is damaged: {_plain(error)}",
            hint="copy or download it again; the file may be cut off",
        ) from error
    if damaged is not None:
        raise CheckpointError(
            f"{path} cannot be read as weights: it is damaged: {damaged} in it does not have its checksum",
            hint="copy or download it again",
        )
    if folders:
        raise CheckpointError(
            f"{path} cannot be read as weights: it is damaged: {folders[0]} in it is marked as a folder",
            hint="copy or download it again",
        )
    if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path} cannot be read as weights: it is a TorchScript program",
            hint="torch.save(torch.jit.load(FILE).state_dict(), NEW) makes a file of its weights",
        )
    if not any(name.endswith("data.pkl") for name in names):
        kind = "NumPy arrays" if all(name.endswith(".npy") for name in names) else f"{', '.join(names[:3])}"
        raise CheckpointError(f"{path} cannot be read as weights: it is a zip archive of {kind}", hint=SAVE)


def _tensors(tree: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any, str]]:
    """All tensors in nested mappings: keys joined with dots, the tensor, and the name of the mapping it is in."""
    from torch import Tensor

    if isinstance(tree, Inert):
        tree = tree.data()
    if not isinstance(tree, Mapping) or depth > 32:
        return
    for key, value in tree.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Tensor):
            yield name, value.detach(), path
        else:
            yield from _tensors(value, name, depth + 1)


def _plain(error: BaseException) -> str:
    """The first sentence of an error without terminal colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)) or type(error).__name__
    return json.dumps(text.strip().splitlines()[0], ensure_ascii=False)[1:-1]
