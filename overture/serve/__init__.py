"""One frozen model, everyone's prompt: an embedded server that speaks the API of OpenAI."""
