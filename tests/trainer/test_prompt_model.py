"""`PromptModel` as a module: what it computes, what it trains, what it saves."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import overture as ov
from overture.errors import BaseMismatchError, CheckpointError, ConfigError, OvertureError, UnsupportedModelError

METHODS = {
    "prefix": ov.PrefixTuning(num_virtual_tokens=4, reparameterization_hidden=16),
    "raw": ov.PrefixTuning(num_virtual_tokens=3, reparameterization=False),
    "prompt": ov.PromptTuning(num_virtual_tokens=5),
    "p": ov.PTuning(num_virtual_tokens=4),
    "deep": ov.DeepPrompt(num_virtual_tokens=3),
}
# fp64, except norms and rotary angles, which are fp32 inside these models.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def _moved(model):
    """The model with its prompt away from its start, as after some training."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def _gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def _equal(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_a_prompt_started_from_words_is_those_words_before_every_row(shape, method, make_model, tokenizer, batch):
    """Oracle: the untouched model with the words in its input."""
    base = make_model(shape).eval()
    words = tokenizer("ahoy", return_tensors="pt").input_ids
    ids = torch.cat([words.expand(2, -1), batch["input_ids"]], dim=1)
    mask = torch.cat([torch.ones(2, words.shape[1], dtype=torch.long), batch["attention_mask"]], dim=1)
    with torch.no_grad():
        wanted = base(input_ids=ids, attention_mask=mask).logits[:, words.shape[1] :]
    options = {field: getattr(method, field) for field in ("reparameterization",) if hasattr(method, field)}
    model = ov.PromptModel(base, type(method)(init="ahoy", **options), tokenizer=tokenizer)
    with torch.no_grad():
        got = model(**batch)
        # What a caller gets who goes round `__call__`.
        direct = model.forward(**batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], wanted[real], **CLOSE)
    assert torch.equal(got.logits, direct.logits)
    assert model.config is base.config
    assert (model.device, model.dtype) == (base.device, base.dtype)
    assert model.get_input_embeddings() is base.get_input_embeddings()


def test_only_the_prompt_is_trained_and_the_base_models_dropout_stays_off(method, make_model, batch):
    """Oracle: the base model's own bytes before, and the loss in evaluation mode."""
    base = make_model("gpt2")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = ov.PromptModel(base, method).train()
    assert model.training
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"prompt.{name}" for name, _ in model.prompt.named_parameters()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        model.eval()
        with torch.no_grad():
            assert torch.equal(loss, model(**batch).loss)
        model.train()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"every_n_layers": 2}, {"offload": True}], ids=str)
def test_gradient_checkpointing_recomputes_and_changes_nothing(reentrant, options, method, model, batch):
    """Oracle: the gradients without it. Recomputing repeats the same arithmetic, so they are equal bit for bit."""
    model = _moved(ov.PromptModel(model, method)).train()
    wanted = _gradients(model, batch)
    calls = []
    for layer, block in enumerate(model.base_model.layers):
        block.self_attn.register_forward_pre_hook(lambda *_, layer=layer: calls.append(layer))
    _gradients(model, batch)
    once = len(calls)
    calls.clear()
    model.activation_checkpointing_enable({"use_reentrant": reentrant}, **options)
    assert model.is_gradient_checkpointing
    _equal(_gradients(model, batch), wanted, rtol=0, atol=0)
    repeated = [0, 2] if options.get("every_n_layers") else [0, 1, 2]
    assert len(calls) == once + len(repeated)
    assert sorted(calls[once:]) == repeated
    model.enable_input_require_grads()
    _equal(_gradients(model, batch), wanted, rtol=0, atol=0)
    calls.clear()
    model.gradient_checkpointing_disable()
    _gradients(model, batch)
    assert len(calls) == once


def _small(config, **options):
    torch.manual_seed(0)
    sizes = dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 48)
    return config(vocab_size=258, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **sizes, **options)


OTHERS = {
    # One block serves every layer, each with a prefix of its own.
    "albert": lambda: AlbertForMaskedLM(
        _small(AlbertConfig, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    ),
    "bart": lambda: BartForConditionalGeneration(
        _small(BartConfig, d_model=32, encoder_layers=2, decoder_layers=2, max_position_embeddings=64)
    ),
    "t5": lambda: T5ForConditionalGeneration(_small(T5Config, d_model=32, d_kv=8, num_heads=4, num_layers=2)),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("shape", OTHERS)
def test_gradient_checkpointing_beyond_decoders(shape, reentrant, batch):
    """Oracle: the gradients without it."""
    model = _moved(ov.PromptModel(OTHERS[shape]().double(), METHODS["raw"])).train()
    wanted = _gradients(model, batch)
    assert all(gradient.abs().max() > 0 for gradient in wanted.values())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # What comes together from several blocks adds up in another order.
    _equal(_gradients(model, batch), wanted, **CLOSE)


def test_an_offloaded_base_trains_as_one_in_memory(make_model, batch, tmp_path):
    """Oracle: the gradients of the base model in memory."""
    base = make_model(dtype=torch.float32)
    base.save_pretrained(tmp_path)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    offloaded = type(base).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "disk")
    got = _gradients(_moved(ov.PromptModel(offloaded, METHODS["prefix"])).train(), batch)
    wanted = _gradients(_moved(ov.PromptModel(base, METHODS["prefix"])).train(), batch)
    _equal(got, wanted, rtol=0, atol=0)


def test_dropout_of_a_prefix_draws_from_the_loops_own_stream(model, batch):
    """Oracle: the same seed, the same loss; no dropout in evaluation mode."""
    model = _moved(ov.PromptModel(model, ov.PrefixTuning(num_virtual_tokens=4, dropout=0.5))).train()
    losses = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        losses.append(model(**batch).loss.item())
    assert losses[0] == losses[2] != losses[1]
    model.eval()
    assert model(**batch).loss.item() == model(**batch).loss.item()


def test_a_packed_row_keeps_its_texts_apart(method, model, batch):
    """As TRL packs without padding: texts in one row, told apart by position ids. Oracle: each text in its own row."""
    model = _moved(ov.PromptModel(model, method)).eval()
    texts = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    packed = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    with torch.no_grad():
        got = model(input_ids=packed, position_ids=positions, use_cache=False).logits[0]
        wanted = torch.cat([model(input_ids=text[None]).logits[0] for text in texts])
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_the_saved_prompt_is_the_trained_one(method, make_model, batch, tmp_path):
    """Folded equals unfolded, in logits and in `generate`, and training goes on from the folder where it was."""
    base = make_model()
    model = _moved(ov.PromptModel(base, method, name="poet")).eval()
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "model.safetensors", "prompt.safetensors"]
    assert (tmp_path / "model.safetensors").stat().st_size < 100_000
    prompt = ov.SoftPrompt.load(tmp_path / "prompt.safetensors")
    assert prompt.name == "poet"
    inputs = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    with torch.no_grad():
        wanted = model(**batch).logits
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        with ov.prompts(base, prompt):
            # A prompt is stored in fp32.
            torch.testing.assert_close(base(**batch).logits, wanted, rtol=1e-4, atol=1e-4)
            assert torch.equal(base.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)
    again = ov.PromptModel.from_pretrained(tmp_path, make_model())
    assert (again.method, again.name) == (method, "poet")
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, wanted)
    _equal(_gradients(again.train(), batch), _gradients(model.train(), batch), rtol=0, atol=0)


def test_a_prompt_from_words_is_read_back_without_a_tokenizer(model, tokenizer, tmp_path):
    method = ov.PromptTuning(init=("ahoy", "aye"))
    ov.PromptModel(model, method, tokenizer=tokenizer).save_pretrained(tmp_path)
    assert ov.PromptModel.from_pretrained(tmp_path, model).method == method


def test_a_state_holds_what_is_trained_and_fits_that_alone(make_model):
    """Trainer loads states with strict=False: what would load nothing must say so."""
    model = ov.PromptModel(make_model(), METHODS["prefix"])
    state = model.state_dict()
    trained = {f"prompt.{name}" for name in model.prompt.state_dict()}
    assert set(state) == trained | {"base_digest"}
    assert not model.load_state_dict(state).missing_keys
    with pytest.raises(CheckpointError, match=r"a state of this method, with 'prompt\.offset\.offset'"):
        ov.PromptModel(make_model(), METHODS["raw"]).load_state_dict(state, strict=False)
    longer = ov.PrefixTuning(num_virtual_tokens=5, reparameterization_hidden=16)
    with pytest.raises(CheckpointError, match=r"\(5, 96\) numbers in 'prompt\.start'; got \(4, 96\)"):
        ov.PromptModel(make_model(), longer).load_state_dict(state, strict=False)
    with pytest.raises(BaseMismatchError, match=r"trained on this base model"):
        ov.PromptModel(make_model(seed=2), METHODS["prefix"]).load_state_dict(state, strict=False)
    # Inside another module, as DDP wraps it.
    outer = torch.nn.ModuleDict({"module": model})
    assert set(outer.state_dict()) == {f"module.{name}" for name in state}
    assert not outer.load_state_dict(outer.state_dict()).missing_keys


def test_folders_that_cannot_be_read(make_model, tmp_path):
    ov.PromptModel(make_model(), METHODS["prompt"]).save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError, match=r"the base model that the prompt 'prompt' was tuned on"):
        ov.PromptModel.from_pretrained(tmp_path, make_model(seed=2))
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"the state of a training.*Copy the whole folder again"):
        ov.PromptModel.from_pretrained(tmp_path, make_model())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the state of a training"):
        ov.PromptModel.from_pretrained(tmp_path, make_model())


def test_a_card_that_somebody_wrote_is_left_alone(model, tmp_path):
    model = ov.PromptModel(model, METHODS["raw"])
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_an_adapter_underneath_trains_with_the_prompt_if_asked(make_model, batch, tmp_path):
    """Oracle: a plain loop over the PEFT model inside `prompts`."""
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)

    def adapted():
        base = make_model()
        torch.manual_seed(5)
        return get_peft_model(base, lora)

    frozen = ov.PromptModel(adapted(), METHODS["raw"]).train()
    assert all(name.startswith("prompt.") for name in _gradients(frozen, batch))
    assert not any(module.training for module in frozen.base.modules())

    base = adapted()
    model = _moved(ov.PromptModel(base, METHODS["raw"], train_adapters=True)).eval()
    got = _gradients(model, batch)
    model.zero_grad()
    with ov.prompts(base, model.prompt()):
        base(**batch).loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    _equal(got, wanted, rtol=0, atol=0)
    assert any("lora_A" in name and gradient.abs().max() > 0 for name, gradient in got.items())
    assert set(model.state_dict()) == {*got, "prompt.start", "prompt.scale"}

    model.train()
    on = {name for name, module in base.named_modules() if module.training and isinstance(module, torch.nn.Dropout)}
    assert on == {name for name, _ in base.named_modules() if name.endswith("lora_dropout.default")}

    model.eval().save_pretrained(tmp_path)
    adapter = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
    again = ov.PromptModel.from_pretrained(tmp_path, adapter, train_adapters=True).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_what_cannot_be_trained_is_refused(make_model, model):
    inside = ov.PTuning(template="[V2] {text} [V2]")
    with pytest.raises(ConfigError, match=r"virtual tokens in front of the text.*Tune it with overture\.tune"):
        ov.PromptModel(model, inside)
    with pytest.raises(ConfigError, match=r"a tokenizer, to start from words; got init='ahoy' and no tokenizer"):
        ov.PromptModel(model, ov.PromptTuning(init="ahoy"))
    with pytest.raises(ConfigError, match=r"a PEFT model with trainable adapters"):
        ov.PromptModel(make_model(), METHODS["raw"], train_adapters=True)
    with pytest.raises(UnsupportedModelError, match=r"a transformers model; got Linear"):
        ov.PromptModel(torch.nn.Linear(2, 2), METHODS["raw"])


def test_threads_that_share_a_model_are_refused(model, monkeypatch):
    """`nn.DataParallel` over two GPUs. Its first act is to copy the model; there need be no GPU for that."""
    model = ov.PromptModel(model, METHODS["raw"])
    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_get_device_index", lambda device, _: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", lambda *_, **__: [[], []])
    with pytest.raises(UnsupportedModelError, match=r"one process for every GPU; got nn\.DataParallel"):
        torch.nn.parallel.replicate(model, [0, 1])


def test_a_copy_is_a_model_of_its_own(model, batch):
    """As averages of weights keep one. Oracle: the original's loss, before and after."""
    model = _moved(ov.PromptModel(model, METHODS["prefix"])).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**batch).loss
        assert torch.equal(twin(**batch).loss, before)
        for parameter in twin.prompt.parameters():
            parameter.add_(1)
        assert torch.equal(model(**batch).loss, before)
        assert not torch.equal(twin(**batch).loss, before)


def test_the_prompt_is_fp32_on_a_bf16_base(make_model, batch):
    model = ov.PromptModel(make_model(dtype=torch.bfloat16), METHODS["prefix"]).train()
    gradients = _gradients(model, batch)
    assert model.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert model.soft_prompt().value.keys[0].dtype == torch.float32


class _Uploads:
    """Stands for the Hub: notes what would be uploaded."""

    def __init__(self, monkeypatch):
        self.files = {}
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload_folder)

    def create_repo(self, repo_id, **options):
        return type("Url", (), {"repo_id": repo_id})()

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.files[repo_id] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return f"https://hub/{repo_id}/commit/1"


def test_push_to_hub_uploads_the_folder(model, batch, monkeypatch, tmp_path):
    hub = _Uploads(monkeypatch)
    model = _moved(ov.PromptModel(model, METHODS["prefix"], name="poet")).eval()
    assert model.push_to_hub("anna/poet", private=True) == "https://hub/anna/poet/commit/1"
    files = hub.files["anna/poet"]
    assert set(files) == {"README.md", "model.safetensors", "prompt.safetensors"}
    assert files["README.md"].startswith(
        b'---\nlibrary_name: overture\ntags:\n- overture\n- soft-prompt\n- "prefix"\n---'
    )
    model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files


def test_push_to_hub_without_a_network_says_so(model):
    with pytest.raises(OvertureError, match=r"a repository on the Hub that can be written; got 'anna/poet'"):
        ov.PromptModel(model, METHODS["raw"]).push_to_hub("anna/poet")
