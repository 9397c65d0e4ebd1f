"""From a CSV and image files to batches of views and class indices."""
