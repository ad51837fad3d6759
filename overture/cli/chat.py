"""`overture chat`: talk with a prompt, word by word."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overture.cli._options import Model, Quiet, Seed
from overture.cli._ui import Ui, print_error
from overture.errors import ConfigError, ContextLengthError, OvertureError, UnsupportedModelError

if TYPE_CHECKING:
    from overture.cli._session import Session
    from overture.prompt import SoftPrompt

__all__ = ["chat"]

_HELP = "/reset forgets the talk, /prompt FILE changes the prompt ('none': the frozen model), /quit ends."


def chat(
    model: Model = "tiny",
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="FILE", help="Prompt file; 'none' is the frozen model.")
    ] = "none",
    system: Annotated[str | None, typer.Option(help="A system message in front of the talk.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sample at this temperature; 0 takes the likeliest.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Talk with a prompt in many turns. Reads lines from standard input, so it can be piped.

    /reset forgets the talk, /prompt FILE changes the prompt, /quit ends.
    """
    ui = Ui(quiet=quiet)
    with ui.busy("Starting", brief=True):
        from overture.cli._session import load_session

    session = load_session(ui, model, [prompt])
    _require_writing(session)
    if not session.tokenizer.chat_template:
        raise UnsupportedModelError(
            expected="a model with a chat template", got=f"{model!r}, which has none", do="use `overture generate`"
        )
    from transformers import set_seed

    set_seed(seed)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p}
    opening = [{"role": "system", "content": system}] if system else []
    _Talk(ui, session, options, opening).run()


def _require_writing(session: Session) -> None:
    """Raise `UnsupportedModelError` before the first line is read, rather than at every one."""
    from overture.spec import task_of

    task = task_of(session.model)
    if task not in ("causal-lm", "seq2seq"):
        raise UnsupportedModelError(
            expected="a model that writes text, and a prompt tuned for one",
            got=f"{type(session.model).__name__}, a model for {task or 'no task that Overture knows'}",
            do="use `overture predict`, or another prompt",
        )


class _Talk:
    """The loop: lines in, words out."""

    def __init__(self, ui: Ui, session: Session, options: dict[str, Any], opening: list[dict[str, str]]) -> None:
        self.ui, self.session, self.options, self.opening = ui, session, options, opening
        self.prompt: SoftPrompt | None = next(iter(session.prompts.values()))
        self.messages = list(opening)
        self.typed = sys.stdin.isatty()

    def run(self) -> None:
        """Read until /quit or the end of the input."""
        if self.typed:
            self.ui.note(_HELP)
        while (line := self._read()) is not None and line != "/quit":
            try:
                self._take(line)
            except OvertureError as error:  # a wrong word ends no talk
                print_error(error.as_dict(), as_json=False)

    def _read(self) -> str | None:
        if self.typed:
            import readline  # noqa: F401  # line editing and history for input()

            try:
                return input("\nyou> ").strip()
            except EOFError:
                return None
        line = sys.stdin.readline()
        return line.strip() if line else None

    def _take(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if not line:
            return
        if word == "/reset":
            self.messages = list(self.opening)
            self.ui.note("Forgotten.")
        elif word == "/prompt":
            self._change(rest.strip())
        elif word == "/help":
            self.ui.note(_HELP)
        elif word.startswith("/"):
            raise ConfigError(expected="/reset, /prompt FILE, /help or /quit", got=word, do="use one of these")
        else:
            self._answer(line)

    def _change(self, path: str) -> None:
        from overture.cli._session import load_prompts
        from overture.spec import ModelSpec

        if not path:
            raise ConfigError(expected="a file after /prompt", got="none", do="write /prompt poet.safetensors")
        changed = next(iter(load_prompts([path]).values()))
        if changed is not None:
            changed.check_base(ModelSpec.of(self.session.model).base)
            if changed.head is not None:
                raise UnsupportedModelError(
                    expected="a prompt that writes text", got=f"one for {changed.head.task}", do="use another prompt"
                )
        self.prompt = changed
        self.ui.note(f"Prompt: {path}")

    def _answer(self, line: str) -> None:
        from transformers import TextStreamer

        from overture.runtime.generate import generate

        talk = [*self.messages, {"role": "user", "content": line}]
        while True:
            streamer = TextStreamer(self.session.tokenizer, skip_prompt=True, skip_special_tokens=True)
            try:
                [answer] = generate(
                    self.session.model, self.session.tokenizer, [self.prompt], [talk], streamer=streamer, **self.options
                )
            except ContextLengthError:
                start = len(self.opening)
                if len(talk) - start < 3:
                    raise
                # The oldest exchange goes; the system message stays.
                del talk[start : start + 2]
                self.ui.note("The talk is longer than the model's context: the oldest exchange is forgotten.")
            else:
                # Kept only once answered, so that a refused or interrupted line leaves the talk as it was.
                self.messages = [*talk, {"role": "assistant", "content": answer}]
                return
