"""A converted model behind HTTP: OpenAI's completions and chat, and a page to watch it work."""
