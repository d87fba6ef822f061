"""Engines turn requests (token ids and media tensors) into answers."""
