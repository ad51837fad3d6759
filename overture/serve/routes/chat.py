"""`/v1/chat/completions`: a chat goes on."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from overture.serve.protocol.chat import ChatCompletion, ChatForm, ChatRequest
from overture.serve.routes.writing import Order, chosen, write
from overture.serve.service import Asker, House

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def chat(body: ChatRequest, request: Request, house: House, caller: Asker) -> Response:
    """Answer the last message of a chat."""
    choice = await chosen(house, caller, body)
    samplings = body.sampling(count=body.n or 1, most=body.most, logprobs=body.alternatives)
    items = [[message.plain() for message in body.messages]]
    order = Order(caller=caller, body=body, choice=choice, items=items, samplings=samplings)
    return await write(request, house, order, ChatForm(choice.id, likelihoods=body.alternatives is not None))
