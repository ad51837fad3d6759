"""Prompts in vLLM: a connector that puts their keys and values before requests, and routes to ask for one by name."""
