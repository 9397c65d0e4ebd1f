"""Trained models at work: what they say of images, and where images lie among each other."""
