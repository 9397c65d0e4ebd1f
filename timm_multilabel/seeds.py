"""What is random in a step: a function of numbers that a run which goes on knows again."""
import numpy as np
from timm.utils import random_seed

MODEL, ERASING, MIXING = range(3)
"""What draws: the model (dropout, stochastic depth), random erasing, Mixup and CutMix."""


def seed_step(what: int, *numbers: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (also the devices') for what follows in a step.

    Args:
        what: What draws next, so that no two draw the same.
        numbers: Seed of the run, epoch, rank, step (0 or more each).
    """
    random_seed(int(np.random.SeedSequence((what, *numbers)).generate_state(1)[0]), 0)
