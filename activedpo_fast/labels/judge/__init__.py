"""Labels from a language model behind a chat-completions server."""
