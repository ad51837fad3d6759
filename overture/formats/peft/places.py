"""Where a PEFT adapter's files are: in a folder, or on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from overture.errors import PromptFileError
from overture.formats._refusal import refusal

__all__ = ["CONFIG", "WEIGHTS", "folder_of"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PICKLE = "adapter_model.bin"
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[^@]+?))?/?(?:@(?P<revision>.+))?", re.ASCII)


def folder_of(source: str | os.PathLike[str]) -> Path:
    """A folder on this machine with both files; what is on the Hub is brought into the Hub's cache.

    Raises:
        PromptFileError: no such folder or repository, or files are missing.
    """
    folder = Path(source)
    if folder.is_dir():
        return _complete(folder)
    found = None if folder.exists() else _HUB.fullmatch(os.fspath(source))
    if found is None:
        got = "a file" if folder.exists() else "no such folder"
        raise refusal("a folder with a PEFT adapter, or OWNER/NAME on the Hugging Face Hub", got, "check the path")
    return _downloaded(found["repo"], found["folder"], found["revision"])


def _complete(folder: Path) -> Path:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            inside = [path.parent.name for path in sorted(folder.glob(f"*/{CONFIG}"))]
            raise _missing(name, pickled=(folder / _PICKLE).exists(), inside=inside)
    return folder


def _downloaded(repository: str, folder: str | None, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    path = ""
    for name in (WEIGHTS, CONFIG):
        try:
            path = hf_hub_download(repository, name, subfolder=folder, revision=revision)
        except EntryNotFoundError:
            # Old repositories have a pickle instead, which is not even downloaded.
            raise _missing(name, pickled=name == WEIGHTS) from None
        # huggingface_hub's own errors are of these three kinds; no network, no access and a bad name among them.
        except (OSError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
            do = "check the name; for the Hub also the network and `hf auth login`"
            raise refusal("a folder, or a repository on the Hub that can be read", reason, do) from error
    return Path(path).parent


def _missing(name: str, *, pickled: bool, inside: list[str] | None = None) -> PromptFileError:
    if name == WEIGHTS and pickled:
        return refusal(
            f"the file {WEIGHTS}",
            f"none, only a pickle such as {_PICKLE}, which Overture never opens: it can run any code",
            "if you trust it, load it with PEFT and save it again: model.save_pretrained(folder)",
        )
    if inside:
        return refusal(
            f"the file {name}", f"none, but adapters in {', '.join(inside[:4])}", "name one of these folders"
        )
    return refusal(f"the file {name}", "none", "name the folder that PEFT's save_pretrained wrote")
