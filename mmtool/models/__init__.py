"""Model families, one folder each; what several share is in `common`."""
