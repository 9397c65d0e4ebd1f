"""Run folders at addresses: worked on in a folder of this machine, whose files are sent whole after each save."""
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm_multilabel.config.train import TrainSettings
from timm_multilabel.distributed import all_objects, ranks_here, world
from timm_multilabel.errors import CheckpointError, OutputError, SettingError, UserError
from timm_multilabel.files import read_json, write_atomic
from timm_multilabel.log import Say
from timm_multilabel.places import (
    Address,
    entry_of,
    fetch,
    files_below,
    local_path,
    path_of,
    remove_object,
    write_object,
)
from timm_multilabel.stores import is_address
from timm_multilabel.temporary import temporary_path

_SENT = '.sent.json'
"""What was sent to the address or fetched from it: {file: [length, time of change, stamp at the address]}."""

_CHECKPOINT = '.pth.tar'
_PHASE = re.compile(r'[0-9]+-.')


def at_workplace(settings: TrainSettings, take: Callable[[Path], None], say: Say) -> TrainSettings:
    """Settings whose --output and --resume name folders of this machine in place of addresses.

    The files of a run that goes on are fetched. All ranks call it together; the first of each machine fetches.

    Args:
        settings: Of the run.
        take: Keeps other processes out of a run folder of this machine; the first rank calls it.
        say: Tells a line.

    Raises:
        UserError: The address cannot be read, or holds a run already, or another process trains in the workplace.
    """
    run = settings.run
    if not is_address(run.output) and not is_address(run.resume):
        return settings
    _check_machines(settings)
    restarted = any(all_objects(int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))))  # by torchrun
    changed: dict[str, Any] = {}
    if is_address(run.output):
        changed['output'] = str(workplace(run.output, settings))
    if run.resume is not None and is_address(run.resume):
        changed['resume'] = str(workplace(run.resume, settings))
    wrong = None
    if ranks_here()[0] == world()[0]:
        try:
            folder = _run_folder(settings)
            if folder is None:
                pass
            elif run.resume is None and not restarted:
                if any(name.endswith(_CHECKPOINT) for name in _listed(folder)):
                    raise CheckpointError(
                        f'{folder}: holds a run already; go on with it (--resume auto), choose another --experiment, '
                        'or remove it')
            else:
                place = Workplace(folder, workplace(folder, settings))
                if world()[0] == 0:
                    take(place.path)
                if fetched := place.fetch():
                    say(f'{folder}: fetched {fetched} files to {place.path}')
        except UserError as error:
            wrong = error.line
    for theirs in all_objects(wrong):
        if theirs is not None:
            raise CheckpointError(theirs)
    return settings.replace(**changed)


def _check_machines(settings: TrainSettings) -> None:
    """Refuse phases with earlier ones as teachers on several machines: only the first has what those have saved.

    Raises:
        SettingError: There are such.
    """
    if len(ranks_here()) == world()[1]:
        return
    names = [each.name for each in settings.phases]
    for index, each in enumerate(settings.phases):
        for name in each.settings.teaching.teacher or ():
            if name in names[:index]:
                raise SettingError(
                    f"phase '{each.name}': its teacher is phase '{name}', whose checkpoint is on the first of several "
                    'machines only where --output is an address; name a folder that all machines share as --output')


def _run_folder(settings: TrainSettings) -> Path | None:
    """The address of the run folder that --resume names, or else --output and --experiment; None where there is none.

    Raises:
        DataError: The store gives no answer.
    """
    run = settings.run
    if run.resume is not None and is_address(run.resume):
        folder = path_of(run.resume)
        if folder.name.endswith(_CHECKPOINT):
            folder = folder.parent
        # A phase's folder has no args.yaml. A run folder with a time for its name looks the same, but for that.
        return folder.parent if _PHASE.match(folder.name) and not (folder / 'args.yaml').is_file() else folder
    named = is_address(run.output) and run.experiment and run.resume in ('auto', None)
    return path_of(run.output) / str(run.experiment) if named else None


def workplace(address: str | Path, settings: TrainSettings) -> Path:
    """Where a run folder at an address is worked on."""
    scheme, _, rest = str(path_of(address)).partition('://')
    return _root(settings) / scheme / rest


def workplace_at(folder: Path, settings: TrainSettings) -> 'Workplace | None':
    """A run folder as the workplace of an address, where it is one."""
    if not folder.absolute().is_relative_to(_root(settings)):
        return None
    scheme, *parts = folder.absolute().relative_to(_root(settings)).parts
    return Workplace(path_of(f'{scheme}://{"/".join(parts)}'), folder)


def _root(settings: TrainSettings) -> Path:
    return local_path(settings.data.cache_dir).expanduser().absolute() / 'runs'


class Workplace:
    """A run folder of this machine whose files go to an address.

    Args:
        address: Where the files go.
        path: The folder.
    """

    def __init__(self, address: Path, path: Path):
        self.address, self.path = address, path

    def send(self) -> str | None:
        """Send what has changed since the last time, and remove what has gone; a line on what could not be sent."""
        sent = self._sent()
        before = dict(sent)
        try:
            for name in sorted(self._files(), key=lambda name: name.endswith(_CHECKPOINT)):
                state = (self.path / name).stat()
                if sent.get(name, [])[:2] != [state.st_size, state.st_mtime_ns]:
                    address = str(self.address / name)
                    write_object(self.path / name, address)
                    sent[name] = [state.st_size, state.st_mtime_ns, entry_of(address).stamp]
            for name in [name for name in sent if not (self.path / name).exists()]:
                remove_object(str(self.address / name))
                del sent[name]
        except OSError as error:
            return f'{self.address}: cannot be written ({error.strerror}); the files are in {self.path}'
        finally:
            if sent != before:
                write_atomic(self.path / _SENT, json.dumps(sent))
        return None

    def finish(self) -> None:
        """Send the rest.

        Raises:
            OutputError: It cannot be sent.
        """
        if line := self.send():
            raise OutputError(f'{line}; --resume auto, with the same --output and --experiment, sends them')

    def fetch(self) -> int:
        """Fetch the files at the address that this folder has not; how many they were.

        A file here stays where that at the address is the one last sent or fetched: what was saved since is newer.

        Raises:
            CheckpointError: They cannot be read.
        """
        names, before, fetched = _listed(self.address), self._sent(), 0
        sent = {name: state for name, state in before.items() if name in names}  # else it would not be sent again
        try:
            for name in names:
                path, address = self.path / name, str(self.address / name)
                stamp = entry_of(address).stamp
                if path.is_file() and stamp and name in sent and sent[name][2] == stamp:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = temporary_path(path.parent, path.name)
                try:
                    fetch(address, temporary)
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
                sent[name] = [path.stat().st_size, path.stat().st_mtime_ns, stamp]
                fetched += 1
        except OSError as error:
            raise CheckpointError(f'{self.address}: cannot be fetched to {self.path} ({error.strerror})') from error
        if sent != before:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / _SENT, json.dumps(sent))
        return fetched

    def _files(self) -> list[str]:
        return [str(path.relative_to(self.path)) for path in self.path.rglob('*')
                if path.is_file() and not any(part.startswith('.') for part in path.relative_to(self.path).parts)]

    def _sent(self) -> dict[str, list[int]]:
        path = self.path / _SENT
        found: dict[str, list[int]] = read_json(
            path, 'what was sent of this run', 'remove it', lambda value: isinstance(value, dict),
        ) if path.is_file() else {}
        return found


def _listed(folder: Path) -> list[str]:
    """The names of the files in a run folder at an address and below.

    Without names with a part that begins with a dot, which are no run's: '..' would lead out of the folder.
    """
    assert isinstance(folder, Address)
    names = [path.removeprefix(f'{folder}/') for path in files_below(str(folder))]
    return [name for name in names if not any(part.startswith('.') for part in name.split('/'))]
