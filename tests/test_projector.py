"""The projector: its layers, and what it makes of the draws that it is told."""
import pytest
import torch
import torch.nn.functional as F
from common import SPACE, train_run, train_settings, write_data
from torch import nn

from timm_multilabel.assembly.checks import check_phases
from timm_multilabel.cli.main import run_command
from timm_multilabel.errors import UserError
from timm_multilabel.exports.weights import load_exported
from timm_multilabel.labels import LabelSpace
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.projector import ConditionedProjector, Projector
from timm_multilabel.task import JointTask
from timm_multilabel.training.checkpoint import load_model, read_checkpoint
from timm_multilabel.views.device import make_drawn
from timm_multilabel.views.recipe import ViewRecipe, draw
from timm_multilabel.views.told import PARAMETERS


@pytest.mark.parametrize(('settings', 'shapes'), [
    ({}, [(10, 10), (7, 10)]),
    ({'layers': 1}, [(7, 10)]),
    ({'layers': 3, 'width': 20}, [(20, 10), (20, 20), (7, 20)]),
])
def test_layers_and_their_widths(settings, shapes):
    torch.manual_seed(0)
    projector = Projector(10, 7, **settings).double()
    assert [tuple(p.shape) for p in projector.parameters()] == shapes
    features = torch.randn(4, 10, dtype=torch.float64)
    expected, weights = features, list(projector.parameters())
    for weight in weights[:-1]:
        expected = (expected @ weight.T).clamp(min=0)
    torch.testing.assert_close(projector(features), expected @ weights[-1].T)


def test_a_conditioned_projector_by_hand():
    torch.manual_seed(0)
    projector = ConditionedProjector(10, 7, 3).double()
    features, drawn = torch.randn(4, 10, dtype=torch.float64), torch.rand(4, PARAMETERS, dtype=torch.float64)
    state = projector.state_dict()
    hidden = F.linear(drawn, state['embed.0.weight'], state['embed.0.bias']).relu()
    hidden = torch.cat([features, F.linear(hidden, state['embed.2.weight'], state['embed.2.bias'])], dim=1)
    assert [tuple(state[f'project.{place}.weight'].shape) for place in (0, 2, 4)] == [(10, 74), (10, 10), (7, 10)]
    for place in (0, 2):
        hidden = (hidden @ state[f'project.{place}.weight'].T).relu()
    torch.testing.assert_close(projector(features, drawn), hidden @ state['project.4.weight'].T)


def test_a_head_cannot_read_what_depends_on_draws():
    model = MultiLabelModel(Colors(), SPACE, head_options={'color': {'input': 'projection'}})
    with pytest.raises(ValueError, match='a head reads projections'):
        JointTask(model, condition_projector=True)


class Colors(nn.Module):
    """Features of single colors."""
    head_hidden_size = 16

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 16, 1), nn.Linear(16, 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(images)).mean(dim=(2, 3)))


def _pretrain(conditioned):
    """SimCLR on photos that differ in their hue only, which jitter turns by up to a quarter: its last losses, and how
    much features of photos differ, relative to their mean."""
    generator = torch.Generator().manual_seed(1)
    angle = 2 * torch.pi * torch.rand(256, generator=generator)
    colors = 127 + 70 * torch.stack([torch.cos(angle - turn * 2 * torch.pi / 3) for turn in range(3)], dim=1)
    photos = colors[:, None, :, None].expand(-1, 4, 3, 4).to(torch.uint8)
    recipe = ViewRecipe((2, 2), jitter=(0, 0, 0, 0.25), jitter_prob=1.0, grayscale_prob=0.0, blur_prob=0.0)
    torch.manual_seed(0)
    task = JointTask(
        MultiLabelModel(Colors(), LabelSpace(())), simclr_weight=1, classification_weight=0, temperature=0.2,
        projection_dim=16, projector_width=64, condition_projector=conditioned)
    optimizer = torch.optim.Adam(task.parameters(), lr=0.005)
    sizes, losses = torch.full((64, 2), 4), []
    for step in range(100):
        rows = torch.randint(256, (32,), generator=generator).repeat(2)
        draws = draw(recipe, torch.arange(64) + 64 * step, *sizes.unbind(1))
        views = make_drawn(recipe, photos[rows], sizes, sizes, draws) / 127.5 - 1
        told = task.told.of(draws, *sizes.unbind(1)) if task.told else torch.empty(64, 0)
        optimizer.zero_grad()
        loss = task(views, told)['loss']
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        features = task.joint_module.model.backbone(photos.transpose(1, 2).float() / 127.5 - 1)
    return sum(losses[-20:]) / 20, (features.std(dim=0).norm() / features.mean(dim=0).norm()).item()


@pytest.mark.slow
def test_features_keep_the_color_that_the_projector_is_told_of():
    """What CASSLE claims. Told of the jitter, the projector finds the other view (loss 2.66, by chance 4.14), and the
    features of photos differ by 1.76 times their mean; otherwise it hardly does (3.99), and they differ by 0.41."""
    (told, spread), (untold, narrow) = _pretrain(True), _pretrain(False)
    assert told < 3 and untold > 3.8
    assert spread > 1.2 and narrow < 0.7


@pytest.mark.slow
def test_a_model_with_a_deeper_projector_of_its_own_is_saved_exported_and_embeds(tmp_path, capsys):
    data = write_data(tmp_path / 'data')
    run = train_run(data, tmp_path, '--head', 'color:input=projection', '--projector-layers', '3', '--projector-width',
                    '5', '--projection-dim', '6', epochs=1)
    checkpoint, images = read_checkpoint(run / 'last.pth.tar'), torch.rand(2, 3, 32, 32)
    model = load_model(checkpoint, 'plain')
    assert [tuple(p.shape) for p in model.projector.parameters()][1:] == [(5, 5), (6, 5)]
    for words in (['export', str(run / 'last.pth.tar'), '--formats', 'safetensors', '--out', str(tmp_path / 'out')],
                  ['embed', str(run / 'last.pth.tar'), str(data / 'images'), '--what', 'projections', '--out',
                   str(tmp_path / 'x.npz')]):
        run_command(words[0], f'timm-multilabel {words[0]}', words[1:])
    exported = load_exported(tmp_path / 'out' / 'multilabel.safetensors')
    torch.testing.assert_close(exported(images)['color'], model(images)['color'])
    simclr = train_run(data, tmp_path / 'b', '-wlc', '0', '--projector-layers', '3', '--projector-width', '5', epochs=1)
    run_command('embed', 'timm-multilabel embed', [
        str(simclr / 'last.pth.tar'), str(data / 'images'), '--what', 'projections', '--out', str(tmp_path / 'y.npz')])


@pytest.mark.parametrize(('flags', 'message'), [
    (['--views', 'simclr-exact'],
     '--condition-projector: what --views simclr-exact draws for a view is not known; pass --views simclr'),
    (['--aa', 'rand-m9'],
     '--condition-projector: what --views timm draws for a view is not known; pass --views simclr'),
    (['-wls', '0'], '--condition-projector would change nothing: there is no SimCLR; leave it out'),
])
def test_settings_that_do_not_go_together(flags, message):
    with pytest.raises(UserError) as error:
        check_phases(train_settings('data', '--condition-projector', *flags))
    assert error.value.line == message


@pytest.mark.slow
def test_a_head_of_projections_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_run(write_data(tmp_path / 'data'), tmp_path, '--condition-projector', '--head', 'color:input=projection')
    assert "--condition-projector: head 'color' reads projections (input=projection)" in capsys.readouterr().err
