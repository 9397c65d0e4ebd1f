"""timm's checkpoint saver, whose files are whole at any moment, with what a run needs to go on within an epoch."""
from pathlib import Path
from typing import Any

import torch
from timm.utils import CheckpointSaver

from timm_multilabel.files import atomic_write, link_whole


class WholeSaver(CheckpointSaver):
    """timm's saver, history and file names.

    timm's own writes in place of a temporary file and removes a file before it puts another there, so that a run that
    is killed may leave none. Here each is written beside, flushed and renamed.

    `progress`: what else goes into the next checkpoint; plain values and tensors.
    """
    progress: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]  # timm's has no types
        self.progress = {}
        self.is_saved = False

    @property
    def folder(self) -> Path:
        return Path(self.checkpoint_dir)

    @property
    def last(self) -> Path:
        """The checkpoint of the last epoch."""
        return self.folder / f'last{self.extension}'

    @property
    def best(self) -> Path:
        """The checkpoint of the best epoch."""
        return self.folder / f'model_best{self.extension}'

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        if self.is_saved:
            return
        state = {'epoch': epoch, 'version': 2, 'optimizer': self.optimizer.state_dict()}
        if self.amp_scaler is not None:
            state[self.amp_scaler.state_dict_key] = self.amp_scaler.state_dict()
        state |= self.task.get_checkpoint_state(unwrap_fn=self.unwrap_fn)
        state |= self.task.get_checkpoint_state(ema=True, unwrap_fn=self.unwrap_fn)
        if metric is not None:
            state['metric'] = metric
        state |= {'saver': self.state_dict(epoch, metric), **self.progress}
        with atomic_write(save_path) as file:
            torch.save(state, file)

    def _replace(self, src: str, dst: str) -> None:
        if not self.is_saved:
            Path(src).replace(dst)

    def _duplicate(self, src: str, dst: str) -> None:
        link_whole(src, dst)

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> tuple[float | None, int | None]:
        """Save the end of an epoch as timm does; what was saved within epochs is then of no more use."""
        best: tuple[float | None, int | None]
        best = super().save_checkpoint(epoch, metric)  # type: ignore[no-untyped-call]  # timm's has no types
        for path in self.folder.glob(f'{self.recovery_prefix}-*{self.extension}'):
            path.unlink()
        return best

    def save_within(self, epoch: int, step: int) -> Path:
        """Save the state after a number of steps of an epoch as `recovery-<epoch>-<steps>`; the one before is kept.

        Returns:
            The file.
        """
        earlier = sorted(self.folder.glob(f'{self.recovery_prefix}-*{self.extension}'), key=_place)
        path = self.folder / f'{self.recovery_prefix}-{epoch}-{step}{self.extension}'
        self._save(str(path), epoch)
        for each in earlier[:-1]:
            each.unlink()
        return path

    def go_on(self, path: Path, state: dict[str, Any]) -> None:
        """Take over the history that a checkpoint carries.

        That of an epoch is ranked again, as the run may have been killed before that, and becomes the last one.
        """
        history = {**state.get('saver', {})}
        epoch, metric = history.pop('pending', (None, None))
        self.load_state_dict(history)
        self.progress = {name: state[name] for name in ('run',) if name in state}
        if 'within' not in state and epoch is not None:
            self.is_saved = path.name == self.last.name
            self.save_checkpoint(epoch, metric)
            self.is_saved = False


def _place(path: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in path.name.split('.')[0].split('-')[1:] if part.isdigit())
