"""Prompts on the Hugging Face Hub: the card that describes one, and the upload of its folder."""

from __future__ import annotations

import json
from os import PathLike

from overture.errors import OvertureError
from overture.prompt import KVPrefix, SoftPrompt

__all__ = ["model_card", "upload"]


def model_card(prompt: SoftPrompt) -> str:
    """A card in Markdown, with the metadata by which the Hub files a model: its base, library and tags."""
    base = prompt.base
    head = ["library_name: overture", "tags:", "- overture", "- soft-prompt"]
    method = prompt.method.get("name")
    if isinstance(method, str):
        head.append(f"- {json.dumps(method)}")
    if base.name.count("/") <= 1 and base.name:
        # A name with a slash or without is a repository's; YAML takes JSON's quotes.
        head = [f"base_model: {json.dumps(base.name)}", "base_model_relation: adapter", *head]
    options = json.dumps(dict(prompt.method), ensure_ascii=False).replace("|", r"\|")
    kind = "keys and values of every attention layer" if isinstance(prompt.value, KVPrefix) else "input embeddings"
    return f"""---
{chr(10).join(head)}
---

# {prompt.name}

A soft prompt: {prompt.length} virtual tokens ({kind}, {prompt.num_parameters:,} numbers) before the text of a frozen
language model. It works with that base model only and is refused on any other.

| | |
|---|---|
| base model | {base.name or "unnamed"} ({base.architecture}, {base.digest[:12]}) |
| method | {options} |

```python
import overture as ov

model, tokenizer = ov.load_base({json.dumps(base.name or "...")})
prompt = ov.SoftPrompt.load("prompt.safetensors")
print(ov.generate(model, tokenizer, prompt, ["..."]))
```

`prompt.safetensors` is the prompt. `model.safetensors` is only needed to go on training it
(`ov.PromptModel.from_pretrained(folder, model)`).
"""


def upload(
    folder: str | PathLike[str],
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a folder to a model repository on the Hub, made if it is missing.

    Returns:
        The commit's address.

    Raises:
        OvertureError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(
            api.upload_folder(
                repo_id=repository,
                folder_path=str(folder),
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        )
    # huggingface_hub's own errors are of these three kinds; no network, no login and a bad name among them.
    except (OSError, ValueError, RuntimeError) as error:
        raise OvertureError(
            expected="a repository on the Hub that can be written",
            got=f"{repo_id!r} ({next(iter(str(error).strip().splitlines()), type(error).__name__)})",
            do="check the name, log in with `hf auth login`, and try again with a network",
        ) from error
