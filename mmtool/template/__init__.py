"""Conversations to token ids, labels and media tensors, the same way for training and for inference."""
