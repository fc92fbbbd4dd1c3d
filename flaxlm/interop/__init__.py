"""Hugging Face's formats, read and written without torch, transformers or safetensors.

The readers of files need NumPy alone. The tests prove that what is written here is what
the original libraries read, and the other way around.
"""
