"""Turns text into token ids and back, with the ids of the tokenizer's own library."""
