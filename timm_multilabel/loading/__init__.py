"""Rows and view recipes -> batches on the device."""
