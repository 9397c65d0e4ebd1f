"""Heads on frozen features: what is fitted, what is kept on disk, and the checkpoint that comes of it."""
import os
import pickle
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F

import timm_multilabel as tm
from tests.common import run_ranks, write_data
from timm_multilabel.api.probe import run_probe
from timm_multilabel.backbones import JoinedBackbones
from timm_multilabel.cli.parser import parse
from timm_multilabel.config.commands import ProbeSettings
from timm_multilabel.config.files import build
from timm_multilabel.heads import create_head, load_registry
from timm_multilabel.inference.predictions import Predictions
from timm_multilabel.labels import LabelSet, Quantity, TagSet
from timm_multilabel.probing.features import FeatureFile
from timm_multilabel.probing.fit import Axes, Grid, Labelled, fit_heads
from timm_multilabel.training.checkpoint import load_model, read_checkpoint

OWN = '''
import torch
from torch import nn
from timm_multilabel.heads import SoftmaxHead


class Normalized(SoftmaxHead):
    """Batch norm before the linear layer, and a loss that looks at a number, of which `vmap` has no batched form."""
    kind = 'normalized'

    def __init__(self, labels, in_features, *, drop: float = 0.0, smoothing: float = 0.0):
        super().__init__(labels, in_features, drop=drop, smoothing=smoothing)
        self.norm = nn.BatchNorm1d(in_features)

    def forward(self, features):
        return super().forward(self.norm(features))

    def loss(self, output, target):
        assert output.sum().item() == output.sum().item()
        return super().loss(output, target)
'''


class Steps:
    def __init__(self):
        self.count = 0

    def advance(self):
        self.count += 1


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Files with weights of two models."""
    folder = tmp_path_factory.mktemp('weights')
    for number, name in enumerate(('test_resnet', 'test_vit')):
        torch.manual_seed(number)
        torch.save(timm.create_model(name).state_dict(), folder / f'{name}.pth')
    return folder


def probe(data, weights, tmp_path, models=('test_resnet',), **settings):
    return tm.probe(data, **{
        'model': list(models), 'pretrained_path': [str(weights / f'{name}.pth') for name in models], 'img_size': 32,
        'workers': 0, 'device': 'cpu', 'epochs': 20, 'lrs': [0.03], 'weight_decays': [0.01, 0.001],
        'cache_dir': str(tmp_path / 'cache'), 'output': str(tmp_path / 'runs'), **settings})


def labelled(generator, rows, dtype=torch.float32):
    """Features that are correlated and not standardised, with labels of all kinds, some of them missing."""
    mix = torch.randn(6, 6, generator=generator)
    features = torch.randn(rows, 6, generator=generator) @ mix * torch.tensor([3, 1, 1, 0.1, 1, 5]) + 2
    rule = torch.randn(6, 3, generator=generator)
    noisy = (features - features.mean(0)) @ rule + torch.randn(rows, 3, generator=generator)
    color, tags, price = noisy.argmax(1).float(), (noisy[:, :2] > 0).float(), noisy[:, 2] / noisy[:, 2].std()
    targets = torch.stack([color, *tags.unbind(1), price], dim=1)
    for column, missing in enumerate((-1, -1, -1, torch.nan)):
        targets[column * 3:column * 3 + 3, column] = missing
    return Labelled(features.to(dtype), targets)


LABELS = {
    'color': LabelSet('color', ('blue', 'green', 'red')), 'style': TagSet('style', ('a', 'b')),
    'price': Quantity('price', 10.0, 2.0)}


def heads_of(in_features, **options):
    torch.manual_seed(0)
    kinds = {'color': 'softmax', 'style': 'tags', 'price': 'numeric'}
    return {name: create_head(labels, in_features, {'loss': kinds[name], 'input': 'features', **options.get(name, {})},
                              load_registry(None)) for name, labels in LABELS.items()}


def optimum(features, target, kind, decay, weights=None):
    """The weights of the least loss on standardised features, in float64, by L-BFGS; for the features as they are."""
    x = features.double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    width = {'color': 3, 'style': 2, 'price': 1}[kind]
    weight, bias = (torch.zeros(*shape, dtype=torch.float64, requires_grad=True) for shape in ((width, 6), (width,)))
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, tolerance_grad=1e-10, line_search_fn='strong_wolfe')

    def loss():
        output = x @ weight.T + bias
        if kind == 'color':
            data = F.cross_entropy(output, target[:, 0].long(), weight=weights, ignore_index=-1)
        elif kind == 'style':
            known = target != -1
            data = F.binary_cross_entropy_with_logits(output[known], target.double()[known])
        else:
            known = ~target[:, 0].isnan()
            data = F.smooth_l1_loss(output[known, 0], target[known, 0].double())
        return data + decay / 2 * weight.square().sum()

    def closure():
        solver.zero_grad()
        value = loss()
        value.backward()
        return value

    solver.step(closure)
    return weight.detach() / features.double().std(0, correction=0)


@pytest.mark.slow
def test_the_fit_is_the_optimum():
    """Every kind of linear head comes to the weights of the convex problem, in the features' own coordinates."""
    generator = torch.Generator().manual_seed(0)
    data = labelled(generator, 200)
    heads = heads_of(6, color={'class_weights': [1.0, 2.0, 0.5]})
    steps = Steps()
    fitted = fit_heads(heads, data, data, Grid([0.2], [0.1, 0.01], 200, 200, 0), steps)
    assert steps.count == 200
    columns = {'color': slice(0, 1), 'style': slice(1, 3), 'price': slice(3, 4)}
    for name, its in fitted.items():
        class_weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64) if name == 'color' else None
        weight = optimum(data.features, data.targets[:, columns[name]], name, its.weight_decay, class_weights)
        found = its.head.fc.weight.double()
        if name == 'color':  # the softmax does not see what all classes have
            found = found - found.mean(0)
        assert (found - weight).norm() < 0.01 * weight.norm(), name
        assert its.together and len(its.table) == 2


def test_a_member_is_what_is_fitted_alone():
    data = labelled(torch.Generator().manual_seed(1), 50)
    grid = Grid([0.1, 0.01], [0.1, 0.0], 3, 20, 0)
    alone = {}
    for lr, decay in grid.members:
        alone[lr, decay] = fit_heads(heads_of(6), data, data, Grid([lr], [decay], 3, 20, 0), Steps())
    for name, its in fit_heads(heads_of(6), data, data, grid, Steps()).items():
        for row in its.table:
            expected = alone[row['lr'], row['weight_decay']][name].table[0]
            assert {key: pytest.approx(value, rel=1e-3, abs=1e-5) for key, value in expected.items()} == row
        best = alone[its.lr, its.weight_decay][name].head
        torch.testing.assert_close(its.head.state_dict(), best.state_dict(), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_folded_or_batched_is_fitted_too(tmp_path):
    """ArcFace has no layer to fold axes into; a user's own head may have no batched form either."""
    (tmp_path / 'own.py').write_text(OWN)
    registry, labels = load_registry(str(tmp_path / 'own.py')), LABELS['color']
    data = labelled(torch.Generator().manual_seed(2), 120)
    data = Labelled(data.features, data.targets[:, :1])
    for kind, together in (('softmax', True), ('arcface', True), ('normalized', False)):
        torch.manual_seed(0)
        head = create_head(labels, 6, {'loss': kind, 'input': 'features'}, registry)
        assert (Axes.of(data.features).fold(head) is None) == (kind != 'softmax')
        its, = fit_heads({'color': head}, data, data, Grid([0.1, 0.01], [0.001], 20, 40, 0), Steps()).values()
        assert its.together == together
        known = data.targets[:, 0] != -1
        accuracy = 100 * (its.head(data.features[known]).argmax(1) == data.targets[known, 0]).float().mean()
        best = max(row['top1'] for row in its.table)
        assert best == pytest.approx(float(accuracy)) and best > 75, kind


def test_members_that_diverge_are_not_chosen():
    data = labelled(torch.Generator().manual_seed(3), 40)
    its = fit_heads(heads_of(6), data, data, Grid([1e38, 0.1], [0.0], 2, 20, 0), Steps())
    assert {each.lr for each in its.values()} == {0.1}
    with pytest.raises(tm.UserError, match="head 'color': no learning rate gives a finite loss on val; lower --lrs"):
        fit_heads(heads_of(6), data, data, Grid([1e38], [0.0], 2, 20, 0), Steps())


@pytest.fixture(scope='module')
def made(weights, tmp_path_factory):
    """A probe of two backbones with mirrored images."""
    folder = tmp_path_factory.mktemp('made')
    data = write_data(folder / 'data', 24, 9)
    run = probe(data, weights, folder, ('test_resnet', 'test_vit'), tta='flip', experiment='both',
                head={'shape': {'loss': 'arcface'}})
    return folder, data, run


@pytest.mark.slow
def test_a_checkpoint_like_any_other(made, weights, tmp_path, capsys):
    folder, data, run = made
    assert run.best == run.summary['eval_top1'][0] and run.summary['eval/color/top1'][0] == 100
    assert list(run.chosen['head']) == ['color', 'shape'] and len(run.grid) == 4
    # What the kept features give is what the checkpoint makes of the images.
    checkpoint = read_checkpoint(run.best_checkpoint)
    assert checkpoint.arch == 'test_resnet+test_vit' and checkpoint.state['model_kwargs'] == {'mirrored': True}
    model = load_model(checkpoint, 'plain')
    files = [path for path in (folder / 'cache' / 'features').glob('val-*.npy') if 'done' not in path.name]
    widths = {timm.create_model(name).num_features: name for name in ('test_resnet', 'test_vit')}
    parts = {widths[np.load(path).shape[1]]: np.load(path) for path in files}
    kept = torch.from_numpy(np.concatenate([parts['test_resnet'], parts['test_vit']], axis=1)).float()
    with torch.no_grad():
        logits = model.forward_heads(kept)
    scored = tm.validate(data, run.best_checkpoint, workers=0, device='cpu')
    assert scored.mean['loss'] == pytest.approx(run.summary['eval_loss'][0], rel=1e-3)
    tm.report(run.folder, workers=0, device='cpu')
    said = Predictions.load(run.folder / 'predictions-val.npz')
    np.testing.assert_allclose(said.features, kept.numpy(), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(said.outputs['color'], logits['color'].softmax(1).numpy(), atol=2e-3)
    page = (run.folder / 'report.html').read_text()
    assert 'timm-multilabel probe' in page and '--model test_resnet --model test_vit' in page
    predicted = tm.predict(run.best_checkpoint, [data / 'images' / '0.png'], workers=0, device='cpu').table
    assert 'red' in predicted.to_string()
    exported = tm.export(run.best_checkpoint, out=tmp_path / 'export', formats=['safetensors'])
    assert max(exported.files.values()) < 1e-4
    with pytest.raises(tm.UserError, match='has several backbones, or mirrored images, and timm has no such model'):
        tm.export(run.best_checkpoint, out=tmp_path / 'export', formats=['backbone'])


def test_training_goes_on_from_a_probe(made, weights, tmp_path, caplog):
    """Of one backbone the checkpoint is that of a plain timm model, since the axes are folded into the heads."""
    _, data, both = made
    alone = probe(data, weights, tmp_path, experiment='alone')
    for run, model, further in (
            (alone, 'test_resnet', {}),
            (both, 'test_resnet+test_vit',
             {'model_kwargs': {'mirrored': True}, 'head': {'shape': {'loss': 'arcface'}}})):
        caplog.clear()
        with caplog.at_level('INFO', 'timm_multilabel'):
            trained = tm.train(
                data, model=model, img_size=32, initial_checkpoint=run.best_checkpoint, simclr_loss_weight=0,
                batch_size=8, epochs=1, lr=1e-9, warmup_epochs=0, cooldown_epochs=0, workers=0, device='cpu',
                freeze_backbone=True, output=tmp_path / 'train', experiment=model, **further)
        assert "took backbone, head 'color', head 'shape' (plain weights)" in caplog.text
        assert 'starts anew' not in caplog.text
        assert trained.summary['eval_loss'][0] == pytest.approx(run.summary['eval_loss'][0], rel=1e-3)


def test_each_backbone_sees_its_own_normalization(made):
    """Images come normalised for the first; a joined model gives what each model gives of its own images."""
    first, second = (timm.create_model(name, num_classes=0).eval() for name in ('test_resnet', 'test_efficientnet'))
    second.pretrained_cfg['mean'], second.pretrained_cfg['std'] = (0.2, 0.3, 0.4), (0.1, 0.2, 0.5)
    joined = JoinedBackbones([first, second], mirrored=True).eval()
    pixels = torch.rand(2, 3, 64, 64)

    def features(model):
        mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ('mean', 'std'))
        return (model((pixels - mean) / std) + model((pixels.flip(3) - mean) / std)) / 2

    mean, std = (torch.tensor(first.pretrained_cfg[name])[:, None, None] for name in ('mean', 'std'))
    with torch.no_grad():
        found, expected = joined((pixels - mean) / std), torch.cat([features(first), features(second)], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_features_are_kept_and_never_stale(made, weights, tmp_path, monkeypatch):
    _, data, _ = made
    seen = []
    write = FeatureFile.write

    def counted(self, rows, features, stamps):
        seen.append(len(rows))
        write(self, rows, features, stamps)

    def computed(**settings):
        """Images that went through each backbone."""
        seen.clear()
        probe(settings.pop('data', data), weights, tmp_path, experiment=str(time.time_ns()), epochs=1, **settings)
        return sum(seen)

    monkeypatch.setattr(FeatureFile, 'write', counted)  # nothing else says what was computed
    assert computed(labelled_rows=10) == 10 + 9
    assert computed() == 14 + 0  # the other rows
    assert computed() == 0
    assert computed(models=('test_resnet', 'test_vit')) == 24 + 9  # the new backbone alone
    assert computed(tta='flip') == 24 + 9
    assert computed(img_size=64) == 24 + 9
    copy = write_data(tmp_path / 'copy', 24, 9)
    assert computed(data=copy) == 24 + 9
    os.utime(copy / 'images' / '3.png', ns=(1, 1))
    assert computed(data=copy) == 1
    other = tmp_path / 'other'
    other.mkdir()
    state = torch.load(weights / 'test_resnet.pth')
    state['conv1.0.weight' if 'conv1.0.weight' in state else next(iter(state))] += 1e-3
    torch.save(state, other / 'test_resnet.pth')
    seen.clear()
    probe(data, other, tmp_path, experiment='other', epochs=1)
    assert sum(seen) == 24 + 9
    for path in (tmp_path / 'cache' / 'features').glob('train-*.npy'):
        path.write_bytes(b'damaged')
    assert computed() == 24


def test_bad_images_are_left_out(weights, tmp_path):
    data = write_data(tmp_path / 'data', 24, 9)
    (data / 'images' / '5.png').write_bytes(b'no image')
    with pytest.raises(tm.UserError, match=r'5\.png'):
        probe(data, weights, tmp_path, experiment='stops')
    assert not list((tmp_path / 'runs' / 'stops').iterdir())
    run = probe(data, weights, tmp_path, experiment='goes-on', skip_bad_images=True)
    assert run.summary['eval/color/top1'][0] == 100


def settings_of(data, weights, tmp_path, *words):
    return build(ProbeSettings, parse(ProbeSettings, 'probe', [
        str(data), '--model', 'test_resnet', '--pretrained-path', str(weights / 'test_resnet.pth'), '--img-size', '32',
        '-j', '0', '-b', '4', '--device', 'cpu', '--epochs', '20', '--lrs', '0.03', '--cache-dir',
        str(tmp_path / 'cache'), '--output', str(tmp_path / 'runs'), *words]))


def _probe_on_rank(rank, settings):
    made = run_probe(settings)
    return None if made is None else {'table': made.grid.to_dict('list'), 'best': made.best}


@pytest.mark.slow
def test_two_processes_are_one(made, weights, tmp_path):
    _, data, _ = made
    one = _probe_on_rank(0, settings_of(data, weights, tmp_path / '1', '--experiment', 'x'))
    two, nothing = run_ranks(
        _probe_on_rank, 2, settings_of(data, weights, tmp_path / '2', '--experiment', 'x'), join=False)
    assert nothing is None and two['best'] == one['best']
    pd.testing.assert_frame_equal(pd.DataFrame(two['table']), pd.DataFrame(one['table']), rtol=1e-3)
    features = [sorted((tmp_path / each / 'cache' / 'features').glob('*.npy')) for each in '12']
    assert [path.name for path in features[0]] == [path.name for path in features[1]]
    for first, second in zip(*features, strict=True):
        np.testing.assert_allclose(np.load(first), np.load(second), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_a_killed_embedding_goes_on(weights, tmp_path):
    """Chunks that were noted before a SIGKILL are not computed again."""
    data = write_data(tmp_path / 'data', 400, 9)
    settings = settings_of(data, weights, tmp_path, '--experiment', 'x')
    program = (
        'import sys, pickle, time\n'
        'from timm_multilabel.probing import features\n'
        'from timm_multilabel.api.probe import run_probe\n'
        'features._SECONDS = 0\n'
        'flush = features.FeatureFile.flush\n'
        'def slow(self):\n'
        '    flush(self)\n'
        '    print("chunk", flush=True)\n'
        '    time.sleep(0.2)\n'
        'features.FeatureFile.flush = slow\n'
        'run_probe(pickle.load(sys.stdin.buffer))\n')
    process = subprocess.Popen([sys.executable, '-c', program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(pickle.dumps(settings))
    process.stdin.close()
    for _ in range(3):
        assert process.stdout.readline() == b'chunk\n'
    process.send_signal(signal.SIGKILL)
    process.wait()
    done, = (tmp_path / 'cache' / 'features').glob('train-*.done.npy')
    before = (np.load(done) != -1).all(axis=1)
    assert 12 <= before.sum() < 400
    kept = np.load(done.with_name(done.name.replace('.done', '')))[before]
    assert np.isfinite(kept).all() and (kept != 0).any(axis=1).all()
    made = run_probe(settings)
    assert made.summary['eval/color/top1'][0] == 100
    after = np.load(done.with_name(done.name.replace('.done', '')))
    assert (np.load(done) != -1).all() and (after[before] == kept).all()


@pytest.mark.parametrize('settings, line', [
    ({'models': ('test_resnet', 'test_vit'), 'pretrained_path': ['x.pth']},
     'pretrained_path: 1 files for 2 models; pass one for each model, in their order'),
    ({'models': ('test_resnet+test_vit',)}, r'model test_resnet\+test_vit: pass a model for each'),
    ({'pretrained_path': ['none.pth']}, 'pretrained_path none.pth: no such file'),
    ({'pretrained_path': []}, 'pretrained: the weights of test_resnet could not be downloaded'),
    ({'models': ('efficientnet_b9',), 'pretrained_path': []}, 'model efficientnet_b9: timm .* has no such model'),
    ({'head': {'color': {'input': 'projection'}}}, 'head color:input=projection: a probe has no projector'),
    ({'labelled_rows': 100}, 'labelled_rows=100: .* has 24 rows with labels; ask for as many at most'),
    ({'input_size': [1, 32, 32]}, 'images are RGB'),
    ({'heads': ['size']}, 'size'),
])
def test_bad_input(made, weights, tmp_path, settings, line):
    _, data, _ = made
    with pytest.raises(tm.UserError, match=line):
        probe(data, weights, tmp_path, experiment='x', **settings)
    assert not (tmp_path / 'runs' / 'x').exists()


def test_a_row_that_a_full_disk_cuts_off_is_not_done(tmp_path, monkeypatch):
    file = FeatureFile(tmp_path / 'val-1.npy', 4, 3)
    file.create()
    stamps = np.ones((4, 3), np.int64)
    whole = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, 'pwrite', lambda number, data, offset: whole(number, data[:2], offset))
        with pytest.raises(tm.UserError, match='No space left on device'):
            file.write([0, 1], np.ones((2, 3)), stamps[:2])
    file.flush()
    assert file.missing(np.arange(4), stamps).all()


def test_what_a_probe_is_not(made, weights):
    folder, data, run = made
    further = {'workers': 0, 'device': 'cpu', 'epochs': 1, 'batch_size': 4, 'model': 'test_resnet+test_vit',
               'img_size': 32, 'simclr_loss_weight': 0, 'output': str(run.folder.parent)}
    with pytest.raises(tm.UserError, match='holds weights alone.*start from it with initial_checkpoint'):
        tm.train(data, resume=str(run.best_checkpoint), model_kwargs={'mirrored': True}, **further)
    with pytest.raises(tm.UserError, match='holds a run already; choose another experiment, or remove it'):
        probe(data, weights, folder, experiment='both')
    with pytest.raises(tm.UserError, match='mean, std: each of several models has a normalization of its own'):
        tm.train(data, mean=[0.5], **further)


def test_features_that_do_not_fit(made, weights, tmp_path, monkeypatch):
    _, data, _ = made
    with monkeypatch.context() as patch:  # no test can fill a disk, or the memory
        patch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=1000))
        with pytest.raises(tm.UserError, match='cache_dir .*: features of 0.0 MB would not fit into the 0.0 MB'):
            probe(data, weights, tmp_path, experiment='x')
    with monkeypatch.context() as patch:
        patch.setattr('timm_multilabel.assembly.probe.free_memory', lambda: 1000)
        with pytest.raises(tm.UserError, match='features of 33 images x .* numbers take .* while heads are fitted'):
            probe(data, weights, tmp_path, experiment='x')
