"""The command `timm-multilabel` and its subcommands."""
