"""Ask a model: the terminal chat, one question, or every row of a dataset."""
