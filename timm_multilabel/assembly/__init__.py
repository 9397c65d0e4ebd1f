"""From settings to parts: data, splits, loaders, model and task, checks, phases, stored predictions."""
