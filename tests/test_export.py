"""Exports: each format says what the checkpoint says, or is not there; the hub's folder, and what goes there."""
import csv
import importlib.util
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from common import COLORS, train_run
from PIL import Image
from safetensors.torch import load_file
from test_cli import fails

from timm_multilabel.cli.main import run_command
from timm_multilabel.errors import UserError
from timm_multilabel.escaping import markdown_text
from timm_multilabel.exports import compare, weights
from timm_multilabel.exports.examples import _spread, images_of_run, read_images
from timm_multilabel.exports.exportable import DESCRIPTION, Exportable, describe, output_names
from timm_multilabel.labels import LabelSpace
from timm_multilabel.training.checkpoint import load_model, read_checkpoint

HEADS = ['a.b', '=1', 'größe', 'a_b', 'linear']
OUTPUTS = ['a_b_2', '_1', 'gr__e', 'a_b', 'linear']
KINDS = ['--head', '=1:loss=arcface', 'größe:loss=numeric', 'a_b:input=projection', 'linear:loss=tags', '--model-ema',
         '--model-ema-decay', '0.5']
ALL_FILES = ['backbone.json', 'backbone.safetensors', 'multilabel.json', 'multilabel.onnx', 'multilabel.pt2',
             'multilabel.safetensors']
HUB_FILES = ['README.md', 'config.json', 'model.safetensors', 'multilabel.json', 'multilabel.safetensors']


def write_odd_data(folder: Path) -> Path:
    """A data directory whose columns and labels are called as badly as they may be."""
    (folder / 'images').mkdir(parents=True)
    number = 0
    for split, rows in (('train', 12), ('val', 6)):
        with open(folder / f'{split}.csv', 'w', newline='', encoding='utf-8') as file:
            table = csv.writer(file)
            table.writerow(['image_path', *HEADS])
            for _ in range(rows):
                color = list(COLORS.values())[number % 3]
                Image.new('RGB', (40, 36), color).save(folder / 'images' / f'{number}.png')
                table.writerow([
                    f'images/{number}.png', ('a.b', '=1', '色')[number % 3], ('x', '<b>y</b>')[number % 2],
                    100 + 3 * number, ('*p*', 'q_', '`r`')[number % 3], ('s|t', 't')[number % 2]])
                number += 1
    return folder


@pytest.fixture(scope='module', params=['test_resnet', 'test_vit'])
def exported(request, tmp_path_factory):
    """A run of five odd heads with all its exports: (checkpoint, folder of exports, folder for the hub)."""
    folder = tmp_path_factory.mktemp('exported')
    run = train_run(write_odd_data(folder / 'data'), folder, *KINDS, '--model', request.param)
    checkpoint = run / 'last.pth.tar'
    hub = folder / 'hub'
    run_export(checkpoint, '--weights', 'ema')
    run_export(checkpoint, '--weights', 'ema', '--hub', hub)
    return checkpoint, run / 'export', hub


@pytest.fixture
def run_of(data_dir, tmp_path):
    """The checkpoint of a plain run."""
    return train_run(data_dir, tmp_path, epochs=1) / 'last.pth.tar'


def run_export(checkpoint, *flags):
    run_command('export', 'export.py', [str(word) for word in (checkpoint, *flags)])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def by_hand(checkpoint: Path, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Features, and what each of the odd heads says, from the tensors of a checkpoint."""
    read = read_checkpoint(checkpoint)
    state, model = read.weights('ema'), load_model(read, 'ema')
    with torch.no_grad():
        features = model.backbone(images)
    hidden = torch.relu(features @ state['projector.0.weight'].T)
    projections = hidden @ state['projector.2.weight'].T
    cosines = torch.nn.functional.cosine_similarity(features[:, None], state['heads.1.weight'][None], dim=2)
    logits = {number: (projections if number == 3 else features) @ state[f'heads.{number}.fc.weight'].T
              + state[f'heads.{number}.fc.bias'] for number in (0, 2, 3, 4)}
    years = np.array([100 + 3 * number for number in range(12)])
    return features, [logits[0].softmax(1), (30 * cosines).softmax(1), logits[2] * years.std() + years.mean(),
                      logits[3].softmax(1), logits[4].sigmoid()]


def some_images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def assert_close(made, expected):
    assert len(made) == len(expected)
    for one, other in zip(made, expected):
        one = torch.as_tensor(one)
        assert one.shape == other.shape
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_files_and_no_others(exported):
    _, folder, hub = exported
    assert names_in(folder) == ALL_FILES and names_in(hub) == HUB_FILES


@pytest.mark.slow
@pytest.mark.parametrize('count', [1, 2, 5])
def test_onnx(exported, count):
    checkpoint, folder, _ = exported
    session = onnxruntime.InferenceSession(folder / 'multilabel.onnx', providers=['CPUExecutionProvider'])
    assert [output.name for output in session.get_outputs()] == OUTPUTS
    assert [(entry.name, entry.shape) for entry in session.get_inputs()] == [('images', ['batch', 3, 32, 32])]
    images = some_images(count)
    assert_close(session.run(OUTPUTS, {'images': images.numpy()}), by_hand(checkpoint, images)[1])
    model = onnx.load(folder / 'multilabel.onnx')
    onnx.checker.check_model(model, full_check=True)
    assert [(part.domain, part.version) for part in model.opset_import] == [('', 18)]


@pytest.mark.slow
@pytest.mark.parametrize('count', [1, 2, 5])
def test_pt2(exported, count):
    checkpoint, folder, _ = exported
    model = torch.export.load(folder / 'multilabel.pt2').module()
    made = model(some_images(count))
    assert list(made) == OUTPUTS
    assert_close([value.detach() for value in made.values()], by_hand(checkpoint, some_images(count))[1])


@pytest.mark.slow
def test_safetensors(exported):
    checkpoint, folder, _ = exported
    path = folder / 'multilabel.safetensors'
    stored, state = load_file(path), read_checkpoint(checkpoint).weights('ema')
    assert stored.keys() == state.keys() and all(torch.equal(stored[name], state[name]) for name in state)
    model = weights.load_exported(path)
    assert not model.training and model.label_space == read_checkpoint(checkpoint).label_space
    with torch.no_grad():
        made = model(some_images(3))
    expected = by_hand(checkpoint, some_images(3))[1]
    assert_close([made['a.b'].softmax(1), made['linear'].sigmoid()], [expected[0], expected[4]])


@pytest.mark.slow
@torch.no_grad()
def test_backbone_by_timm_alone(exported):
    checkpoint, folder, hub = exported
    arch = read_checkpoint(checkpoint).arch
    size = {'img_size': (32, 32)} if arch == 'test_vit' else {}
    features = by_hand(checkpoint, some_images(3))[0]
    model = timm.create_model(arch, num_classes=0, pretrained=True, **size, pretrained_cfg_overlay=dict(
        file=str(folder / 'backbone.safetensors'))).eval()
    assert_close([model(some_images(3))], [features])
    described = json.loads((folder / 'backbone.json').read_text())
    assert described['create_model'] == {'model_name': arch, 'num_classes': 0, **{
        name: list(value) for name, value in size.items()}}
    assert described['features'] == features.shape[1]
    model = timm.create_model(f'local-dir:{hub}', pretrained=True).eval()
    assert_close([model(some_images(3))], [features])
    config = timm.data.resolve_data_config(model=model)
    assert config == {**read_checkpoint(checkpoint).data_config, 'input_size': (3, 32, 32), 'mean': config['mean'],
                      'std': config['std']}
    assert 'license' not in json.loads((hub / 'config.json').read_text())['pretrained_cfg']


@pytest.mark.slow
def test_the_description_is_the_same_everywhere(exported):
    checkpoint, folder, hub = exported
    described = json.loads((folder / 'multilabel.json').read_text(encoding='utf-8'))
    [entry] = onnx.load(folder / 'multilabel.onnx').metadata_props
    extra = {DESCRIPTION: ''}
    torch.export.load(folder / 'multilabel.pt2', extra_files=extra)
    assert entry.key == 'timm-multilabel.json'
    assert json.loads(entry.value) == json.loads(extra[DESCRIPTION]) == described
    assert json.loads((hub / 'multilabel.json').read_text(encoding='utf-8')) == described
    assert described['outputs'] == [
        {'name': 'a_b_2', 'head': 'a.b', 'columns': 3, 'values': 'probabilities'},
        {'name': '_1', 'head': '=1', 'columns': 2, 'values': 'probabilities'},
        {'name': 'gr__e', 'head': 'größe', 'columns': 1, 'values': 'numbers'},
        {'name': 'a_b', 'head': 'a_b', 'columns': 3, 'values': 'probabilities'},
        {'name': 'linear', 'head': 'linear', 'columns': 2, 'values': 'probabilities'},
    ]
    read = read_checkpoint(checkpoint)
    assert LabelSpace.from_dict(described['label_space']) == read.label_space
    assert read.label_space.heads[0].classes == ('=1', 'a.b', '色')
    assert described['preprocessing'] == {**read.data_config, 'pixels': 'RGB / 255, less mean, divided by std'}
    assert (described['weights'], described['epochs'], described['arch']) == ('ema', 2, read.arch)


@pytest.mark.slow
def test_the_card(exported):
    checkpoint, _, hub = exported
    card = (hub / 'README.md').read_text(encoding='utf-8')
    assert card.startswith('---\nlibrary_name: timm\npipeline_tag: image-classification\ntags:\n')
    assert '- **a.b**: 3 classes: =1, a.b, 色\n' in card
    assert r'- **=1**: 2 classes: \<b\>y\</b\>, x' in card
    assert '- **größe**: a number (116.5 on average, standard deviation 10.3562)\n' in card
    assert r'- **a_b**: 3 classes: \*p\*, \`r\`, q\_' in card
    with open(checkpoint.parent / 'summary.csv', encoding='utf-8') as file:
        row = list(csv.DictReader(file))[1]
    assert '| head | top1 | top5 | r2 | mae | map | f1 | micro_f1 | accuracy | loss |\n' in card
    figures = ' | '.join(f'{float(row[f"eval_ema/a.b/{name}"]):.3f}' for name in ('top1', 'top5'))
    assert f'| a.b | {figures} |  |  |  |  |  |  | {float(row["eval_ema/a.b/loss"]):.3f} |\n' in card


@pytest.mark.slow
def test_the_usage_in_the_card_runs(exported, monkeypatch):
    checkpoint, _, hub = exported
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda repo, name: str(hub / name))
    card = (hub / 'README.md').read_text(encoding='utf-8').replace("'hf-hub:USER/NAME'", repr(f'local-dir:{hub}'))
    ours, timms = (part.split('```')[0] for part in card.split('```python\n')[1:])
    names = {'images': some_images(2)}
    exec(ours, names)
    assert_close([names['probabilities']['a.b']], by_hand(checkpoint, some_images(2))[1][:1])
    exec(timms, names)
    assert names['transform'](Image.new('RGB', (50, 60))).shape == (3, 32, 32)


def test_output_names():
    assert output_names(HEADS) == OUTPUTS
    assert output_names(['a b', 'a_b_2', 'a-b', 'a_b']) == ['a_b_3', 'a_b_2', 'a_b_4', 'a_b']
    assert output_names(['images', '色', '数', '1st', 'val_3']) == ['images_2', '_', '__2', '_1st', 'val_3']
    assert output_names([]) == []


@pytest.mark.slow
def test_names_of_inner_values_do_not_matter(data_dir, tmp_path):
    inner = ['val_0', 'softmax', 'linear']
    for split in ('train', 'val'):
        text = (data_dir / f'{split}.csv').read_text().replace('color,shape', 'softmax,linear')
        first, *lines = text.splitlines()
        (data_dir / f'{split}.csv').write_text('\n'.join([f'{first},val_0', *(
            f'{line},{number % 2}' for number, line in enumerate(lines))]) + '\n')
    checkpoint = train_run(data_dir, tmp_path, '--heads', *inner, epochs=1) / 'last.pth.tar'
    run_export(checkpoint, '--formats', 'onnx')
    session = onnxruntime.InferenceSession(checkpoint.parent / 'export' / 'multilabel.onnx')
    assert [output.name for output in session.get_outputs()] == inner


def exportable_of(path: Path) -> Exportable:
    checkpoint = read_checkpoint(path)
    images = read_images(checkpoint, images_of_run(checkpoint))
    model = load_model(checkpoint, 'plain')
    return Exportable(checkpoint, model, describe(checkpoint, 'plain', model), images)


def test_images_are_those_of_evaluation(run_of):
    exportable = exportable_of(run_of)
    config = exportable.checkpoint.data_config
    assert [Path(path).name for path in images_of_run(exportable.checkpoint)] == [f'{n}.png' for n in range(12, 18)]
    assert exportable.images.shape == (6, 3, 32, 32)
    for number, image in enumerate(exportable.images, 12):
        color = torch.tensor(list(COLORS.values())[number % 3]) / 255
        expected = (color - torch.tensor(config['mean'])) / torch.tensor(config['std'])
        torch.testing.assert_close(image, expected[:, None, None].expand(3, 32, 32), rtol=0, atol=1e-5)


def test_what_differs_is_found(run_of):
    exportable = exportable_of(run_of)
    model = exportable.model

    def run(images, change=0.0, alone=0.0):
        with torch.no_grad():
            outputs = [output.softmax(1) for output in model(images).values()]
        outputs[1][-1, 0] += alone if len(images) == 1 else change
        return outputs

    assert compare.largest_difference(run, exportable, True) == 0
    for change in ((0.25, 0.0), (0.0, -0.25)):
        difference = compare.largest_difference(lambda images, change=change: run(images, *change), exportable, True)
        assert difference == pytest.approx(0.25, 1e-5)
    assert compare.largest_difference(lambda images: run(images, float('nan')), exportable, True) == float('inf')
    for wrong in (lambda images: run(images)[:1], lambda images: run(images)[::-1]):
        with pytest.raises(ValueError):
            compare.largest_difference(wrong, exportable, True)
    with torch.no_grad():
        features = model.backbone(exportable.images)
        difference = compare.largest_difference(lambda images: [2 * model.backbone(images)], exportable, False)
    assert difference == pytest.approx(1) and features.shape == (6, model.num_features)


@pytest.mark.slow
def test_numbers_are_compared_in_standard_deviations(exported):
    exportable = exportable_of(exported[0])
    std = float(np.std([100 + 3 * number for number in range(12)]))
    run = weights.load(exportable, exported[1] / 'multilabel.safetensors')

    def shifted(images):
        with torch.no_grad():
            outputs = [values for values, _ in compare.expected_outputs(exportable.model, images)]
        outputs[2] = outputs[2] + std / 2
        return outputs

    assert compare.largest_difference(shifted, exportable, True) == pytest.approx(0.5, 1e-4)
    assert compare.largest_difference(run, exportable, True) > compare.TOLERANCE  # EMA weights against plain ones


@pytest.mark.slow
def test_a_format_that_fails_leaves_nothing(capsys, run_of, monkeypatch):
    folder = run_of.parent / 'export'
    write = weights.write_tensors
    monkeypatch.setattr(weights, 'write_tensors', lambda path, tensors: write(
        path, {name: tensor + 0.5 if name.endswith('fc.bias') and 'heads.0' in name else tensor * 1.0
               for name, tensor in tensors.items() if name != 'heads.1.fc.bias'}))
    line = fails(capsys, 'export', [run_of, '--formats', 'pt2', 'safetensors', 'backbone'])
    assert 'multilabel.safetensors: test_resnet cannot be exported so (' in line
    assert 'its plain weights do not fit its model and heads' in line and '-export-' not in line
    assert names_in(folder) == ['backbone.json', 'backbone.safetensors', 'multilabel.pt2']
    monkeypatch.setattr(weights, 'write_tensors', lambda path, tensors: write(
        path, {name: tensor * 1.5 if 'heads.0' in name else tensor for name, tensor in tensors.items()}))
    (folder / 'multilabel.json').write_text('before')
    line = fails(capsys, 'export', [run_of, '--formats', 'safetensors', '--force'])
    assert 'multilabel.safetensors: differs from the checkpoint by ' in line and 'more than 1e-04; not kept' in line
    assert (folder / 'multilabel.json').read_text() == 'before' and len(names_in(folder)) == 4
    hub = run_of.parent / 'hub'
    assert 'not kept' in fails(capsys, 'export', [run_of, '--hub', hub])
    assert names_in(hub) == []


def test_weights_that_are_no_numbers(capsys, run_of):
    state = torch.load(run_of, weights_only=True)
    state['state_dict']['heads.0.fc.bias'][0] = float('nan')
    torch.save(state, run_of)
    assert f'{run_of}: its outputs are not finite' in fails(capsys, 'export', [run_of])
    assert not (run_of.parent / 'export').exists()


def test_outputs_that_exist(capsys, run_of, tmp_path):
    folder = tmp_path / 'out'
    flags = [run_of, '--formats', 'backbone', '--out', folder]
    run_export(*flags)
    before = (folder / 'backbone.safetensors').read_bytes()
    assert capsys.readouterr().out.count('largest difference 0.0e+00 (at most 1e-04)') == 1
    (folder / 'backbone.safetensors').write_bytes(b'before')
    line = fails(capsys, 'export', flags)
    assert f'{folder}/backbone.safetensors: exists; replace it with --force' in line
    run_export(*flags, '--force')
    assert (folder / 'backbone.safetensors').read_bytes() == before
    assert 'is a file; name a folder' in fails(capsys, 'export', [run_of, '--out', run_of])
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'hub' / 'README.md').write_text('mine')
    assert 'README.md: exists' in fails(capsys, 'export', [run_of, '--hub', tmp_path / 'hub'])
    (folder / 'backbone.json').unlink()
    (folder / 'backbone.json').mkdir()
    assert 'backbone.json: is no file' in fails(capsys, 'export', [*flags, '--force'])


@pytest.mark.slow
def test_a_missing_extra(capsys, run_of, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'onnxscript' else find(name))
    line = fails(capsys, 'export', [run_of, '--formats', 'onnx'])
    assert "--formats onnx: onnxscript not installed; pip install '.[export]'" in line
    run_export(run_of)
    assert "onnx: left out, onnxscript not installed; pip install '.[export]'" in capsys.readouterr().out
    assert names_in(run_of.parent / 'export') == [name for name in ALL_FILES if name != 'multilabel.onnx']


@pytest.mark.slow
def test_a_checkpoint_without_heads(capsys, data_dir, tmp_path):
    run = train_run(data_dir, tmp_path, '-wlc', '0', epochs=1)
    line = fails(capsys, 'export', [run / 'last.pth.tar', '--formats', 'backbone', 'pt2'])
    assert '--formats pt2: ' in line and 'it has no heads; it can be written as backbone' in line
    run_export(run / 'last.pth.tar')
    assert names_in(run / 'export') == ['backbone.json', 'backbone.safetensors']
    assert capsys.readouterr().out.count('left out, ') == 3
    run_export(run / 'last.pth.tar', '--hub', tmp_path / 'hub')
    assert names_in(tmp_path / 'hub') == ['README.md', 'config.json', 'model.safetensors']
    card = (tmp_path / 'hub' / 'README.md').read_text()
    assert 'test_resnet trained without labels' in card and '## Labels' not in card and 'load_exported' not in card


def test_images_from_elsewhere(capsys, run_of, data_dir, tmp_path):
    flags = [run_of, '--formats', 'backbone', '--force']
    moved = data_dir.rename(tmp_path / 'moved')
    line = fails(capsys, 'export', flags)
    assert f'of its data directory {data_dir} no CSV is here; name images to compare with: --images DIR' in line
    run_export(*flags, '--images', moved / 'images')
    assert f'compared on 16 images such as {moved}/images/0.png, one and 16 at a time' in capsys.readouterr().out
    run_export(*flags, '--images', moved / 'images' / '3.png')
    assert f'compared on 1 image such as {moved}/images/3.png, one and 2 at a time' in capsys.readouterr().out
    assert 'nowhere: no such file or folder' in fails(capsys, 'export', [*flags, '--images', tmp_path / 'nowhere'])
    (moved / 'bad.png').write_text('x')
    assert 'bad.png' in fails(capsys, 'export', [*flags, '--images', moved / 'bad.png'])
    (run_of.parent / 'args.yaml').write_text('- x')
    assert 'args.yaml: cannot be read as the settings of a run' in fails(capsys, 'export', flags)
    (run_of.parent / 'args.yaml').unlink()
    assert 'no args.yaml beside it tells of its data' in fails(capsys, 'export', flags)


def test_images_are_spread():
    assert _spread(1) == [0] and _spread(3) == [0, 1, 2]
    assert _spread(31) == list(range(0, 31, 2)) and len(_spread(4000)) == 16 and _spread(4000)[-1] == 3999


def test_bad_checkpoints_and_weights(capsys, run_of, tmp_path):
    assert 'nowhere.pth.tar: no such checkpoint' in fails(capsys, 'export', [tmp_path / 'nowhere.pth.tar'])
    assert 'holds no ema weights' in fails(capsys, 'export', [run_of, '--weights', 'ema'])
    with pytest.raises(SystemExit):
        run_export(run_of, '--formats', 'tflite')
    assert 'invalid choice' in capsys.readouterr().err


@pytest.mark.parametrize('name, content', [
    ('json', '{}'), ('json', '[]'), ('json', '{"arch": 3, "label_space": {"heads": []}}'), ('json', 'x'),
    ('safetensors', ''), ('safetensors', 'x' * 100), ('json', '[' * 100_000)])
def test_exported_weights_that_are_none(run_of, name, content):
    run_export(run_of, '--formats', 'safetensors')
    (run_of.parent / 'export' / f'multilabel.{name}').write_text(content)
    with pytest.raises(UserError, match='multilabel'):
        weights.load_exported(run_of.parent / 'export' / 'multilabel.safetensors')


class FakeHub:
    """Notes what the hub is asked for."""
    calls: list[tuple] = []

    def create_repo(self, repo, **kwargs):
        self.calls.append(('create_repo', repo, kwargs))

    def upload_folder(self, **kwargs):
        self.calls.append(('upload_folder', names_in(Path(kwargs['folder_path'])), kwargs))
        return 'https://huggingface.co/me/colors/commit/1'


@pytest.fixture
def fake_hub(monkeypatch):
    monkeypatch.setattr(FakeHub, 'calls', [])
    monkeypatch.setattr(huggingface_hub, 'HfApi', FakeHub)
    return FakeHub


def test_only_push_uploads(capsys, run_of, tmp_path, fake_hub):
    run_export(run_of, '--hub', tmp_path / 'one')
    assert fake_hub.calls == [] and names_in(tmp_path / 'one') == HUB_FILES
    assert not (run_of.parent / 'export').exists()
    folder = tmp_path / 'two'
    folder.mkdir()
    (folder / 'secret.txt').write_text('mine')
    run_export(run_of, '--hub', folder, '--push', 'me/colors')
    upload = {
        'repo_id': 'me/colors', 'folder_path': folder, 'commit_message': 'Model of timm-multilabel',
        'allow_patterns': [
            'README.md', 'model.safetensors', 'config.json', 'multilabel.safetensors', 'multilabel.json']}
    assert fake_hub.calls == [
        ('create_repo', 'me/colors', {'private': True, 'exist_ok': True}),
        ('upload_folder', [*HUB_FILES, 'secret.txt'], upload)]
    assert 'pushed: https://huggingface.co/me/colors/commit/1\n' in capsys.readouterr().out
    card = (folder / 'README.md').read_text()
    assert '\n# colors\n' in card and "timm.create_model('hf-hub:me/colors', pretrained=True)" in card


def test_pushes_that_cannot_be(capsys, run_of, tmp_path, fake_hub, monkeypatch):
    assert '--push me/colors: uploads the folder of --hub' in fails(capsys, 'export', [run_of, '--push', 'me/colors'])
    line = fails(capsys, 'export', [run_of, '--hub', tmp_path / 'hub', '--push', 'me/my colors'])
    assert '--push me/my colors: is no name of a repository' in line
    assert not (tmp_path / 'hub').exists() and fake_hub.calls == []

    def refuse(self, **kwargs):
        raise OSError('403 Forbidden')

    monkeypatch.setattr(FakeHub, 'upload_folder', refuse)
    line = fails(capsys, 'export', [run_of, '--hub', tmp_path / 'hub', '--push', 'me/colors'])
    assert 'cannot be uploaded (403 Forbidden)' in line and f'`hf upload me/colors {tmp_path}/hub`' in line
    assert names_in(tmp_path / 'hub') == HUB_FILES


@pytest.mark.slow
def test_a_phase(data_dir, tmp_path):
    (tmp_path / 'recipe.yaml').write_text(
        'phases:\n- {name: first, classification_loss_weight: 0, epochs: 1}\n- {name: heads, epochs: 1}\n')
    run = train_run(data_dir, tmp_path, '-c', str(tmp_path / 'recipe.yaml'), epochs=1)
    run_export(run / '1-first' / 'last.pth.tar')
    assert names_in(run / '1-first' / 'export') == ['backbone.json', 'backbone.safetensors']
    run_export(run / 'last.pth.tar', '--hub', tmp_path / 'hub')
    row = list(csv.DictReader((run / 'summary.csv').read_text().splitlines()))[-1]
    assert f'| color | {float(row["eval/color/top1"]):.3f} | ' in (tmp_path / 'hub' / 'README.md').read_text()


def test_a_summary_that_is_none(capsys, run_of, tmp_path):
    (run_of.parent / 'summary.csv').write_text('epoch,eval/color/top1\n0,good\n')
    assert 'summary.csv: cannot be read as the summary of a run' in fails(
        capsys, 'export', [run_of, '--hub', tmp_path / 'hub'])
    assert names_in(tmp_path / 'hub') == []
    (run_of.parent / 'summary.csv').unlink()
    run_export(run_of, '--hub', tmp_path / 'hub')
    assert '## Metrics' not in (tmp_path / 'hub' / 'README.md').read_text()


@pytest.mark.slow
def test_heads_of_ones_own(capsys, data_dir, tmp_path):
    module = tmp_path / 'own.py'
    module.write_text('''
import torch
from timm_multilabel.heads import SoftmaxHead


class Doubled(SoftmaxHead):
    kind = 'doubled'

    def forward(self, features):
        return 2 * super().forward(features)
''')
    run = train_run(data_dir, tmp_path, '--head-module', str(module), '--head', 'color:loss=doubled', epochs=1)
    assert "'doubled'" in fails(capsys, 'export', [run / 'last.pth.tar'])
    run_export(run / 'last.pth.tar', '--head-module', module, '--formats', 'pt2', 'safetensors')
    assert names_in(run / 'export') == ['multilabel.json', 'multilabel.pt2', 'multilabel.safetensors']


def test_markdown_text():
    assert markdown_text('a|b <i> *c*\n[d](e)') == r'a\|b \<i\> \*c\* \[d\](e)'
    assert markdown_text('Größe, 1.5') == 'Größe, 1.5'
