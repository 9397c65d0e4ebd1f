"""What a machine with a GPU but without a network lacks to run `benchmarks.gpu`: wheels, and a subset of photos.

The machine is x86-64 Linux with Python 3.12, PyTorch and torchvision. SciPy and scikit-learn are not among the wheels:
they are large, and no stage needs them. Wheels are compressed again, by LZMA, which takes two minutes and makes the
largest a third smaller.
"""
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from timm_multilabel.data.split_names import check_folder, find_split, no_split
from timm_multilabel.data.table import find_images, read_table
from timm_multilabel.errors import OutputError, UserError
from timm_multilabel.files import write_atomic

ROOT = Path(__file__).parents[2]
LIMIT = 60_000_000
"""Bytes of wheels and photos together."""
PACKAGES = ('huggingface-hub', 'matplotlib', 'opencv-python-headless==4.10.0.84', 'pandas', 'psutil', 'pytest',
            'pyyaml', 'safetensors', 'simplejpeg', 'tqdm')
"""With all that they need. The lowest OpenCV that is allowed, since it is the smallest."""
ALONE = ('timm',)
"""Without what it needs: that is PyTorch, and what is downloaded anyway."""
UNNEEDED = {
    'torch', 'torchvision', 'numpy', 'pillow', 'filelock', 'fsspec', 'typing-extensions',  # they come with PyTorch
    'hf-xet',  # imported by nothing that runs here
}
_UNNEEDED_FILES = re.compile(r'/tests/|^cv2/data/.*\.xml$|/sample_data/')
_OWN_VERSION = ('torch', 'torchvision', 'opencv-python-headless')  # other than in constraints.txt
_TAGS = [f'--platform=manylinux{version}_x86_64' for version in (
    *(f'_2_{minor}' for minor in range(28, 16, -1)), '2014', '_2_12', '2010', '_2_5', '1')]


def pack(folder: Path, has: Collection[str], images: Path | None, rows: int | None, commit: str) -> str:
    """Make a folder with what the machine lacks; it appears whole or not at all.

    Args:
        folder: It is made.
        has: Further packages that the machine has.
        images: A data directory, of which a subset is taken along as `folder / 'data'`: rows of its train.csv, and a
            quarter as many of its val.csv, drawn at random. Or a CSV from which both are drawn.
        rows: Rows for training; all by default.
        commit: Of this checkout, for the command.

    Returns:
        The sizes, and the command to run there.

    Raises:
        UserError: Wheels cannot be had, images are missing, or it is too large altogether.
    """
    if folder.exists():
        raise OutputError(f'{folder}: is there already; remove it or name another folder')
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}-') as aside:
        made, downloaded = Path(aside, 'made'), Path(aside, 'downloaded')
        made.mkdir()
        photos = 0 if images is None else copy_photos(images, rows, made / 'data')
        _check_size(0, photos)
        download(downloaded)
        left_out = UNNEEDED | {_canonical(name) for name in has}
        sizes = {}
        for wheel in sorted(downloaded.iterdir()):
            name = _canonical(wheel.name.split('-')[0])
            if name not in left_out:
                compress(wheel, made / wheel.name)
                sizes[name] = (made / wheel.name).stat().st_size
        _check_size(sum(sizes.values()), photos)
        made.rename(folder)
    lines = [f'{_megabytes(size)}  {name}' for name, size in sorted(sizes.items(), key=lambda item: -item[1])]
    if photos:
        lines.append(f'{_megabytes(photos)}  photos and their tables')
    return '\n'.join([
        *lines, f'{_megabytes(sum(sizes.values()) + photos)}  together', '',
        f'Copy this checkout and {folder} to the machine; then, in the checkout:', '',
        f'python3 -m pip install --no-index --no-deps --target /tmp/site {shlex.quote(str(folder))}/*.whl &&',
        f'PYTHONPATH=/tmp/site python3 -m benchmarks.gpu --minutes 8 --out gpu-results --commit {commit[:9]}'
        + (f' --data {shlex.quote(str(folder / "data"))}' if photos else '')])


def download(folder: Path) -> None:
    """Download wheels for Python 3.12 and manylinux, with the versions of constraints.txt.

    Raises:
        UserError: pip cannot.
    """
    folder.mkdir()
    with TemporaryDirectory() as scratch:
        constraints = Path(scratch, 'constraints.txt')
        constraints.write_text(''.join(
            line for line in (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines(keepends=True)
            if line.partition('==')[0] not in _OWN_VERSION), encoding='utf-8')
        for words in (PACKAGES, ('--no-deps', *ALONE)):
            ended = subprocess.run(
                [sys.executable, '-m', 'pip', 'download', '--quiet', '--only-binary=:all:', '--implementation=cp',
                 '--python-version=3.12', *_TAGS, f'--constraint={constraints}', f'--dest={folder}', *words],
                stderr=subprocess.PIPE, text=True)
            if ended.returncode:
                errors = [line for line in ended.stderr.splitlines() if line.startswith('ERROR')] or [ended.stderr]
                raise UserError(f'pip download failed: {" ".join(errors[-1].split())}')


def compress(wheel: Path, smaller: Path) -> None:
    """Write a wheel without its tests and data sets, its files compressed by LZMA, which pip reads too."""
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, 'w', zipfile.ZIP_LZMA) as made:
        for info in source.infolist():
            if _UNNEEDED_FILES.search(info.filename):
                continue
            content = source.read(info)
            info.compress_type = zipfile.ZIP_LZMA
            made.writestr(info, content)


def copy_photos(source: Path, rows: int | None, folder: Path) -> int:
    """Make a data directory of a subset; its bytes.

    Raises:
        UserError: There are no such tables or images.
    """
    (folder / 'images').mkdir(parents=True)
    names: dict[str, str] = {}
    for split, frame, column in _subsets(source, rows):
        for path in frame[column]:
            if path not in names:
                names[path] = f'images/{len(names)}{Path(path).suffix}'
                shutil.copyfile(path, folder / names[path])
        frame = frame.rename(columns={column: 'image_path'}).assign(image_path=[names[path] for path in frame[column]])
        write_atomic(folder / f'{split}.csv', frame.to_csv(index=False))
    return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())


def _subsets(source: Path, rows: int | None) -> Sequence[tuple[str, pd.DataFrame, str]]:
    """Rows of each split, with the paths of their images on this machine, and the column of those."""
    def read(path: Path) -> tuple[pd.DataFrame, str]:
        table = read_table(path)
        return table.frame.assign(**{table.image_column: find_images(table)}), table.image_column

    def drawn(frame: pd.DataFrame, count: int | None) -> pd.DataFrame:
        return frame if count is None else frame.sample(min(count, len(frame)), random_state=0)

    if source.suffix == '.csv':
        frame, column = read(source)
        shuffled = drawn(frame, len(frame) if rows is None else rows + max(1, rows // 4))
        count = len(shuffled) - max(1, len(shuffled) // 5)
        return [('train', shuffled[:count], column), ('val', shuffled[count:], column)]
    check_folder(source)
    found = []
    for split, count in (('train', rows), ('val', rows and max(1, rows // 4))):
        path = find_split(source, split)
        if not isinstance(path, Path):
            raise no_split(source, split)
        frame, column = read(path)
        found.append((split, drawn(frame, count), column))
    return found


def _check_size(wheels: int, photos: int) -> None:
    over = wheels + photos - LIMIT
    if over > 0:
        raise UserError(
            f'{_megabytes(wheels + photos)} are {_megabytes(over)} more than the {_megabytes(LIMIT)} that are allowed '
            f'({_megabytes(wheels)} of wheels, {_megabytes(photos)} of photos); name fewer --rows, or with --has what '
            'the machine has already')


def _megabytes(size: float) -> str:
    return f'{size / 1e6:.1f} MB'


def _canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r'[-_.]+', '-', name).lower()
