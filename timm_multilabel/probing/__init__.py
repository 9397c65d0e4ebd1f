"""Heads on frozen features: the features of rows kept on disk, and all heads fitted on them for a grid at once."""
