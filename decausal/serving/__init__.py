"""Serves a converted model over HTTP: OpenAI's completions and chat, and a page to watch it work."""
