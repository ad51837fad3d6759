"""`overture doctor`: what this machine and a given model support."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from overture.cli._options import Json, Quiet
from overture.cli._ui import Ui

if TYPE_CHECKING:
    from overture.cli._session import Session

__all__ = ["doctor"]

SUPPORTED = {"python": ((3, 11), (4, 0)), "torch": ((2, 11), (3, 0)), "transformers": ((5, 16), (5, 24))}
"""From the first version on, below the second."""


def doctor(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Say what this base model supports, too.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check versions, hardware and, with --model, what a base model supports. Exit code 0 if all is usable."""
    ui = Ui(as_json, quiet)
    with ui.busy("Looking around", brief=True):
        document: dict[str, Any] = {"versions": _versions(), "machine": _machine()}
    if model is not None:
        from overture.cli._session import load_session

        session = load_session(ui, model)
        with ui.busy("Trying the methods", brief=True):
            document["model"] = _model(model, session)
    usable = all(found["supported"] for found in document["versions"].values())
    document["usable"] = usable and (model is None or any(m["works"] for m in document["model"]["methods"].values()))
    ui.result(document, *_render(ui, document))
    if not document["usable"]:
        raise typer.Exit(1)


def _versions() -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    found = {"python": platform.python_version(), "torch": version("torch"), "transformers": version("transformers")}
    return {
        name: {"found": text, "supported": low <= _parts(text) < high, "wanted": f">={_dots(low)},<{_dots(high)}"}
        for (name, text), (low, high) in zip(found.items(), SUPPORTED.values(), strict=True)
    }


def _parts(version: str) -> tuple[int, ...]:
    import re

    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _dots(parts: tuple[int, ...]) -> str:
    return ".".join(map(str, parts))


def _machine() -> dict[str, Any]:
    import os
    import platform

    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    bf16 = torch.cuda.is_bf16_supported() if gpus else _cpu_bf16()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory(),
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "bf16": bf16,
    }


def _cpu_bf16() -> bool:
    import torch

    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check and check())


def _memory() -> float | None:
    import os

    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not every system tells
        return None


def _model(name: str, session: Session) -> dict[str, Any]:
    from dataclasses import asdict

    from overture.spec import TASKS, ModelSpec, task_of

    spec, tokenizer = ModelSpec.of(session.model), session.tokenizer
    return {
        "name": name,
        **asdict(spec),
        "dtype": str(session.model.dtype).removeprefix("torch."),
        "task": task_of(session.model),
        "tasks": [task for task, names in TASKS.items() if spec.base.architecture in names],
        "methods": _methods(session),
        "padding_token": tokenizer.pad_token,
        "chat_template": bool(tokenizer.chat_template),
    }


def _methods(session: Session) -> dict[str, Any]:
    """Which methods work, by building each: asking beats guessing."""
    import torch

    from overture.errors import OvertureError
    from overture.methods import METHODS
    from overture.runtime.compile import Frozen

    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        try:
            method(num_virtual_tokens=2).build(Frozen(session.model, session.tokenizer), torch.Generator())
            found[name] = {"works": True, "because": None}
        except OvertureError as error:
            found[name] = {"works": False, "because": error.got}
    return found


def _render(ui: Ui, document: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    def mark(good: bool) -> Text:
        return Text("ok", style="green") if good else Text("no", style="bold red")

    table = ui.table("what", "", "found")
    for name, found in document["versions"].items():
        table.add_row(name, mark(found["supported"]), Text(f"{found['found']}  (supported: {found['wanted']})"))
    machine = document["machine"]
    gpus = ", ".join(f"{gpu['name']}, {gpu['memory_gib']} GiB" for gpu in machine["gpus"])
    table.add_row(
        "device", mark(True), Text(gpus or f"CPU, {machine['cpu_cores']} cores, {machine['torch_threads']} threads")
    )
    table.add_row("memory", "", Text(f"{machine['memory_gib']} GiB"))
    table.add_row("bf16", "", Text("fast" if machine["bf16"] else "no fast path here; fp32 is used"))
    shown: list[Any] = [table]
    if "model" in document:
        shown.append(_render_model(ui, document["model"], mark))
    good = document["usable"]
    verdict = "Ready." if good else "Not usable: see the lines marked no."
    return [*shown, Text(verdict, style="bold green" if good else "bold red")]


def _render_model(ui: Ui, model: dict[str, Any], mark: Any) -> Any:
    from itertools import groupby

    from rich.text import Text

    table = ui.table("model", "", "found")
    size = f"{model['num_parameters']:,} parameters, hidden {model['hidden_size']}, vocabulary {model['vocab_size']:,}"
    table.add_row(Text(model["name"]), "", Text(f"{model['base']['architecture']}, {size}, {model['dtype']}"))
    shapes = [(x["kv_heads"], x["key_dim"], x["value_dim"], x["window"]) for x in model["layers"]]
    for (heads, keys, values, window), group in groupby(shapes):
        sizes = f"{keys}" if keys == values else f"{keys} (keys), {values} (values)"
        words = f"{len(list(group))} x {heads} key/value heads of size {sizes}" + (
            f", window {window}" if window else ""
        )
        table.add_row("layers", "", Text(words))
    positions = model["max_positions"]
    table.add_row("positions", "", Text(f"{positions:,}" if positions else "no limit named"))
    others = ", ".join(task for task in model["tasks"] if task != model["task"])
    named = model["task"] or "none that Overture knows"
    table.add_row(
        "task", mark(model["task"] is not None), Text(named + (f"; with --task also {others}" if others else ""))
    )
    for name, method in model["methods"].items():
        table.add_row(f"method {name}", mark(method["works"]), Text(method["because"] or ""))
    padding, chat = model["padding_token"], model["chat_template"]
    table.add_row("padding token", "", Text(repr(padding) if padding else "none (not needed)"))
    table.add_row("chat template", "", Text("yes" if chat else "none: use plain text, not messages"))
    return table
