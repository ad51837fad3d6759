"""`/v1/completions`: a text goes on."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from overture.serve.protocol.completions import Completion, CompletionForm, CompletionRequest
from overture.serve.routes.writing import Order, check_ids, chosen, write
from overture.serve.service import Asker, House

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/completions", response_model=Completion)
async def complete(body: CompletionRequest, request: Request, house: House, caller: Asker) -> Response:
    """Go on with texts, token ids, or the columns of the prompt's template."""
    for item in body.items:
        if isinstance(item, tuple):
            check_ids(item, house.vocab_size, "prompt")
    choice = await chosen(house, caller, body)
    samplings = body.sampling(count=body.n or 1, most=body.most, logprobs=body.logprobs)
    order = Order(caller=caller, body=body, choice=choice, items=body.items, samplings=samplings)
    return await write(request, house, order, CompletionForm(choice.id, likelihoods=body.logprobs is not None))
