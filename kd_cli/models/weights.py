"""Fitting the tensors of a file to a model: the names under which they were saved, and what does not fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # names that torch's wrappers put in
AVERAGED = re.compile(r"(^|_)(ema|swa|shadow|averaged?)(_|$)")
COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")  # no weights: what programs count
AUXILIARY = ("aux", "aux1", "aux2", "AuxLogits", "aux_classifier")  # heads that help in training only
ABSURD = 1e12  # no weight of a network that was trained is so large


@dataclass
class Fit:
    """Tensors of a file under a model's names, and what can be said of them."""

    state: dict[str, Tensor]
    place: str = ""  # where in the file they are: `state_dict.module`
    problems: list[str] = field(default_factory=list)  # why they do not fit
    notes: list[str] = field(default_factory=list)  # what was chosen, left out or filled in
    matched: int = 0  # names of the model's that the file has


def fit_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    homes: Mapping[str, str] | None = None,
    key: str | None = None,
) -> Fit:
    """The tensors that fit the module best, under its names; `problems` is empty when they fit.

    `tensors` are those of a file by dotted names, `homes` the names of the mappings that hold them there. Prefixes of
    wrappers and of keys in the file are removed, and so is the prefix of a wrapper around the module. Of several places
    that fit, the teacher's comes first, then averaged (EMA) weights, then the one with the shortest name; `key` chooses
    another one: it is a part of a place's name.
    """
    own = module.state_dict()
    shared = _shared_names(module)
    clean = {_clean(name, own): tensor for name, tensor in tensors.items()}
    clean_homes = {_clean(name, own): home for name, home in (homes or {}).items()}
    fits: list[Fit] = []
    for own_prefix in _own_prefixes(own):
        wanted = {name.removeprefix(own_prefix): name for name in own}
        fits += [_fit(own, clean, clean_homes, wanted, shared, prefix) for prefix in _prefixes(clean, wanted)]
    if key is not None and fits:
        places = list(dict.fromkeys(fit.place or "the top" for fit in fits))
        fits = [fit for fit in fits if _is_part(key, fit.place)]
        if not fits:
            return Fit({}, problems=[f"nothing under '{key}' fits; the model's names are under {', '.join(places)}"])
    if not fits:
        return Fit({}, problems=["none of the model's weights are in it"])
    good = sorted((fit for fit in fits if not fit.problems), key=_rank)
    if not good:
        return max(fits, key=lambda fit: (fit.matched, -len(fit.problems)))
    chosen = good[0]
    others = list(dict.fromkeys(fit.place or "the top" for fit in good[1:] if fit.place != chosen.place))
    if removed := sorted({part for name in tensors for part in name.split(".") if part in WRAPPERS}):
        chosen.notes.insert(0, f"{' and '.join(f'{part}.' for part in removed)} was taken off the names")
    if chosen.place:
        averaged = ", averaged (EMA) weights" if AVERAGED.search(chosen.place.replace(".", "_")) else ""
        choice = f"; {', '.join(others)} would fit, too" if others else ""
        chosen.notes.insert(0, f"the weights under '{chosen.place}.'{averaged} are taken{choice}")
    elif others:
        chosen.notes.insert(0, f"the weights at the top are taken; {', '.join(others)} would fit, too")
    return chosen


def plural(n: int, noun: str) -> str:
    """A number and its noun: "1 tensor", "2,000 tensors"."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def is_or_are(n: int) -> str:
    return "is" if n == 1 else "are"


def mismatches(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Where weights do not fit a module: names, kinds of numbers, shapes."""
    return _mismatches(module.state_dict(), state)


def wrong_head(module: nn.Module, state: Mapping[str, Tensor], classes: int) -> tuple[str, int] | None:
    """The layer and the number of classes when weights differ from the module's in the number of classes alone."""
    own = module.state_dict()
    differing = [n for n in own if n in state and own[n].shape != state[n].shape]
    if not differing or len(own.keys() - state.keys()) > 0:
        return None
    for name in differing:
        if own[name].shape[:1] != (classes,) or own[name].shape[1:] != state[name].shape[1:]:
            return None
    return differing[0].rpartition(".")[0], len(state[differing[0]])


def wrong_input(module: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """A sentence when the weights of the first layer take another number of channels or values than the module's."""
    own = module.state_dict()
    for name, expected in own.items():
        if expected.ndim < 2 or name not in state:
            continue
        found = state[name]
        if found.ndim != expected.ndim or found.shape[1] == expected.shape[1] or found.shape[0] != expected.shape[0]:
            return None
        what = plural(found.shape[1], "channel" if expected.ndim == 4 else "input value")
        return f"its first layer {name.rpartition('.')[0]} takes {what}, the model's {expected.shape[1]}"
    return None


def absurd(state: Mapping[str, Tensor]) -> str | None:
    """A sentence on the first tensor with numbers that no training gives, or None."""
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        largest = float(tensor.abs().max().float())  # nan where there is one
        if largest != largest or largest == float("inf"):
            return f"{name} holds values that are infinite or not numbers"
        if largest > ABSURD:
            return f"{name} holds the value {largest:.3g}"
    return None


def _mismatches(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in own]
    for name, expected in own.items():
        if name not in state:
            continue
        found = state[name]
        if found.layout != torch.strided or found.is_quantized:
            problems.append(f"{name} is not a plain tensor")
        elif found.is_floating_point() != expected.is_floating_point() or found.is_complex():
            problems.append(f"{name} is {found.dtype}, the model's is {expected.dtype}")
        elif found.shape != expected.shape:
            problems.append(f"{name} is {tuple(found.shape)}, the model's is {tuple(expected.shape)}")
    return problems


def _fit(
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    homes: Mapping[str, str],
    wanted: Mapping[str, str],
    shared: Mapping[str, list[str]],
    prefix: str,
) -> Fit:
    """The tensors whose names begin with `prefix`; `wanted` maps names without prefix to the model's names."""
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    state = {own_name: inside[name] for name, own_name in wanted.items() if name in inside}
    fit = Fit(state, prefix.rstrip("."), matched=len(state))
    for name in own:  # names of one tensor, of which safetensors keeps the first
        for other in shared.get(name, ()):
            if name not in state and other in state:
                state[name] = state[other]
    counters = [name for name in own if name not in state and name.endswith("num_batches_tracked")]
    for name in counters:
        state[name] = torch.zeros((), dtype=torch.int64)
    if counters:
        n = len(counters)
        fit.notes.append(f"{plural(n, 'counter')} of BatchNorm that old files lack {is_or_are(n)} 0")
    rest = [name for name in tensors if not (name.startswith(prefix) and name.removeprefix(prefix) in wanted)]
    rest = [name for name in rest if name.rpartition(".")[2] not in COUNTERS]
    heads = [name for name in rest if name.startswith(prefix) and name.removeprefix(prefix).split(".")[0] in AUXILIARY]
    if heads:
        fit.notes.append(f"{plural(len(heads), 'tensor')} of auxiliary heads {is_or_are(len(heads))} left out")
    # Other mappings are other parts of the file: an optimiser's state, another model.
    places = {homes.get(prefix + name, "") for name in wanted if name in inside}
    extra = [n for n in rest if n.startswith(prefix) and homes.get(n, "") in places and n not in heads]
    if others := len(rest) - len(heads) - len(extra):
        fit.notes.append(f"{plural(others, 'other tensor')} in it {is_or_are(others)} left out")
    if low := sorted(
        {str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point()} - {"float32"}
    ):
        fit.notes.append(f"they are {' and '.join(low)}")
    fit.problems = _mismatches(own, state) + [f"{name.removeprefix(prefix)} is not in the model" for name in extra]
    return fit


def _prefixes(tensors: Iterable[str], wanted: Mapping[str, str]) -> list[str]:
    """What stands before the model's names in the file, the most frequent first."""
    count: Counter[str] = Counter()
    for name in tensors:
        start = 0
        while start >= 0:
            if name[start:] in wanted:
                count[name[:start]] += 1
            start = name.find(".", start) + 1 or -1
    best = max(count.values(), default=0)
    return [prefix for prefix, matched in count.most_common() if 2 * matched > best]


def _own_prefixes(own: Iterable[str]) -> list[str]:
    """Prefixes that all of the model's names share, the empty one first: those of wrappers around a network."""
    names = list(own)
    prefixes = [""]
    while names:
        first = names[0][len(prefixes[-1]) :].partition(".")[0]
        longer = f"{prefixes[-1]}{first}."
        # what is left must still name a layer, or a lone layer's weight would fit anywhere
        if not all(name.startswith(longer) and "." in name[len(longer) :] for name in names):
            break
        prefixes.append(longer)
    return prefixes


def _clean(name: str, own: Mapping[str, Tensor]) -> str:
    """A name without the parts that torch's wrappers put in; of old DenseNets, in today's spelling."""
    if name in own:
        return name
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", name)


def _shared_names(module: nn.Module) -> dict[str, list[str]]:
    """For each name of a parameter that has several names, all of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _rank(fit: Fit) -> tuple[bool, bool, int]:
    parts = fit.place.split(".")
    return "teacher" not in parts, not any(AVERAGED.search(part) for part in parts), len(parts) if fit.place else 0


def _is_part(key: str, place: str) -> bool:
    """Whether `key` names consecutive parts of a place."""
    return f".{key.strip('.')}." in f".{place}."
