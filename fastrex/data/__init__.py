"""Data: the index of an image folder, the plan of every batch, decoding and loading."""
