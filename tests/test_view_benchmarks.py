"""The benchmarks of views and data, on a few small photos: that they run, and what they count."""
import pytest
import torch

from benchmarks import train, views
from benchmarks.program import run_benchmark


def test_pipelines_make_two_views_each():
    photos = views.read_photos(None, 3, 80, 60)
    cases = views.pipelines(32, photos, torch.device('cpu'))
    found = views.measure(cases, rounds=1)
    assert {'simclr', "fork's way", '--cache device (cpu)', 'torchvision v2'} <= set(found)
    assert all(len(rates) == 1 and rates[0] > 0 for rates in found.values())


def test_differences_are_of_the_colors(capsys):
    run_benchmark(views, ['--differences', '--count', '20'])
    lines = {line[:34].strip(): float(line[34:].split()[0]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines['brightness'] < 1 and lines['saturation'] < 1  # their rounding alone
    assert 1 < lines['all, always'] < 20


@pytest.mark.slow
def test_share_of_waiting(capsys):
    flags = ['--model', 'test_resnet', '--img-size', '32', '-b', '8', '--count', '32', '--photo-size', '80', '60',
             '--workers', '0', '--rounds', '1', '--device', 'cpu']
    run_benchmark(train, flags)
    out = capsys.readouterr().out.splitlines()
    assert out[-2].split()[0] == '0' and out[-1].startswith('under 5% of a step is spent waiting with')


def test_picture(tmp_path):
    photos = tmp_path / 'photos'
    photos.mkdir()
    for number, photo in enumerate(views.read_photos(None, 2, 90, 70)):
        (photos / f'{number}.jpg').write_bytes(photo)
    run_benchmark(views, ['--picture', str(tmp_path / 'p.png'), '--photos', str(photos)])
    assert (tmp_path / 'p.png').stat().st_size > 10000


