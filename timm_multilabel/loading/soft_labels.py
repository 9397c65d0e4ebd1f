"""What teachers say of the images of rows, kept in a file that all processes of a machine share."""
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from timm_multilabel.loading.shared import SharedBytes


@dataclass
class Answers:
    """A row of S numbers for each of M images, in float16.

    Log-probabilities keep a relative precision of 2^-11 in it, whereas probabilities below 6e-8 would be 0.

    Args:
        shared: Their bytes.
        width: S.
    """
    shared: SharedBytes
    width: int

    @staticmethod
    def size(images: int, width: int) -> int:
        """How many bytes they take."""
        return 2 * images * width

    @property
    def array(self) -> np.ndarray:
        """The numbers (M, S)."""
        return self.shared.array.view(np.float16).reshape(-1, self.width)

    def finish(self, path: Path) -> None:
        """Put a file that `SharedBytes.in_file` made into its place, from where it can only be read.

        Raises:
            OSError: The system does not let it be done.
        """
        assert self.shared.descriptor is not None
        os.fchmod(self.shared.descriptor, os.fstat(self.shared.descriptor).st_mode & 0o444)
        os.fsync(self.shared.descriptor)
        Path(self.shared.path).replace(path)


@dataclass
class SoftLabels:
    """The answers for rows.

    Args:
        answers: Those for all images.
        places: Which of the images each row has (N,).
    """
    answers: Answers
    places: np.ndarray

    @property
    def width(self) -> int:
        """The numbers of a row."""
        return self.answers.width

    def of(self, rows: Sequence[int] | slice) -> torch.Tensor:
        """The answers (B, S) for rows, in float32."""
        found: Any = self.answers.array[self.places[rows]]
        return torch.from_numpy(found.astype(np.float32))
