"""The help page, made from the comments in the configuration files: the one place that explains options and keys.

Imports neither torch nor Hydra, so that help appears at once.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from kd_cli.config.options import SHARED_OPTIONS, Composition, compose, follows, groups
from kd_cli.config.yaml_comments import Key, description

WIDTH = 100
COLUMN = 38  # where descriptions start

INTRODUCTION = """\
{program} trains a teacher, distils it into a student, and measures what the distillation was worth:
the teacher, the same student trained alone, and the distilled student, on the same test data.
Without arguments it runs offline in seconds. Any group=option or key=value below changes it.
"""

EXAMPLES = """\
Examples
  {program} teacher=bigmlp student=smallmlp T=2
      one run
  {program} -m T=1,2,5,10 'seed=range(5)'
      a sweep: every T with five seeds, one table at the end
  {program} dataset=imagefolder student=torchvision --help
      this page with the keys of those options
"""

EXPERIMENT_EXAMPLE = """\
  {program} experiment={name}
      {about}
"""

FLAGS = (
    ("-m, --multirun", "sweep: run every combination of the comma-separated values"),
    ("--cfg job", "print the composed configuration and stop"),
    ("--config-dir DIR", "add the options in your own folder of YAML: DIR/model/mine.yaml is student=mine"),
    ("-sc install=bash", 'tab completion: eval "$({program} -sc install=bash)"; also for zsh and fish'),
    ("--version", "print the versions of kd-cli and torch"),
    ("--hydra-help", "the flags of Hydra, which composes the configuration"),
)


def page(conf_dirs: Sequence[Path], overrides: Sequence[str] = (), program: str = "kd-run") -> str:
    """Return the help page for the YAML under `conf_dirs`; the first holds config.yaml, the others add options.

    The keys are those of the configuration that the overrides choose. ConfigError for an option that does not exist.
    """
    composition = compose(conf_dirs, overrides)
    examples = EXAMPLES.format(program=program)
    for name, file in list(groups(conf_dirs).get("experiment", {}).items())[:1]:
        examples += EXPERIMENT_EXAMPLE.format(program=program, name=name, about=description(file))
    values = f"the values of {program} {' '.join(overrides)}" if overrides else "their defaults"
    parts = [
        INTRODUCTION.format(program=program),
        examples,
        "\n".join(["Groups: group=option", *_group_rows(composition)]),
        "\n".join([f"Keys: key=value, shown with {values}", *_key_rows(composition)]),
        "\n".join(["Flags", *(_row(2, flag, text.format(program=program)) for flag, text in FLAGS)]),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _group_rows(composition: Composition) -> Iterator[str]:
    available, chosen = composition.available, composition.chosen
    # Users choose a file of conf/model by teacher= and student=.
    known = {*chosen, *SHARED_OPTIONS, *SHARED_OPTIONS.values()}
    extra = [group for group in available if group not in known and not group.startswith("hydra/")]
    shown: dict[str, object] = {}
    for group in [*chosen, *extra]:
        if not (options := available.get(group)):
            continue
        entry = chosen.get(group)
        picked = composition.picked(entry) if entry else ()
        mark = "chosen" if group in composition.named else "default"
        left = f"{group}=" if entry else f"+{group}="  # Hydra wants a plus for a group outside the defaults list
        same = next((other for other in shown if shown[other] == options), None)
        notes = [entry.comment] if entry and entry.comment else []
        if entry and (followed := follows(entry)):
            notes.append(f"follows {followed}= where an option has its name")
        if same:
            notes += [f"the options of {same}=", *(f"{mark} {name}" for name in picked if name in options)]
        yield _row(2, left, "; ".join(notes))
        if not same:
            shown[group] = options
            for name, file in options.items():
                yield _row(4, f"{name} ({mark})" if name in picked else name, description(file))


def _key_rows(composition: Composition) -> Iterator[str]:
    settings, origin = composition.settings, composition.origin
    sections: dict[str, list[Key]] = {"": []}
    for key in settings.values():
        if key.value is None and "." not in key.name:
            sections.setdefault(key.name, [])
        elif not key.name.rpartition(".")[2].startswith("_"):
            sections.setdefault(key.name.partition(".")[0] if "." in key.name else "", []).append(key)
    shown: dict[str, list[Key]] = {}
    for section, members in sections.items():
        bare = [key._replace(name=key.name.removeprefix(f"{section}.")) for key in members]
        same = next((other for other in shown if section and shown[other] == bare), None)
        if section and members:
            notes = [settings[section].comment] if section in settings else []
            notes += [f"of {origin[section]}"] if section in origin else []
            notes += [f"the keys and defaults of {same}"] if same else []
            yield ""
            yield _row(2, f"{section}.", "; ".join(filter(None, notes)))
        if not same:
            shown[section] = bare
            for key in members:
                left = f"{key.name}." if key.value is None else f"{key.name}={key.value}"
                yield _row(4 if section else 2, left, key.comment)


def _row(indent: int, left: str, right: str) -> str:
    """Set a term and its description in two columns; a long term has its description below it."""
    start = " " * indent + left
    if not right:
        return start
    margin = " " * COLUMN
    wrapped = textwrap.wrap(right, WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
    if len(start) > COLUMN - 2:
        return "\n".join([start, *wrapped])
    return "\n".join([start.ljust(COLUMN) + wrapped[0].lstrip(), *wrapped[1:]])
