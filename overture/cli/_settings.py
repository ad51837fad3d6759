"""From words on the command line to a method and a run, with every wrong word named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from types import NoneType
from typing import Any, get_args, get_type_hints

from overture.errors import ConfigError
from overture.methods import METHODS, Method
from overture.tuning.config import TuneConfig

__all__ = ["chosen", "method_and_config", "parse_value", "verbalizer"]

_OF_METHOD = {"tokens": "num_virtual_tokens"} | {name: name for name in ("init", "template", "encoder", "verbalizer")}
"""Options of a method by the name of their flag."""
_OF_RUN = {"lr": "learning_rate"} | {
    name: name
    for name in (
        "steps",
        "batch_size",
        "optimizer",
        "schedule",
        "seed",
        "patience",
        "max_length",
        "truncate",
        "precision",
    )
}
"""Options of a run by the name of their flag."""


def chosen(flags: Mapping[str, Any], **usual: Any) -> tuple[Method, TuneConfig]:
    """The method and the run that a verb's flags ask for.

    Args:
        flags: values of all the verb's parameters by name; None for a flag that was not given. Those that are for
            neither are left alone, and a verb need not have all.
        usual: options of the method that have no flag.

    Raises:
        ConfigError: as `method_and_config`.
    """
    of_method = usual | {option: flags.get(flag) for flag, option in _OF_METHOD.items()}
    of_method["verbalizer"] = verbalizer(flags.get("verbalizer"))
    of_run = {option: flags.get(flag) for flag, option in _OF_RUN.items()}
    return method_and_config(flags["method"], of_method, of_run, flags["option"] or ())


def method_and_config(
    name: str, method_options: Mapping[str, Any], run_options: Mapping[str, Any], extra: Sequence[str]
) -> tuple[Method, TuneConfig]:
    """Build the configs of a method and of a run.

    Args:
        name: the method's name on the command line.
        method_options: options of the method that have a flag of their own; None for not given.
        run_options: options of the run that have a flag of their own; None for not given.
        extra: `KEY=VALUE` for any other option of either.

    Raises:
        ConfigError: an unknown method or option, or a value that does not fit.
    """
    if name not in METHODS:
        raise ConfigError(
            expected=f"a method: {', '.join(METHODS)}",
            got=repr(name),
            do=_suggest(name, METHODS, "choose one of these"),
        )
    cls = METHODS[name]
    of_method, of_run = _names(cls), _names(TuneConfig)
    chosen = {key: _init(value) for key, value in method_options.items() if value is not None}
    for key in chosen:
        if key not in of_method:
            having = ", ".join(n for n, other in METHODS.items() if key in _names(other))
            raise ConfigError(
                expected=f"an option of the method {name!r} ({', '.join(of_method)})",
                got=f"{key!r}, which only {having} has",
                do=f"leave it out, or use --method {having.split(', ')[0]}",
            )
    run = {key: value for key, value in run_options.items() if value is not None}
    of_run_words = ", ".join(of_run)
    for pair in extra:
        key, value = _split(pair)
        if key in of_method:
            chosen[key] = parse_value(key, value, get_type_hints(cls)[key])
        elif key in of_run:
            run[key] = parse_value(key, value, get_type_hints(TuneConfig)[key])
        else:
            raise ConfigError(
                expected=f"an option of the method {name!r} ({', '.join(of_method)}), or of the run ({of_run_words})",
                got=repr(key),
                do=_suggest(key, [*of_method, *of_run], "choose one of these"),
            )
    return cls(**chosen), TuneConfig(**run)


def parse_value(key: str, text: str, hint: Any) -> Any:
    """Read `text` as a value of the type `hint`.

    Raises:
        ConfigError: it is none.
    """
    kinds = get_args(hint) or (hint,)
    if NoneType in kinds and text.lower() in ("none", "null"):
        return None
    if bool in kinds and text.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0"):
        return text.lower() in ("true", "yes", "on", "1")
    for number in (int, float):
        if number in kinds:
            try:
                return number(text)
            except ValueError:
                continue
    words = [kind for kind in kinds if kind not in (NoneType, bool, int, float)]
    if words:
        return _init(text)
    names = " or ".join("none" if kind is NoneType else kind.__name__ for kind in kinds)
    raise ConfigError(expected=f"{key} as {names}", got=repr(text), do="write for example " + _example(key, kinds))


def verbalizer(text: str | None) -> Any:
    """The words of each label, from a JSON object.

    Raises:
        ConfigError: it is none.
    """
    if text is None:
        return None
    try:
        words = json.loads(text)
    except ValueError:
        words = None
    if not isinstance(words, dict):
        raise ConfigError(
            expected="a JSON object after --verbalizer",
            got=repr(text),
            do='write it such as \'{"positive": "great", "negative": ["bad", "awful"]}\'',
        )
    return words


def _init(value: Any) -> Any:
    """A JSON list of strings as a tuple (class labels); everything else as it is."""
    if isinstance(value, str) and value.startswith("["):
        try:
            listed = json.loads(value)
        except ValueError:
            return value
        if isinstance(listed, list) and listed and all(isinstance(item, str) for item in listed):
            return tuple(listed)
    return value


def _split(pair: str) -> tuple[str, str]:
    key, equals, value = pair.partition("=")
    if not equals or not key:
        raise ConfigError(expected="KEY=VALUE after --option", got=repr(pair), do="write it as --option dropout=0.1")
    return key.strip().replace("-", "_"), value


def _names(cls: type[Any]) -> list[str]:
    return [field.name for field in fields(cls)]


def _suggest(word: str, known: Any, otherwise: str) -> str:
    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"perhaps you meant {close[0]!r}" if close else otherwise


def _example(key: str, kinds: Sequence[Any]) -> str:
    return f"{key}=true" if bool in kinds else f"{key}=1"
