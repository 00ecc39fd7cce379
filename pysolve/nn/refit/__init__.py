"""The original and the smaller network side by side, layer after layer refitted."""
