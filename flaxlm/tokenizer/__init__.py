"""Text to token ids and back, the same ids as the library a tokenizer comes from."""
