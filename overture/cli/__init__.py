"""The command `overture`. Nothing heavy is imported here: each verb imports what it needs when it runs."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from overture.cli import (
    chat,
    demo,
    distill,
    doctor,
    eval,
    export,
    generate,
    import_,
    inspect,
    keys,
    predict,
    serve,
    store,
    tune,
    tune_many,
    verify,
)
from overture.cli._program import program
from overture.cli._ui import print_error
from overture.errors import OvertureError

__all__ = ["EXIT_CODES", "app", "main"]

EXIT_CODES = {
    0: "ok",
    1: "any other error",
    2: "wrong option or configuration",
    3: "data missing, empty or with a bad row",
    4: "prompt, checkpoint or store missing, damaged or of another version",
    5: "prompt and model do not fit, or the model cannot do it",
    6: "the run failed on the way, or some users of a run with many did",
    130: "interrupted",
}
"""What each exit code means."""

# transformers imports torchao wherever it is installed, which then warns of each of its libraries for other machines.
_OTHERS_WARNINGS = ("torchao", "torch.utils._pytree")

app = typer.Typer(
    name="overture",
    help="Tune, inspect and use soft prompts (Prefix Tuning, Prompt Tuning, P-Tuning) for frozen language models.",
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("tune")(tune.tune)
app.command("tune-many")(tune_many.tune_many)
app.command("distill")(distill.distill)
app.command("eval")(eval.evaluate)
app.command("generate")(generate.generate)
app.command("predict")(predict.predict)
app.command("chat")(chat.chat)
app.command("inspect")(inspect.inspect)
app.command("import")(import_.import_)
app.command("export")(export.export)
app.add_typer(store.app)
app.command("serve")(serve.serve)
app.add_typer(keys.app)
app.command("verify")(verify.verify)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)


def _show_version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"overture {version('overture')}")
        raise typer.Exit
    return wanted


_Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]


@app.callback()
def _root(version: _Version = False) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words after `overture`; by default those of this process.

    Returns:
        The exit code, one of `EXIT_CODES`.
    """
    for name in _OTHERS_WARNINGS:
        logging.getLogger(name).setLevel(logging.ERROR)
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
    try:
        # Not standalone: errors come here, so that every one of them looks the same.
        code: Any = typer.main.get_command(app)(words or ["--help"], prog_name="overture", standalone_mode=False)
    except OvertureError as error:
        print_error(error.as_dict(), as_json=as_json)
        return error.exit_code
    except TyperException as error:
        if not error.format_message():  # a group without a verb, which has shown its help
            return 0
        print_error(_usage(error), as_json=as_json)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        print_error(_bug(error), as_json=as_json)
        return 1
    if code == 130:
        print_error(_interrupted(words), as_json=as_json)
    return code if isinstance(code, int) else 0


def _usage(error: TyperException) -> dict[str, str]:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "overture"
    return {
        "error": "UsageError",
        "expected": f"options of `{command}`",
        "got": error.format_message().rstrip("."),
        "do": f"see `{command} --help`",
    }


def _interrupted(words: Sequence[str]) -> dict[str, str]:
    report = {"error": "Interrupted", "expected": "the command to end by itself", "got": "Ctrl-C, or a signal to stop"}
    folder = next((after for word, after in pairwise(words) if word == "--run-dir"), None)
    folder = folder or next((w.partition("=")[2] for w in words if w.startswith("--run-dir=")), None)
    # Of many users, those who are done are in the store, whether or not there is a run folder.
    if (folder and Path(folder).is_dir()) or "tune-many" in words[:1]:
        again = [*words, *(() if "--resume" in words else ("--resume",))]
        return report | {"do": f"go on where it stopped: {shlex.join([program(), *again])}"}
    if {"tune", "distill"} & set(words[:1]):
        return report | {"do": "start again; with --run-dir DIR a run can be resumed"}
    return report | {"do": "start again"}


def _bug(error: Exception) -> dict[str, str]:
    import traceback

    frames = "".join(traceback.format_tb(error.__traceback__)[-4:])
    return {
        "error": "InternalError",
        "expected": "no error that Overture did not foresee",
        "got": f"{type(error).__name__}: {error}",
        "do": "report it with the command and these lines",
        "traceback": frames,
    }
