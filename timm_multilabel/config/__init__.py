"""Settings: typed, frozen, built once. The only place where a default is written."""
