"""What is typed after `python train.py`, before Hydra sees it: put right, or refused with the words to type."""

import os
import re
import shlex
import sys
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from syncbn.trainer.config import KEYS, LISTS, unknown_key
from syncbn.trainer.errors import UserError
from syncbn.trainer.runs.folder import MAPPINGS

# Hydra's own options, and those of them that have a value behind them
OPTIONS = {
    "--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r",
    "--multirun", "-m", "--shell-completion", "-sc", "--config-path", "-cp", "--config-name", "-cn", "--config-dir",
    "-cd", "--experimental-rerun", "--info", "-i",
}  # fmt: skip
WITH_VALUE = {
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
    "--experimental-rerun",
}  # fmt: skip
FOLDERS = ("--config-path", "-cp", "--config-dir", "-cd")
WORD = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^=~+]+)(?:=(?P<value>.*))?", re.DOTALL)


def understood(words: Sequence[str]) -> list[str]:
    """The words as Hydra takes them. Raises UserError for the first that means nothing to it.

    A value that begins with ~ is a path in a home, which no shell puts there behind a =.
    """
    left, taken = [*words], []
    sweeps = bool({"-m", "--multirun"} & set(words))
    groups = _groups(words)
    while left:
        word = left.pop(0)
        if word.startswith("-"):
            taken.append(_option(word, left))
            if word in WITH_VALUE and left:
                taken.append(left.pop(0))
        else:
            taken.append(_override(word, left, groups, sweeps))
    return taken


def _option(word: str, behind: list[str]) -> str:
    if word.split("=")[0] in OPTIONS:
        return word
    name, _, value = word.lstrip("-").partition("=")
    key = name.replace("-", "_")
    value = value or (behind[0] if behind and "=" not in behind[0] else "VALUE")
    near = key if key in KEYS else next((each for each in KEYS if each.split(".")[-1] == key), None)
    said = f"{near}={value}" if near else "KEY=VALUE (python train.py --help lists the keys)"
    raise UserError(f"{word}: keys are given without dashes: {said}")


def _override(word: str, behind: list[str], groups: Collection[str], sweeps: bool) -> str:
    parts = WORD.fullmatch(word)
    if parts is None or not parts["key"].strip():
        raise UserError(f"{word}: give KEY=VALUE (python train.py --help lists the keys)")
    sign, key, value = parts["sign"] or "", parts["key"], parts["value"]
    if key.startswith(("hydra.", "hydra/")):
        return word
    name = key.partition("@")[0]
    of_mapping = next((each for each in MAPPINGS if name == each or name.startswith(f"{each}.")), None)
    if (of_mapping or name) not in KEYS and name not in groups:
        _refuse_key(name, value or "VALUE")
    if sign == "~":
        raise UserError(f"{word}: every key is needed, so none is taken away; {key}=VALUE sets it")
    if value is None:
        raise UserError(f"{word}: give it a value, {key}=VALUE")
    if _is_open(value):
        _refuse_split(word, behind)
    if value.startswith("~"):
        value = ",".join(map(os.path.expanduser, value.split(","))) if sweeps else os.path.expanduser(value)
        word = f"{sign}{key}={value if sweeps or _parses(f'{key}={value}') else _quoted(value)}"
    if of_mapping:
        word = f"++{word.lstrip('+')}"  # Hydra takes a name that it does not know by that alone
    return _parsed(word, key, value, sweeps)


def _parsed(word: str, key: str, value: str, sweeps: bool) -> str:
    whole = shlex.quote(f"{key}={_quoted(value)}")
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        raise UserError(f"{key}: {value} has characters that must be quoted, twice: {whole}") from None
    if override.is_sweep_override() and not sweeps:
        if key in LISTS:
            raise UserError(f"{word}: {key} is a list: {shlex.quote(f'{key}=[{value}]')}")
        otherwise = "" if key not in KEYS else f"; for one value with a comma: {whole}"
        raise UserError(f"{word}: several values are a sweep, a run of each: python train.py -m {word}{otherwise}")
    return word


def _refuse_split(word: str, behind: list[str]) -> None:
    """The shell has made several words of one that has spaces in it."""
    whole = word
    for more in behind:
        whole = f"{whole} {more}"
        if not _is_open(whole):
            raise UserError(f"{word}: the shell has split this at a space; quote the whole: {shlex.quote(whole)}")
    raise UserError(f"{word}: a bracket or quote is opened in it and not closed")


def _is_open(text: str) -> bool:
    """Whether a bracket or a double quote is opened in it and not closed."""
    bare = re.sub(r'"(\\.|[^"\\])*"', "", text)
    return '"' in bare or any(bare.count(a) > bare.count(b) for a, b in ("[]", "{}", "()"))


def _parses(word: str) -> bool:
    try:
        return not OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:
        return False


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _refuse_key(key: str, value: str) -> NoReturn:
    for each in KEYS:
        if key.startswith(f"{each}."):
            whole = shlex.quote(f"{each}={{{key.removeprefix(f'{each}.')}: {value}}}")
            raise UserError(f"{key}: {each} is one key, whose value is a mapping: {whole}")
    if within := [each for each in KEYS if each.startswith(f"{key}.")]:
        named = f"{key}.name={value}" if f"{key}.name" in within else f"{within[0]}=VALUE, say"
        raise UserError(f"{key}={value}: {key} is a section of keys: {named} ({', '.join(within)})")
    raise UserError(unknown_key(key))


def _groups(words: Sequence[str]) -> set[str]:
    """The groups of choices: folders of conf/, and of what --config-dir names."""
    behind = {word.partition("=")[2] for word in words if word.split("=")[0] in FOLDERS and "=" in word}
    behind |= {value for word, value in pairwise(words) if word in FOLDERS}
    folders = [Path(sys.argv[0]).resolve().parent / "conf", *map(Path, behind)]
    return {str(place.parent.relative_to(folder)) for folder in folders for place in folder.rglob("*.yaml")}
