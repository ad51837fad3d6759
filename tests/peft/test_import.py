"""An adapter that PEFT saved gives in Overture the logits that PEFT computes with it, whatever is padded beside it.

Oracle: PEFT, loading the same files, row by row and without padding: padding is where PEFT itself is wrong (left of a
decoder's text, right of what a decoder classifies; `exactness/test_where_peft_fails.py`). Both read the fp32 numbers of
the files and compute in fp64; the tolerance (`bases.tolerance`) is that of two orders of summation.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import overture as ov
from overture.formats import peft
from tests.peft.adapters import KINDS, TASKS, P, saved
from tests.peft.bases import DECODERS, ENCODERS, TEXTS, build, loaded, ours, theirs, tokenizer, tolerance

CASES = [
    *[("llama", "CAUSAL_LM", kind) for kind in KINDS],
    *[(family, "CAUSAL_LM", kind) for family in DECODERS[1:] for kind in ("prefix", "prompt")],
    ("gptj", "CAUSAL_LM", "prompt"),  # no attention seam: its virtual tokens stay in the input
    *[("llama", "SEQ_CLS", kind) for kind in ("prefix", "prompt", "multitask")],
    *[("gpt2", "SEQ_CLS", kind) for kind in ("prefix", "prompt")],
    *[("bert", "SEQ_CLS", kind) for kind in KINDS],
    *[("bert", task, kind) for task in ("TOKEN_CLS", "QUESTION_ANS") for kind in ("prefix", "prompt")],
    *[(family, "SEQ_CLS", kind) for family in ENCODERS[1:] for kind in ("prefix", "prompt")],
    ("bert", "FEATURE_EXTRACTION", "prompt"),
    *[("t5", "SEQ_2_SEQ_LM", kind) for kind in ("prompt", "p-tuning-mlp", "p-tuning-lstm")],
    ("bart", "SEQ_2_SEQ_LM", "prompt"),
    *[(family, "SEQ_2_SEQ_LM", kind) for family in ("t5", "bart") for kind in ("prefix", "cartridge")],
]


@pytest.mark.parametrize(("family", "task", "kind"), CASES, ids=["-".join(case) for case in CASES])
def test_logits_are_those_of_peft(family: str, task: str, kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "poet", family, task, kind)
    model = build(family, task)
    task_id = 1 if kind == "multitask" else None
    prompt = peft.load(folder, model, task_id=task_id)
    assert (prompt.name, prompt.length) == ("poet", P)
    adapted = loaded(folder, family, task)
    wanted = theirs(adapted, family, task, TEXTS, task_id=task_id)
    for side in ("left", "right") if family in DECODERS else ("right",):
        for got, row in zip(ours(model, family, task, prompt, TEXTS, side), wanted, strict=True):
            torch.testing.assert_close(got, row, **tolerance(family))
    plain = ours(model, family, task, None, TEXTS, "right")
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain, wanted, strict=True)), "the adapter does nothing"


def test_multitask_question_answering(tmp_path: Path) -> None:
    """PEFT loses the task ids on the way. Oracle: the plain model on PEFT's own virtual tokens before the text's."""
    case = ("bert", "QUESTION_ANS")
    folder = saved(tmp_path / "poet", *case, "multitask")
    adapted, model = loaded(folder, *case), build(*case)
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        theirs(adapted, *case, TEXTS[:1], task_id=1)
    head = adapted.base_model.qa_outputs.modules_to_save["default"]
    got = ours(model, *case, peft.load(folder, model, task_id=1), TEXTS, "right")
    for row, text in zip(got, TEXTS, strict=True):
        ids = torch.tensor([tokenizer("bert")(text).input_ids])
        with torch.no_grad():
            virtual = adapted.get_prompt(1, torch.tensor([1])).double()
            embedded = torch.cat([virtual, model.get_input_embeddings()(ids)], dim=1)
            wanted = head(model.bert(inputs_embeds=embedded)[0])[0, P:]
        torch.testing.assert_close(row, wanted, **tolerance("bert"))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_multitask_of_encoder_decoders(family: str, tmp_path: Path) -> None:
    """PEFT puts the second half of the rows before the decoder's text in training, and leaves it out in `generate`.

    Oracle: what PEFT generates.
    """
    case = (family, "SEQ_2_SEQ_LM")
    folder = saved(tmp_path / "poet", *case, "multitask")
    adapted, model = loaded(folder, *case), build(*case)
    prompt = peft.load(folder, model, task_id=2)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    batch = ov.encode(tokenizer(family), TEXTS, [prompt] * 3, spec=ov.ModelSpec.of(model), complete=True)
    with ov.prompts(model, [prompt] * 3, batch):
        got = model.generate(**batch.inputs(), **options)
    for number, text in enumerate(TEXTS):
        ids = torch.tensor([tokenizer(family)(text).input_ids])
        mask = torch.ones_like(ids)
        wanted = adapted.generate(input_ids=ids, attention_mask=mask, task_ids=torch.tensor([2]), **options)
        assert got.sequences[number].tolist() == wanted.sequences[0].tolist()
        torch.testing.assert_close(
            torch.stack(got.logits)[:, number], torch.stack(wanted.logits)[:, 0], **tolerance(family)
        )


def test_every_task_of_multitask_prompt_tuning_has_its_prompt(tmp_path: Path) -> None:
    model = build("llama", "CAUSAL_LM")
    folder = saved(tmp_path / "poet", "llama", "CAUSAL_LM", "multitask")
    adapted = loaded(folder, "llama", "CAUSAL_LM")
    for task_id in range(TASKS):
        prompt = peft.load(folder, model, task_id=task_id)
        wanted = adapted.get_prompt(1, torch.tensor([task_id]))[0]
        torch.testing.assert_close(prompt.value.embeddings, wanted, rtol=0, atol=1e-6)  # products in fp32
        assert prompt.method["task_id"] == task_id


def test_what_an_imported_prompt_says_of_itself(tmp_path: Path) -> None:
    model = build("bert", "SEQ_CLS", num_labels=3)
    folder = saved(tmp_path / "critic", "bert", "SEQ_CLS", "p-tuning-lstm", num_labels=3)
    prompt = peft.load(folder, model, labels=["bad", "fair", "good"])
    assert prompt.method == {
        "name": "peft",
        "peft_type": "P_TUNING",
        "peft_version": version("peft"),
        "encoder_reparameterization_type": "LSTM",
    }
    assert prompt.base == ov.ModelSpec.of(model).base
    assert prompt.head is not None
    assert (prompt.head.task, prompt.head.labels) == ("sequence-classification", ("bad", "fair", "good"))
    assert peft.load(folder, model).head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    prompt.save(tmp_path / "critic.safetensors")
    again = ov.SoftPrompt.load(tmp_path / "critic.safetensors")
    for got, row in zip(
        *(ours(model, "bert", "SEQ_CLS", each, TEXTS, "right") for each in (again, prompt)), strict=True
    ):
        assert torch.equal(got, row)


def test_predictions_are_those_of_peft(tmp_path: Path) -> None:
    """`ov.predict` puts virtual tokens where the imported prompt says, too."""
    case = ("bert", "SEQ_CLS")
    folder, model = saved(tmp_path / "critic", *case, "prompt"), build(*case)
    prompt = peft.load(folder, model, labels=["bad", "good"])
    wanted = theirs(loaded(folder, *case), *case, TEXTS)
    for got, logits in zip(ov.predict(model, tokenizer("bert"), TEXTS, prompt), wanted, strict=True):
        assert got.probabilities == pytest.approx(dict(zip(["bad", "good"], logits.softmax(0).tolist(), strict=True)))


def test_imported_prompts_of_several_kinds_in_one_batch(tmp_path: Path) -> None:
    """What PEFT cannot do. Oracle: PEFT, each adapter by itself."""
    case = ("llama", "CAUSAL_LM")
    model = build(*case)
    folders = [saved(tmp_path / kind, *case, kind) for kind in ("prefix", "prompt", "p-tuning-lstm")]
    prompts = [peft.load(folder, model) for folder in folders]
    batch = ov.encode(tokenizer("llama"), TEXTS, prompts, spec=ov.ModelSpec.of(model))
    with torch.no_grad(), ov.prompts(model, prompts, batch):
        logits = model(**batch.inputs()).logits
    for number, folder in enumerate(folders):
        (wanted,) = theirs(loaded(folder, *case), *case, TEXTS[number : number + 1])
        torch.testing.assert_close(logits[number, batch.attention_mask[number].bool()], wanted, **tolerance("llama"))
