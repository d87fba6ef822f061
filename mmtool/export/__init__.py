"""What `mmtool export` does: merge adapters, convert, quantise, write GGUF, publish."""
