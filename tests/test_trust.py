"""Nothing that a file names runs code or is looked up elsewhere, and no setting takes more than its file holds."""
import json
import pickle
import re
import shutil
import socket
import time
import zipfile

import numpy as np
import pytest
import torch
import yaml
from common import SPACE, TINY, train_run, write_data
from PIL import Image
from test_cli import fails

from timm_multilabel.cli.main import run_command
from timm_multilabel.data.images import DecodedPhoto
from timm_multilabel.errors import UserError
from timm_multilabel.exports.weights import load_exported
from timm_multilabel.inference.predictor import Predictor
from timm_multilabel.model_names import check_arguments
from timm_multilabel.training.checkpoint import load_model, read_checkpoint
from timm_multilabel.training.run_folder import RunFolder
from timm_multilabel.views.pillow import eval_views

HEADS = '''
import pathlib
from timm_multilabel.heads import SoftmaxHead

pathlib.Path({mark!r}).touch()


class Mine(SoftmaxHead):
    kind = 'mine'
'''


@pytest.fixture
def evil(tmp_path):
    """A file of heads that leaves a mark when it is run, and the mark."""
    mark = tmp_path / 'mark'
    (tmp_path / 'evil.py').write_text(HEADS.format(mark=str(mark)))
    return tmp_path / 'evil.py', mark


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """A run with heads of our own."""
    folder = tmp_path_factory.mktemp('plain')
    return train_run(write_data(folder / 'data'), folder, epochs=1)


def commands(run, data_dir, images):
    """Each command that reads a run or its checkpoint, with its arguments."""
    best = run / 'model_best.pth.tar'
    return {
        'report': ('report', [run]), 'compare': ('compare', [run]),
        'validate': ('validate', [data_dir, '--checkpoint', best, '-j', '0', '--device', 'cpu']),
        'predict': ('predict', [best, images, '-j', '0', '--device', 'cpu']),
        'embed': ('embed', [best, images, '--out', run / 'e.npz', '-j', '0', '--device', 'cpu']),
        'export': ('export', [best, '--images', images, '--formats', 'backbone']),
        'resume': ('train', [data_dir, '-c', run / 'args.yaml', '--resume', run, '--device', 'cpu']),
        'start': ('train', [data_dir, '-c', run / 'args.yaml', '--experiment', 'new', '--device', 'cpu']),
    }


@pytest.mark.parametrize('name', ['report', 'compare', 'resume', 'start'])
def test_a_file_of_heads_that_args_yaml_names_is_not_run(plain, tmp_path, capsys, evil, name):
    module, mark = evil
    run = shutil.copytree(plain, tmp_path / 'run')
    settings = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump({**settings, 'head_module': str(module)}))
    data_dir = plain.parent / 'data'
    line = fails(capsys, *commands(run, data_dir, data_dir / 'images')[name])
    assert f'args.yaml: names the Python file {module}, and a file cannot have code run' in line
    assert f'pass --head-module {module}' in line and not mark.exists()


@pytest.mark.parametrize('name', ['recipe', 'phase', 'grid', 'grid start'])
def test_a_file_of_heads_that_a_recipe_or_a_grid_names_is_not_run(data_dir, tmp_path, capsys, evil, name):
    module, mark = evil
    path, flags = tmp_path / 'grid.yaml', {'head_module': str(module)}
    path.write_text(yaml.safe_dump({
        'recipe': flags, 'phase': {'phases': [{'epochs': 1, **flags}]}, 'grid': {'settings': {'a': flags}},
        'grid start': {'starts': {'b': flags}, 'settings': {'a': {'start': 'b'}}}}[name]))
    if name.startswith('grid'):
        line = fails(capsys, 'grid', [tmp_path, data_dir, '--output', tmp_path / 'out'])
        assert "'head_module' counts on the command line only" in line and '--flags --head-module' in line
    else:
        line = fails(capsys, 'train', [data_dir, '-c', path, '--output', tmp_path / 'out', *TINY])
        assert f'pass --head-module {module}' in line
    assert not mark.exists()


@pytest.mark.slow
def test_a_checkpoint_of_custom_heads_asks_for_their_file_and_names_it(data_dir, tmp_path, capsys, evil):
    module, mark = evil
    run = train_run(data_dir, tmp_path / 'out', '--head-module', str(module), '--head', 'color:loss=mine', epochs=1)
    mark.unlink()
    every = commands(run, data_dir, data_dir / 'images')
    for name, (command, words) in every.items():
        line = fails(capsys, command, words)
        assert str(module) in line and '--head-module' in line, name
        assert not mark.exists(), name
    with pytest.raises(UserError, match=f"head 'color' is of the kind 'mine', which training had from {module}"):
        Predictor.load(run / 'model_best.pth.tar', 'cpu')
    for name in ('validate', 'predict', 'embed', 'export', 'report', 'compare'):
        command, words = every[name]
        run_command(command, name, [*map(str, words), '--head-module', str(module)])
    line = fails(capsys, 'search', [run / 'e.npz', data_dir / 'images' / '0.png', '--checkpoint',
                                  run / 'model_best.pth.tar', '--device', 'cpu'])
    assert str(module) in line
    assert yaml.safe_load((run / 'args.yaml').read_text())['head_module'] == str(module)


def changed(run, path, /, **settings):
    """A copy of a run's checkpoint with other settings."""
    torch.save({**torch.load(run / 'last.pth.tar', weights_only=True), **settings}, path)
    return path


@pytest.fixture
def no_network(monkeypatch):
    """Looking up any host fails the test."""
    def look_up(host, *args, **kwargs):
        raise AssertionError(f'looked up {host}')

    for name in ('getaddrinfo', 'gethostbyname', 'create_connection'):
        monkeypatch.setattr(socket, name, look_up)


@pytest.mark.parametrize('arch', ['hf-hub:somebody/x', 'hf_hub:somebody/x', 'local-dir:/tmp', 'somebody/x'])
def test_a_model_that_a_file_names_is_looked_up_only_if_asked(plain, tmp_path, capsys, no_network, arch):
    path = changed(plain, tmp_path / 'x.pth.tar', arch=arch)
    message = 'pass --allow-hub if you trust it' if ':' in arch else 'no such model|looks like'
    with pytest.raises(UserError, match=message):
        load_model(read_checkpoint(path), 'plain')
    with pytest.raises(UserError, match=message):
        Predictor.load(path, 'cpu')
    data_dir = plain.parent / 'data'
    (tmp_path / 'recipe.yaml').write_text(f'model: {arch!r}\nimg_size: 32\n')
    line = fails(capsys, 'train', [
        data_dir, '-c', tmp_path / 'recipe.yaml', '--output', tmp_path / 'out', '--device', 'cpu'])
    assert ('pass --allow-hub if you trust it' in line) == (':' in arch)
    description = {'arch': arch, 'label_space': {'heads': []}, 'preprocessing': read_checkpoint(path).data_config}
    (tmp_path / 'x.json').write_text(json.dumps(description))
    from safetensors.torch import save_file
    save_file({'x': torch.zeros(1)}, tmp_path / 'x.safetensors')
    with pytest.raises(UserError, match=message):
        load_exported(tmp_path / 'x.safetensors')


def test_allow_hub_counts_on_the_command_line_only(data_dir, tmp_path, capsys, no_network):
    (tmp_path / 'recipe.yaml').write_text('model: hf-hub:somebody/x\nallow_hub: true\n')
    words = [data_dir, '-c', tmp_path / 'recipe.yaml', '--output', tmp_path / 'out', '--device', 'cpu']
    assert "'allow_hub' counts on the command line only" in fails(capsys, 'train', words)


@pytest.mark.slow
def test_a_model_of_a_folder_is_kept_under_the_name_that_timm_has_for_it(data_dir, tmp_path):
    import timm

    model = timm.create_model('test_resnet', num_classes=0)
    timm.models.save_for_hf(model, tmp_path / 'mine', safe_serialization=True)
    run = tmp_path / 'out' / 'run'
    run_command('train', 'train.py', [
        str(data_dir), *TINY, '--model', f'local-dir:{tmp_path / "mine"}', '--epochs', '1', '--output', str(run.parent),
        '--experiment', run.name])
    shutil.rmtree(tmp_path / 'mine')
    checkpoint = read_checkpoint(run / 'last.pth.tar')
    assert checkpoint.arch == 'test_resnet'
    assert load_model(checkpoint, 'plain').num_features == model.num_features


@pytest.mark.parametrize('settings', [
    {'model_kwargs': {'checkpoint_path': '/etc/passwd'}}, {'model_kwargs': {'pretrained_cfg': {'url': 'http://x'}}},
    {'model_kwargs': {'pretrained_cfg_overlay': {'file': 'x'}}}, {'model_kwargs': {'cache_dir': 'x'}},
    {'model_kwargs': {'depth': 10 ** 6}}, {'model_kwargs': {'embed_dim': 10 ** 9}},
    {'model_kwargs': {'drop_rate': np.nan}}, {'model_kwargs': {'act_layer': '../x'}},
    {'model_kwargs': {'layers': [[[1]]]}}, {'model_kwargs': {'layers': [1] * 65}},
    {'model_kwargs': {'act_layer': {}}}, {'head_module': 7}, {'projection_dim': 2 ** 15}, {'projection_dim': True},
    {'projector_layers': 17}, {'projector_layers': 0}, {'projector_width': 2 ** 15}, {'condition_projector': 1},
    {'best_weights': 'other'}, {'separator': '(a+)+$'}, {'image_column': None}, {'missing_value': 1},
    {'phases': ['../x'], 'phase': 0}, {'head_weights': {'color': float('nan')}}, {'head_weights': {'color': -1}},
    {'head_options': {'color': {'scale': float('inf')}}}, {'head_options': {'color': {'class_weights': [[1]]}}},
    {'epoch': -1}, {'epoch': 2 ** 50}, {'run': {'bad_images': [{}]}}, {'run': {'strikes': 'x'}}, {'run': [1]},
    {'head_weights': {'none': 1.0}}, {'head_options': {'color': {'loss': ['softmax']}}},
    {'saver': {'checkpoint_files': [['..', 1.0]]}}, {'saver': {'checkpoint_files': [['args.yaml', 1.0]]}},
])
def test_settings_that_this_program_does_not_write(plain, tmp_path, settings):
    name = next(iter(settings))
    with pytest.raises(UserError, match=f"x.pth.tar: its '{name}'.* cannot be what this program wrote"):
        read_checkpoint(changed(plain, tmp_path / 'x.pth.tar', **settings))


@pytest.mark.parametrize('ranks', [[], [3], [{'meter': {'x': 1}}], [{'buffers': [[1]]}], [{'meter': []}]])
def test_a_place_in_an_epoch_that_this_program_does_not_write(plain, tmp_path, capsys, ranks):
    path = changed(plain, tmp_path / 'x.pth.tar', within={'step': 1, 'steps': 3, 'lr': 0.1, 'ranks': ranks})
    line = fails(capsys, 'train', [plain.parent / 'data', '-c', plain / 'args.yaml', '--resume', path])
    assert 'x.pth.tar: ' in line


@pytest.mark.parametrize('name, value', [
    ('crop_pct', 0.001), ('crop_pct', float('nan')), ('crop_pct', 20), ('crop_pct', '1'),
    ('mean', [0.5, 0.5, float('inf')]), ('mean', [0.5]),
    ('std', [0.2, 0.2, 0.0]), ('std', [0.2, 0.2, float('nan')]), ('std', [1e-30] * 3),
    ('input_size', [3, 32, 10 ** 5]), ('input_size', [1, 32, 32]), ('input_size', [3, 0, 32]),
    ('input_size', [3, 32.0, 32]),
    ('interpolation', 'random'), ('interpolation', '<b>'), ('crop_mode', '<script>'), ('crop_mode', None),
])
def test_data_configs_that_this_program_does_not_write(plain, tmp_path, name, value):
    config = {**torch.load(plain / 'last.pth.tar', weights_only=True)['data_config'], name: value}
    with pytest.raises(UserError, match="x.pth.tar: its 'data_config' cannot be what this program wrote"):
        read_checkpoint(changed(plain, tmp_path / 'x.pth.tar', data_config=config))


@pytest.mark.slow
@pytest.mark.parametrize('settings', [
    {'arch': 'vit_giant_patch14_224'},  # 4 GB
    {'projection_dim': 2 ** 14, 'head_options': {'color': {'input': 'projection'}}},
    {'projector_layers': 16, 'projector_width': 2 ** 14, 'head_options': {'color': {'input': 'projection'}}},
    {'label_space': {'heads': [{'name': 'color', 'classes': [str(number) for number in range(10 ** 5)]}]},
     'head_weights': {}},
    {'arch': 'test_vit', 'model_kwargs': {'embed_dim': 2 ** 16, 'depth': 500}},  # 100 TB
])
def test_no_memory_is_taken_for_weights_that_are_not_in_the_file(plain, tmp_path, monkeypatch, settings):
    checkpoint = read_checkpoint(changed(plain, tmp_path / 'x.pth.tar', **settings))
    made = []
    monkeypatch.setattr(torch.nn.Module, 'train', lambda self, mode=True: made.append(self) or self)
    with pytest.raises(UserError, match='x.pth.tar: its plain weights do not fit its model and heads'):
        load_model(checkpoint, 'plain')
    assert all(parameter.is_meta for module in made for parameter in module.parameters())


@pytest.mark.parametrize('tensor', [
    torch.zeros(1).expand(10 ** 6, 10 ** 6), torch.zeros(2, 2).to_sparse(), torch.zeros(3, device='meta')])
def test_tensors_that_are_not_plainly_stored(plain, tmp_path, tensor):
    state = torch.load(plain / 'last.pth.tar', weights_only=True)
    state['state_dict']['backbone.conv1.weight'] = tensor
    path = changed(plain, tmp_path / 'x.pth.tar', state_dict=state['state_dict'])
    with pytest.raises(UserError, match='x.pth.tar: '):
        read_checkpoint(path)


def test_many_views_of_one_stored_tensor_are_not_loaded(plain, tmp_path):
    stored = torch.zeros(10 ** 5)
    path = changed(plain, tmp_path / 'x.pth.tar', state_dict={str(number): stored[:] for number in range(100)})
    with pytest.raises(UserError, match='more weights than it has room for cannot be what this program wrote'):
        read_checkpoint(path)


def test_a_compressed_checkpoint_is_not_expanded(plain, tmp_path):
    path = tmp_path / 'x.pth.tar'
    torch.save({'state_dict': {'x': torch.zeros(10 ** 6)}, 'arch': 'x'}, tmp_path / 'large')
    with zipfile.ZipFile(tmp_path / 'large') as large, zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as small:
        for name in large.namelist():
            small.writestr(name, large.read(name))
    assert path.stat().st_size < 10 ** 5
    with pytest.raises(UserError, match='cannot be loaded as a checkpoint'):
        read_checkpoint(path)


class Takes:
    """Takes memory when it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def pickle_of_deep_key(levels):
    """A dict whose key is a tuple of twice the same tuple, and so on, within a checkpoint."""
    key = b'K\x00K\x00\x86q\x000' + b''.join(
        b'h%ch%c\x86q%c0' % (level, level, level + 1) for level in range(levels))
    return b'\x80\x02' + key + b'}h%cK\x01s.' % levels


@pytest.mark.parametrize('data', [
    pickle.dumps(Takes(bytearray, 2 ** 40), protocol=2), pickle.dumps(Takes(torch.FloatStorage, 2 ** 40), protocol=2),
    pickle_of_deep_key(60)], ids=['bytearray', 'storage', 'nested key'])
def test_a_pickle_that_asks_for_much_is_not_run(tmp_path, data):
    with zipfile.ZipFile(tmp_path / 'x.pth.tar', 'w') as archive:
        for name, content in (('x/data.pkl', data), ('x/version', b'3'), ('x/byteorder', b'little')):
            archive.writestr(name, content)
    started = time.process_time()
    with pytest.raises(UserError, match='x.pth.tar: cannot be loaded as a checkpoint') as error:
        read_checkpoint(tmp_path / 'x.pth.tar')
    assert time.process_time() - started < 5
    assert re.match('it calls|more than 8 tuples', str(error.value.__cause__))


@pytest.mark.parametrize('name, tensor', [(3, torch.zeros(1)), ('x', 7), ('x', torch.zeros(1, dtype=torch.complex64))])
def test_weights_that_are_none(plain, tmp_path, name, tensor):
    state = torch.load(plain / 'last.pth.tar', weights_only=True)['state_dict']
    with pytest.raises(UserError, match='weights that are no tensors of real numbers cannot be'):
        read_checkpoint(changed(plain, tmp_path / 'x.pth.tar', state_dict={**state, name: tensor}))


def test_arguments_of_a_model_in_a_recipe_ask_no_other_host(plain, tmp_path, capsys, no_network):
    recipe = {'model': 'test_resnet', 'pretrained': True,
              'model_kwargs': {'pretrained_cfg_overlay': {'url': 'http://x/y.pth', 'hf_hub_id': None}}}
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
    line = fails(capsys, 'train', [
        plain.parent / 'data', '-c', tmp_path / 'recipe.yaml', '-b', '4', '--output', tmp_path / 'out'])
    assert "--model-kwargs: model argument 'pretrained_cfg_overlay' is not among" in line


def test_a_long_input_is_seen_whole():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 1024, 3)).astype(np.uint8)
    out = np.empty((1, 1, 32, 1024, 3), np.uint8)
    eval_views((32, 1024), 'bilinear', 1.0, 'center')([DecodedPhoto(pixels)], [0], out)
    assert (out[0, 0] == pixels).all()


def test_leftovers_behind_a_link_stay(tmp_path):
    elsewhere, run = tmp_path / 'elsewhere', tmp_path / 'run'
    for folder in (elsewhere, run):
        folder.mkdir()
    name = f'.x-{"0" * 16}.tmp'
    (elsewhere / name).touch()
    (run / 'link').symlink_to(elsewhere)
    (run / name).touch()
    (run / f'.y-{"0" * 16}.tmp').mkdir()
    RunFolder(run, {}, SPACE)
    assert (elsewhere / name).exists() and not (run / name).exists() and (run / f'.y-{"0" * 16}.tmp').is_dir()


def test_very_large_images_go_through_a_model_a_few_at_a_time(plain, tmp_path):
    config = torch.load(plain / 'last.pth.tar', weights_only=True)['data_config']
    path = changed(plain, tmp_path / 'x.pth.tar', data_config={**config, 'input_size': [3, 4096, 4096]})
    assert read_checkpoint(path).batch_size(128) == 4
    assert read_checkpoint(plain / 'last.pth.tar').batch_size(128) == 128


@pytest.mark.parametrize('size', [(1, 20000), (20000, 1), (3, 5000)])
def test_a_line_of_pixels_is_not_blown_up(size):
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[height // 2 - 1:height // 2 + 1, width // 2 - 1:width // 2 + 1] = 255
    out = np.empty((1, 1, 224, 224, 3), np.uint8)
    views = eval_views((224, 224), 'bilinear', 0.875, 'center')
    seen = []
    views([DecodedPhoto(pixels)], [0], out)
    for step in views.transforms[0].transforms:
        seen.append(step(seen[-1]) if seen else step(Image.fromarray(pixels)))
    assert max(max(image.size) for image in seen) <= 16 * 256
    assert (np.asarray(seen[-1]) == out[0, 0]).all() and out[0, 0, 112, 112].max() > 0


def test_arguments_of_timm_models_that_people_use_are_allowed():
    check_arguments({
        'img_size': 224, 'global_pool': 'avg', 'drop_rate': 0.1, 'patch_size': 16, 'dynamic_img_size': True,
        'act_layer': 'gelu', 'embed_dim': 384, 'depths': (3, 3, 9, 3), 'class_token': False, 'init_values': 1e-5,
        'output_stride': 16, 'mlp_ratio': 4.0, 'num_heads': 6, 'reg_tokens': 4, 'qkv_bias': True, 'norm_layer': None})
    with pytest.raises(ValueError, match="'pretrained' is not among"):
        check_arguments({'pretrained': True})
