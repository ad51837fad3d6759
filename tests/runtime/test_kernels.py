"""The fused kernels. Oracle: softmax over the scores in fp64, differentiated by autograd; on machines without a GPU,
the shapes that torch itself derives for the CUDA kernels, and that it takes their arguments.
"""

from __future__ import annotations

import pytest
import torch

from overture.runtime.kernels import CpuFlash, CudaEfficient, CudaFlash, Mask, kernel_for
from overture.runtime.merge import additive

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SIZES = (8, 20)
CASES = {
    "cpu": (CpuFlash, "cpu", torch.float64),
    "cuda flash": (CudaFlash, "cuda", torch.bfloat16),
    "cuda efficient": (CudaEfficient, "cuda", torch.float32),
}


def _inputs(device, dtype, size, *, masked, queries=5, keys=5):
    """Two rows, four heads of queries over two of keys; of the second row the first query sees nothing."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, queries, size, device=device).to(dtype)
    key, value = (torch.randn(2, 2, keys, size, device=device).to(dtype) for _ in "kv")
    grad = torch.randn(2, 4, queries, size, device=device).to(dtype)
    mask = None
    if masked:
        seen = torch.ones(2, 1, queries, keys, dtype=torch.bool, device=device).tril()
        seen = seen & (torch.arange(keys, device=device) >= torch.arange(2, device=device)[:, None])[:, None, None]
        mask = additive(seen, dtype)
    return grad, (query, key, value), mask


def _exact(grad, inputs, mask, causal):
    query, key, value = (t.detach().double().requires_grad_() for t in inputs)
    keys, values = (t.repeat_interleave(2, 1) for t in (key, value))
    scores = query @ keys.mT / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask.scores.double()
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    sees = (scores > -torch.inf).any(-1, keepdim=True)
    output = (torch.where(sees, scores, 0).softmax(-1) * sees) @ values
    return output, scores.logsumexp(-1), torch.autograd.grad(output, (query, key, value), grad.double())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["causal", "masked", "plain"])
@pytest.mark.parametrize(
    "case", ["cpu", pytest.param("cuda flash", marks=needs_gpu), pytest.param("cuda efficient", marks=needs_gpu)]
)
def test_output_sum_and_gradients(case, form, size):
    """Tolerance: fp64 to 1e-12 (sums of ten products of size one); fp32 to 1e-5; bf16 to 2^-6, as inputs reach four."""
    kernel, device, dtype = CASES[case]
    if case == "cuda flash" and form == "masked":
        pytest.skip("flash attention takes no mask on a GPU")
    grad, inputs, mask = _inputs(device, dtype, size, masked=form == "masked")
    causal = form == "causal"
    attended = kernel().forward(*inputs, mask, causal, None)
    finite = attended._replace(lse=attended.lse.masked_fill(attended.lse == -torch.inf, 0))
    gradients = kernel().backward(grad, inputs, mask, finite, causal, None)
    output, lse, wanted = _exact(grad, inputs, mask, causal)
    unit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    for got, true in zip((attended.output, attended.lse, *gradients), (output, lse, *wanted), strict=True):
        torch.testing.assert_close(got.double(), true, rtol=unit, atol=unit * 4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["causal", "masked", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes_on_a_gpu(dtype, form, size):
    """Runs nothing: torch checks the call and derives the shapes, on its device without numbers."""
    grad, inputs, mask = _inputs("meta", dtype, size, masked=form == "masked")
    kernel = kernel_for(inputs[0], mask)
    assert isinstance(kernel, CudaFlash if dtype == torch.bfloat16 and mask is None else CudaEfficient)
    attended = kernel.forward(*inputs, mask, form == "causal", None)
    gradients = kernel.backward(grad, inputs, mask, attended, form == "causal", None)
    assert attended.output.shape == inputs[0].shape
    assert attended.lse.shape == inputs[0].shape[:3]
    assert [g.shape for g in gradients] == [t.shape for t in inputs]


def test_a_mask_of_nothing():
    """Oracle: a query that no key is left for has no sum."""
    mask = additive(torch.tensor([[True, False], [False, False]])[None, None], torch.float64)
    assert isinstance(mask, Mask)
    assert mask.hidden.tolist() == [[[False, True]]]
    tensors = [torch.ones(1, 1, 2, 8, dtype=torch.float64) for _ in "qkv"]
    attended = CpuFlash().forward(*tensors, mask, False, None)
    assert attended.lse[0, 0, 1] == -torch.inf
    assert (attended.output[0, 0, 1] == 0).all()
