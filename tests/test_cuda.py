"""What a GPU must do as the CPU does; `TEST_DEVICE=cpu` runs these tests there, to show that they themselves are right.

`python -m pytest -m cuda`, or as a stage of `python -m benchmarks.gpu`.
"""
import hashlib
import os
import shutil
import time
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import tiny_task, train_run, weights, write_data

from timm_multilabel import losses
from timm_multilabel.labels import MISSING
from timm_multilabel.task import JointTask, Pool
from timm_multilabel.training.optimizer_step import OptimizerStep
from timm_multilabel.training.progress_bar import ProgressBar
from timm_multilabel.training.trainer import Precision, Trainer, make_scaler
from timm_multilabel.training.training_progress import TrainingProgress

DEVICE = torch.device(os.environ.get('TEST_DEVICE', 'cuda'))
CUDA = DEVICE.type == 'cuda'
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(),
                       reason='needs a CUDA device (TEST_DEVICE=cpu runs it on the CPU)'),
]
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read once, where algorithms are to be deterministic
LABELS = torch.tensor([0, 3, MISSING, 2, MISSING, 1])
TAGS = torch.tensor([[0, 1, MISSING, 1], [1, 1, 0, 0]] * 3)
SHARES = torch.tensor([[0.7, 0, 0.3, 0], [0, 0.7, 0, 0], [0, 0, 0, 0]] * 2)
NUMBERS = torch.tensor([0.1, -3.0, float('nan'), 2.0, 0.7, float('nan')])
WEAK = 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


@contextmanager
def no_waits():
    """An operation for which the host waits for the device raises; on a CPU there are none."""
    if CUDA:
        torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode('default')


def smoothed(logits, target, smoothing=0.1):
    """The formula of cross-entropy against shares of classes (B, C)."""
    q = target * (1 - smoothing) + smoothing * target.sum(dim=1, keepdim=True) / logits.shape[1]
    return -(q * (logits - logits.exp().sum(dim=1, keepdim=True).log())).sum()


def binary(logits, target, smoothing=0.1):
    """The formula of binary cross-entropy, without what is missing."""
    y, p = target * (1 - smoothing) + smoothing / 2, 1 / (1 + (-logits).exp())
    return -((y * p.log() + (1 - y) * (1 - p).log()) * (target != MISSING)).sum()


def entropy(p):
    return -(p * p.log()).sum(dim=-1)


def margin(logits, target):
    """cos(theta + 0.3) at the label, the cosine elsewhere."""
    cosine = logits / 10
    known = F.one_hot(target.clamp(min=0), logits.shape[1]).bool() & (target != MISSING)[:, None]
    return torch.where(known, (cosine.clamp(-0.999, 0.999).acos() + 0.3).cos(), cosine).square().sum()


def huber(off):
    return torch.where(off.abs() < 1, off.square() / 2, off.abs() - 0.5).sum()


def passed(weak, confidence, threshold=0.8):
    return (confidence(weak) >= threshold).to(weak.dtype)


def pairs(weak):
    return torch.maximum(weak.sigmoid(), 1 - weak.sigmoid())


LOSSES = {
    'index cross-entropy': (
        lambda x, y: losses.index_cross_entropy(x, y, 0.1)[0],
        lambda x, y: smoothed(x, F.one_hot(y.clamp(min=0), 4) * (y != MISSING)[:, None]), LABELS),
    'dense cross-entropy': (lambda x, y: losses.dense_cross_entropy(x, y, 0.1)[0], smoothed, SHARES),
    'binary cross-entropy': (lambda x, y: losses.binary_cross_entropy(x, y, 0.1)[0], binary, TAGS),
    'arcface': (lambda x, y: losses.arcface_logits(x / 10, y, 0.3).square().sum(), margin, LABELS),
    'smooth L1': (
        lambda x, y: losses.smooth_l1(x[:, 0], y)[0],
        lambda x, y: huber((x[:, 0] - y)[~y.isnan()]), NUMBERS),
    'entropy': (lambda x, _: losses.categorical_entropy(x).sum(), lambda x, _: entropy(x.softmax(1)).sum(), LABELS),
    'binary entropy': (
        lambda x, _: losses.binary_entropy(x).sum(),
        lambda x, _: entropy(torch.stack([x.sigmoid(), 1 - x.sigmoid()], dim=-1)).mean(dim=1).sum(), LABELS),
    'marginal entropy': (lambda x, _: losses.marginal_entropy(x.softmax(1)), lambda x, _: entropy(x.softmax(1).mean(0)),
                         LABELS),
    'binary marginal entropy': (
        lambda x, _: losses.binary_marginal_entropy(x.sigmoid()),
        lambda x, _: entropy(torch.stack([x.sigmoid().mean(0), 1 - x.sigmoid().mean(0)], dim=-1)).mean(), LABELS),
    'pseudo-labels': (
        lambda x, weak: losses.pseudo_label_loss(x, weak, 0.8)[0],
        lambda x, weak: (F.one_hot(weak.argmax(1), 4) * -x.log_softmax(1)).sum(1) @ passed(
            weak, lambda w: w.softmax(1).amax(1)), WEAK),
    'pseudo-labels of tags': (
        lambda x, weak: losses.binary_pseudo_label_loss(x, weak, 0.8)[0],
        lambda x, weak: (F.softplus(torch.where(weak > 0, -x, x)) * passed(weak, pairs)).mean(1).sum(), WEAK),
}


@pytest.mark.parametrize('name', LOSSES)
def test_loss_equals_its_formula_in_float64(name):
    ours, formula, target = LOSSES[name]
    x = 2 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    mine, exact = x.clone().to(DEVICE).requires_grad_(), x.double().requires_grad_()
    made = ours(mine, target.to(DEVICE))
    expected = formula(exact, target.double() if target.is_floating_point() else target)
    made.backward(), expected.backward()
    assert made.item() == pytest.approx(expected.item(), rel=2e-6)
    torch.testing.assert_close(mine.grad.cpu().double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('temperature', [0.01, 0.1, 0.5])
@pytest.mark.parametrize('dtype, relative', [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_nt_xent_loss_equals_its_formula_in_float64(temperature, dtype, relative):
    """Of more rows than a tile of the device has."""
    from test_nt_xent import reference
    count = 2500 if CUDA else 300
    a, b = torch.randn(2, count, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    mine, exact = ([view.clone().to(*to).requires_grad_() for view in (a, b)] for to in ((DEVICE,), (torch.float64,)))
    made, expected = losses.nt_xent_loss(*mine, temperature), reference(*exact, temperature)
    made.backward(), expected.backward()
    assert made.item() == pytest.approx(expected.item(), rel=1e-5)
    for view, other in zip(mine, exact, strict=True):
        off = (view.grad.cpu().double() - other.grad).norm() / other.grad.norm()
        assert off <= relative / min(temperature, 0.5)


def by_device(recipe, pixels):
    """`views/device.py` on images of several sizes, on the device under test."""
    from timm_multilabel.views.device import make_views
    height, width = (max(image.shape[side] for image in pixels) for side in (0, 1))
    images = torch.full((len(pixels), height, 3, width), 77, dtype=torch.uint8)
    for image, its in zip(images, pixels):
        image[:its.shape[0], :, :its.shape[1]] = torch.from_numpy(its).permute(0, 2, 1)
    shapes = torch.tensor([image.shape[:2] for image in pixels])
    images, shapes, seeds = (each.to(DEVICE) for each in (images, shapes, torch.arange(len(pixels))))
    with no_waits():
        made = make_views(recipe, images, shapes, shapes, seeds, 0)
    return made.permute(0, 2, 3, 1).cpu().numpy()


@pytest.mark.parametrize('options, mean, most', [
    ({'jitter_prob': 0.0, 'grayscale_prob': 0.0, 'blur_prob': 0.0}, 0.3, 1.1),
    ({'jitter_prob': 0.0, 'grayscale_prob': 0.0, 'blur_prob': 0.0, 'interpolation': 'bicubic'}, 0.35, 8),
    ({}, 0.4, 6),
], ids=['crop', 'bicubic', 'all'])
def test_the_device_makes_the_hosts_views(options, mean, most):
    """As in test_views.py, with its tolerances of 0 to 255; and the host waits for nothing."""
    from test_views import by_opencv, picture

    from timm_multilabel.data.images import DecodedPhoto
    from timm_multilabel.views.recipe import ViewRecipe
    recipe = ViewRecipe((64, 64), **options)
    pixels = [picture(*shape, seed) for seed, shape in enumerate([(80, 60), (60, 60), (77, 60), (40, 90)] * 5)]
    off = np.abs(by_device(recipe, pixels) - by_opencv(recipe, [DecodedPhoto(image) for image in pixels]))
    assert off.mean() < mean and off.max() <= most


def test_draws_are_the_same_on_any_device():
    from timm_multilabel.views.recipe import ViewRecipe, draw, view_seeds
    seeds, sizes = torch.arange(500), torch.full((500,), 90)
    here, there = (draw(ViewRecipe((32, 32), rotation=5.0), view_seeds(seeds.to(device), 1), sizes.to(device),
                        sizes.to(device)) for device in ('cpu', DEVICE))
    compared = {name: value for name, value in here._asdict().items() if isinstance(value, torch.Tensor)}
    assert len(compared) > 5
    for name, value in compared.items():
        off = (getattr(there, name).cpu().double() - value.double()).abs() > 1e-4
        assert off.double().mean() < 0.005, name  # where the last bit decides between two pixels


class Loader(list):
    def set_epoch(self, epoch, first=0):
        pass


def batches(count, size=6):
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([[0, 1], [2, 0], [1, MISSING]]).repeat(size // 3, 1).to(DEVICE)
    return Loader((torch.randn(size, 3, 8, 8, generator=generator).to(DEVICE), target) for _ in range(count))


def trainer(task, loader, amp_dtype=None, **options):
    precision = Precision(DEVICE, amp_dtype, channels_last=True)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    step = OptimizerStep(task, optimizer, scaler=make_scaler(precision), **options)
    return Trainer(step, precision, loader, None, images_per_step=6, seed=0)


def fit(trainer):
    with ProgressBar('', 1, False) as progress:
        return trainer.train(TrainingProgress(0), 0.1, progress)


def device_task(**options):
    return tiny_task(device=DEVICE, **options).to(DEVICE)


def state(task):
    return torch.cat([parameter.detach().flatten() for parameter in task.trainable_module.parameters()]).cpu()


def test_the_scaler_skips_an_update_and_lowers_the_scale():
    from timm_multilabel.compat import grad_scaler
    task, loader, seen = device_task(), batches(4), []
    loader[1] = loader[1][0] * float('inf'), loader[1][1]
    made = trainer(task, loader, torch.float16 if CUDA else None)
    if not CUDA:  # whose autocast of float16 is none of training's
        made.optimizer_step.scaler = make_scaler(Precision(DEVICE, torch.float16))
    scaler = grad_scaler(made.optimizer_step.scaler)
    scaler.scale(torch.zeros((), device=DEVICE))  # makes its numbers
    scaler.load_state_dict(scaler.state_dict() | {'scale': 1024.0})
    task.trainable_module.register_forward_pre_hook(lambda *_: seen.append((state(task), scaler.get_scale())))
    fit(made)
    seen.append((state(task), scaler.get_scale()))
    moved = [not torch.equal(a, b) for (a, _), (b, _) in pairwise(seen)]
    assert moved == [True, False, True, True] and seen[-1][0].isfinite().all()
    assert [scale for _, scale in seen] == [1024, 1024, 512, 512, 512]


def test_bfloat16_is_close_to_float32():
    results = [fit(trainer(device_task(), batches(4), dtype)) for dtype in (None, torch.bfloat16)]
    assert results[1]['train_loss'] == pytest.approx(results[0]['train_loss'], rel=0.02)


@pytest.mark.parametrize('pool', [Pool(), Pool(
    1, pseudo_label_weight=1.0, pseudo_label_reference='labelled', pseudo_label_alignment=True)])
def test_a_step_waits_for_nothing(pool):
    """Between the ends of an epoch: the steps in the middle are told to raise where the host waits."""
    task, steps = device_task(pool=pool), []
    if pool.batch_size:
        task.setup_ema()

    def before(*_):
        steps.append(len(steps))
        if CUDA:
            torch.cuda.set_sync_debug_mode('error' if 2 <= steps[-1] < 7 else 'default')

    task.trainable_module.register_forward_pre_hook(before)
    try:
        fit(trainer(task, batches(8), torch.bfloat16))
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode('default')
    assert len(steps) == 8


def test_ema_follows_its_formula():
    task, history = device_task(), []
    task.setup_ema(decay=0.75)
    task.trainable_module.register_forward_pre_hook(lambda *_: history.append(state(task)))
    fit(trainer(task, batches(3)))
    expected = 0.75 * (0.75 * history[1] + 0.25 * history[2]) + 0.25 * state(task)
    ema = task.get_trainable_module(ema=True)
    made = torch.cat([parameter.flatten() for parameter in ema.parameters()])
    assert made.device.type == DEVICE.type
    torch.testing.assert_close(made.cpu(), expected)


@pytest.mark.parametrize('size', [1, 3])
def test_micro_batches_equal_the_whole_batch(size):
    from test_gradient_cache import POOL, batch, step
    images, target = (each.to(DEVICE) for each in batch())
    made, expected = (step(device_task(dtype=torch.float64, micro_batch=micro, pool=POOL), images, target)
                      for micro in (size, None))
    torch.testing.assert_close(made[0]['loss'], expected[0]['loss'], rtol=1e-10, atol=1e-12)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(made[1][name], gradient, rtol=1e-9, atol=1e-11)


def gradients(task):
    images, target = batches(1)[0]
    task.train()
    result = task(images, target)
    result['loss'].backward()
    return result['loss'].item(), [parameter.grad.cpu() for parameter in task.trainable_module.parameters()]


def same_step(made, expected):
    assert made[0] == pytest.approx(expected[0], rel=1e-5)
    for mine, theirs in zip(made[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_one_rank_is_one_process(tmp_path):
    """DistributedDataParallel over NCCL (gloo on a CPU): that it starts, reduces and ends."""
    expected = gradients(device_task())
    dist.init_process_group('nccl' if CUDA else 'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        task = device_task()
        task.prepare_distributed(device_ids=[torch.cuda.current_device()] if CUDA else None)
        same_step(gradients(task), expected)
        total = torch.ones(3, device=DEVICE)
        dist.all_reduce(total)
        assert total.tolist() == [1, 1, 1]
    finally:
        dist.destroy_process_group()


def run(data_dir, output, *flags, epochs=2):
    return train_run(data_dir, output, '--device', DEVICE.type, *flags, epochs=epochs)


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('flags', [[], ['--cache', 'device']], ids=['files', 'cache'])
def test_a_resumed_run_sees_the_same_data_and_draws(data_dir, tmp_path, monkeypatch, flags, deterministic):
    """Weights within a tolerance, since a GPU's sums have no order; bit for bit where it is told to give them one."""
    from test_resume import killed_run
    flags = ['--device', DEVICE.type, '--checkpoint-steps', '2', '--model-ema', '--model-ema-decay', '0.9', *flags]
    seen, forward = [], JointTask.forward

    def watched(self, images, target):
        generator = torch.cuda.get_rng_state() if CUDA else torch.get_rng_state()
        seen.append(hashlib.sha256(b''.join(
            each.cpu().contiguous().numpy().tobytes() for each in (images, target, generator))).hexdigest())
        return forward(self, images, target)

    monkeypatch.setattr(JointTask, 'forward', watched)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        whole = train_run(data_dir, tmp_path / 'whole', *flags)
        expected, seen[:] = list(seen), []
        part = killed_run(data_dir, tmp_path / 'part', monkeypatch, 2, *flags, epochs=2)
        before, seen[:] = len(seen), []
        train_run(data_dir, tmp_path / 'part', *flags, '--resume', 'auto')
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen and seen == expected[before:]
    made, of_whole = (weights(folder / 'last.pth.tar') for folder in (part, whole))
    assert made.keys() == of_whole.keys()
    exact = deterministic or not CUDA
    for name, value in of_whole.items():
        torch.testing.assert_close(
            made[name], value, **({'rtol': 0, 'atol': 0} if exact else {'rtol': 1e-2, 'atol': 1e-3}), msg=name)


def test_a_run_is_that_of_the_cpu(data_dir, tmp_path):
    """Without dropout, whose draws are the device's own, and erasing: the same views, and losses within a tolerance."""
    flags = ['--drop', '0', '--reprob', '0', '--lr', '0.001']
    found = []
    for name, device in (('here', DEVICE.type), ('cpu', 'cpu')):
        folder = train_run(data_dir, tmp_path / name, *flags, '--device', device)
        found.append(pd.read_csv(folder / 'summary.csv')['train_loss'].to_numpy())
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run on the device: its best checkpoint and its images."""
    folder = tmp_path_factory.mktemp('trained')
    data = write_data(folder / 'data')
    return run(data, folder, *(['--amp'] if CUDA else []), epochs=1) / 'last.pth.tar', data / 'images'


def test_predict_and_embed_say_the_same_on_the_cpu(trained, tmp_path):
    from timm_multilabel.api.embed import embed
    from timm_multilabel.api.predict import predict
    checkpoint, images = trained
    here, there = (predict(checkpoint, images, device=device, top_k=3, workers=0).table.sort_values(
        ['image', 'head', 'label']) for device in ('cpu', DEVICE.type))
    assert (here[['image', 'head', 'label']].to_numpy() == there[['image', 'head', 'label']].to_numpy()).all()
    assert here['probability'].to_numpy() == pytest.approx(there['probability'].to_numpy(), abs=1e-3)
    here, there = (embed(checkpoint, images, tmp_path / f'{number}.npz', device=device, workers=0).embeddings.vectors
                   for number, device in enumerate(('cpu', DEVICE.type)))
    np.testing.assert_allclose(here, there, rtol=1e-2, atol=1e-3)


def test_exports_of_its_checkpoint_are_the_cpus(trained, tmp_path):
    """Each file is compared with the checkpoint on the CPU before it is put in place."""
    from timm_multilabel.api.export import export
    made = export(trained[0], formats=['safetensors', 'pt2', 'backbone'], out=str(tmp_path / 'export'))
    assert len(made.files) >= 2 and all(path.exists() and off < 1e-3 for path, off in made.files.items())


def test_the_host_runs_ahead_of_the_device():
    """On CUDA a step returns before the device has done it: what a wait within it would prevent."""
    if not CUDA:
        pytest.skip('a CPU is its own host')
    task, loader = device_task(), batches(1, size=6)
    busy = torch.randn(8192, 8192, device=DEVICE)
    gradients(task)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(50):
        busy = busy @ busy
    task(*loader[0])['loss'].backward()
    told = time.perf_counter() - started
    torch.cuda.synchronize()
    assert told < 0.5 * (time.perf_counter() - started)


@pytest.mark.skipif(not (shutil.which('cc') or shutil.which('gcc')), reason='torch.compile needs a C compiler')
def test_a_compiled_step_is_the_same():
    """The last of these tests, since it may take a minute."""
    compiled = device_task()
    compiled.compile()
    same_step(gradients(compiled), gradients(device_task()))
