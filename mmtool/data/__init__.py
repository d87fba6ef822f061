"""Datasets: files to rows, rows of any format to conversations."""
