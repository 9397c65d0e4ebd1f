"""Where progress bars are shown."""
from tqdm.auto import tqdm

OFF_TERMINAL: bool | None = False if any('notebook' in base.__module__ for base in tqdm.__mro__) else None
"""As tqdm's `disable`: bars are shown on a terminal, and in a notebook that has widgets; nowhere else."""
