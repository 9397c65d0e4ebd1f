"""The training loop: an epoch of steps, its evaluation, and the epochs of a run."""
import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from timm.utils import NativeScaler, distribute_bn
from torch import nn
from tqdm.utils import disp_len

from timm_multilabel.config.train import RunSettings
from timm_multilabel.distributed import all_objects, world
from timm_multilabel.errors import UserError, abbreviated
from timm_multilabel.heads import Head
from timm_multilabel.loading.batches import BadImages, Batch, EvalBatches, TrainBatches
from timm_multilabel.loading.streaming import KeptOutOfPool
from timm_multilabel.metric_names import in_summary, of_head
from timm_multilabel.metrics import MultiLabelEvaluator, TrainingMeter, default_metric, less_is_better
from timm_multilabel.seeds import MODEL, seed_step
from timm_multilabel.task import JointTask
from timm_multilabel.training.optimizer_step import OptimizerStep
from timm_multilabel.training.progress_bar import ProgressBar, RunLength, fitted, line_width, wrapped
from timm_multilabel.training.run_folder import RunFolder
from timm_multilabel.training.saver import WholeSaver
from timm_multilabel.training.signals import Stopped, StopSignals
from timm_multilabel.training.trackers import Trackers
from timm_multilabel.training.training_progress import TrainingProgress
from timm_multilabel.training.update_decisions import ToldToStop, UpdateDecision, UpdateDecisions, until_told

WAY_OUT = 'lower --lr, clip with --clip-grad 1, or leave --amp out'
_STRIKES = 20  # updates skipped in a row that end a run; where some are good between them, later
_NAME = 24  # letters of a head's or a phase's name on a line
_FORGIVEN = 0.1  # of a strike, by an update that is good


@dataclass(frozen=True)
class Precision:
    """How tensors are computed and laid out.

    Args:
        device: The device of the model and of its batches.
        amp_dtype: The lower precision of autocast; none when None.
        channels_last: Lay images out with the channels last, which some GPUs compute faster.
    """
    device: torch.device
    amp_dtype: torch.dtype | None = None
    channels_last: bool = False

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.amp_dtype) if self.amp_dtype is not None else nullcontext()

    def layout(self, images: torch.Tensor) -> torch.Tensor:
        # Loaders may give either: bytes come with the colors last, images on a device are made with them first.
        return images.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


def check_finite(value: float, what: str) -> None:
    """Raise UserError unless a loss is a finite number."""
    if not math.isfinite(value):
        raise UserError(f'{what}: stopped, and the checkpoints of earlier epochs are kept; {WAY_OUT}')


def training_metrics(metrics: dict[str, float], task: JointTask) -> list[str]:
    """The metrics of a progress line, a text each: the loss, the heads, and last its terms, for which room may lack."""
    terms = [f'{term} {metrics[f"{term}_loss"]:.3f}' for term in task.terms if metrics[f'{term}_loss']]
    parts = [f'loss {metrics["train_loss"]:.3f}']
    accuracies = {name: metrics.get(in_summary('train', of_head(name, 'top1')), math.nan) for name in task.heads}
    known = [accuracy for accuracy in accuracies.values() if not math.isnan(accuracy)]
    parts += [f'mean {sum(known) / len(known):.1f}%'] if len(known) > 3 else []  # of which not all may fit
    for name, accuracy in accuracies.items():
        passed = metrics.get(in_summary('train', of_head(name, 'pseudo_labelled')))
        words = [] if math.isnan(accuracy) else [f'{accuracy:.1f}%']
        words += [] if passed is None else [f'({passed:.0f}% pass)']
        parts += [' '.join([abbreviated(name, _NAME), *words])] if words else []
    return parts + (terms if len(terms) > 1 else [])


@torch.no_grad()
def evaluate(
        model: nn.Module,
        loader: Iterable[Batch],
        evaluator: MultiLabelEvaluator,
        precision: Precision,
        progress: ProgressBar,
) -> dict[str, float]:
    """Score a model on every row of a loader, over all ranks."""
    model.eval()
    for images, target in loader:
        with precision.autocast():
            output = model(precision.layout(images))
        evaluator.update(output, target)
        progress.advance()
    return evaluator.compute(distributed=world()[1] > 1)


@dataclass
class Trainer:
    """The epochs of a run.

    Args:
        optimizer_step: What is trained, and how.
        precision: The device, and the precision of its computations.
        train_loader: Training batches.
        eval_loader: Evaluation batches; None where no head is trained.
        images_per_step: Photos of a step, over all ranks.
        seed: Of the run; what is random in a step depends on it and on the place of the step.
        metric: The metric of the evaluation that makes a checkpoint the best.
        phase: Name of the phase, where the run has phases.
        run_folder: Where rows of metrics go (first rank only, else None).
        trackers: What else is told of them (first rank only, else None).
        saver: Writes checkpoints (first rank only, else None).
        bad_images: Those that are left out, where they are; else None.
        kept_out: Counts the unlabelled samples that are passed over, where some may be; else None.
        log_interval: Steps between two readings of the metrics from the device.
        save_interval: Steps between checkpoints within an epoch; none when None.
        signals: What may tell this process to stop, if anything.
    """
    optimizer_step: OptimizerStep
    precision: Precision
    train_loader: TrainBatches
    eval_loader: EvalBatches | None
    images_per_step: int
    seed: int
    metric: str = 'top1'
    phase: str | None = None
    run_folder: RunFolder | None = None
    trackers: Trackers | None = None
    saver: WholeSaver | None = None
    bad_images: BadImages | None = None
    kept_out: KeptOutOfPool | None = None
    log_interval: int = RunSettings.log_interval
    save_interval: int | None = None
    signals: StopSignals | None = None
    task: JointTask = field(init=False)
    skipped_updates: float = field(default=0.0, init=False)
    # The end of an epoch's training, before its evaluation.
    trained: TrainingProgress | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.task = self.optimizer_step.task

    def run(self, start: TrainingProgress, length: RunLength) -> None:
        """Train from a place to the end of the run.

        Raises:
            Stopped: A rank was told to stop, and the state is saved.
        """
        self.skipped_updates = start.skipped_updates
        for epoch in range(start.epoch, length.schedule + length.cooldown):
            title = (f'{abbreviated(self.phase, _NAME)}: ' if self.phase else '') + length.title(epoch)
            self.run_epoch(start if epoch == start.epoch else TrainingProgress(epoch), title)

    def run_epoch(self, start: TrainingProgress, title: str) -> dict[str, Any]:
        """Train an epoch from a place in it, evaluate it, write its row and its checkpoint.

        Raises:
            Stopped: A rank was told to stop, and the state is saved.
        """
        rank, ranks = world()
        epoch, lr = start.epoch, start.lr if start.step else self._mean_lr()
        started = time.perf_counter()
        with ProgressBar(title, len(self.train_loader), rank == 0, self.images_per_step, start.step) as progress:
            trained = self.train(start, lr, progress)
        seconds = time.perf_counter() - started
        images_per_second = (len(self.train_loader) - start.step) * self.images_per_step / seconds
        if ranks > 1:
            for ema in (False, True):
                module = self.task.get_trainable_module(ema=ema)
                if module is not None:
                    distribute_bn(module, ranks, reduce=True)
        row: dict[str, Any] = {**({'phase': self.phase} if self.phase else {}), 'epoch': epoch, **trained}
        tags: dict[str, Any] = {}
        if self.eval_loader is not None:
            try:
                metrics, tags = self.evaluate(title)
                row |= metrics
            except ToldToStop:
                assert self.trained is not None  # by `train`
                self._save_within(self.trained, progress, stop=True)
        row |= {'lr': lr, 'images_per_second': images_per_second}
        self._tell_bad_images(progress)
        if self.kept_out is not None and (news := self.kept_out.news()):
            progress.say(news)
        if self.bad_images is not None:
            row['bad_images'] = len(self.bad_images.known)
        best = self.score(row)
        if self.eval_loader is not None and math.isnan(row.get(best, math.nan)):
            raise UserError(
                f'{best} cannot be computed from the labels of the evaluation; choose another --eval-metric, such as '
                'loss')
        if self.optimizer_step.scheduler is not None:
            self.optimizer_step.scheduler.step(epoch + 1, row[best])
        for line in epoch_lines(title, row, self.task, line_width()):
            progress.say(line)
        self.task.metadata['best_weights'] = 'ema' if best == in_summary('eval_ema', self.metric) else 'plain'
        if self.run_folder is not None:
            summary = self.run_folder.add_summary(row, tags)
            if self.trackers is not None:
                self.trackers.add_epoch(summary)
        if self.saver is not None:
            self.saver.progress = {'run': self._state()}
            # No metric, where every update of an epoch of SimCLR alone was skipped, ranks it nowhere.
            self.saver.save_checkpoint(epoch, None if math.isnan(row[best]) else row[best])
        if self.run_folder is not None:
            self.run_folder.saved()
        if any(all_objects(self._told())):
            raise Stopped(f'stopped after {title}, saved', self.saver.last if self.saver is not None else None)
        return row

    def train(self, start: TrainingProgress, lr: float, progress: ProgressBar) -> dict[str, float]:
        """Train on the batches of an epoch from `start.step` on; `lr` is the learning rate that it began with.

        Figures are read from the device every `log_interval` steps and at the end, and the verdict on an update when
        the device is done with it: no step waits for its device.

        Returns:
            The metrics of `TrainingMeter`, over all ranks.

        Raises:
            UserError: Too many updates were skipped, since loss or gradient are not finite.
            Stopped: A rank was told to stop, and the state is saved.
        """
        rank, ranks = world()
        task, optimizer_step, epoch = self.task, self.optimizer_step, start.epoch
        task.start_epoch(epoch)
        task.train()
        meter = TrainingMeter(task.terms, task.heads, self.precision.device)
        if start.step:
            start.restore(meter, task)
        decisions, skipped = UpdateDecisions(self.precision.device), 0
        steps = len(self.train_loader)
        updates = epoch * optimizer_step.updates_per_epoch(steps) + start.step // optimizer_step.accumulate
        self.train_loader.set_epoch(epoch, start.step)
        for step, (images, target) in enumerate(self.train_loader, start.step):
            # What is random in a step depends on these numbers alone, so that a run that goes on from here is the run
            # that never stopped.
            seed_step(MODEL, self.seed, epoch, rank, step)
            task.start_step(epoch + step / steps)
            update = optimizer_step.is_update(step, steps)
            optimizer_step.begin()
            with nullcontext() if update else task.no_sync():
                with self.precision.autocast():
                    result = task(self.precision.layout(images), target)
                optimizer_step.backward(
                    result['loss'] / optimizer_step.batches_in_update(step, steps),
                    update,
                    decisions,
                    step,
                    self._told(),
                )
            if update:
                updates += 1
                task.update_ema(step=updates)
                if optimizer_step.scheduler is not None:
                    optimizer_step.scheduler.step_update(updates)
            meter.update(result)
            progress.advance()
            done, last = step + 1, step + 1 == steps
            verdicts = decisions.verdicts(all_of_them=last) if update else []
            for verdict in verdicts:
                skipped += self._judge(verdict, epoch)
            # A loss scaler's first updates overflow as a rule.
            if last and skipped == optimizer_step.updates_per_epoch(steps) > 2 and optimizer_step.scaler is None:
                self._give_up(verdicts[-1], epoch)
            if done % self.log_interval == 0 or last:
                metrics = meter.compute()
                progress.show(done, training_metrics(metrics, task))
                if self.trackers is not None:
                    self.trackers.add_progress(self.phase, epoch * steps + done, metrics)
            stop = any(verdict.stop for verdict in verdicts)
            due = self.save_interval and update and done // self.save_interval > (
                done - optimizer_step.batches_in_update(step, steps)) // self.save_interval
            if stop or due and not last:
                self._save_within(TrainingProgress.here(epoch, done, lr, meter, task), progress, stop)
        if skipped:
            progress.say(f'{progress.title}: skipped {skipped} update{"s" * (skipped > 1)} whose loss or gradient is '
                         'not finite')
        self.trained = TrainingProgress.here(epoch, steps, lr, meter, task)
        return meter.compute(distributed=ranks > 1)

    def _told(self) -> bool:
        return self.signals is not None and self.signals.received is not None

    def _mean_lr(self) -> float:
        lrs: list[float] = [group['lr'] for group in self.optimizer_step.optimizer.param_groups]
        return sum(lrs) / len(lrs)

    def _judge(self, verdict: UpdateDecision, epoch: int) -> int:
        """Count an update that was skipped; 1 if it was.

        Raises:
            UserError: They are too many.
        """
        self.skipped_updates = self.skipped_updates + 1 if verdict.bad else max(0.0, self.skipped_updates - _FORGIVEN)
        if self.skipped_updates >= _STRIKES:
            self._give_up(verdict, epoch)
        return int(verdict.bad)

    def _give_up(self, verdict: UpdateDecision, epoch: int) -> NoReturn:
        """Raise UserError that names the rows of an update that was skipped."""
        first = verdict.step // self.optimizer_step.accumulate * self.optimizer_step.accumulate
        rows = [row for step in range(first, verdict.step + 1) for row in self.train_loader.rows_of(epoch, step)]
        told = all_objects((verdict.bad_here, rows))
        guilty = [rows for bad, rows in told if bad] or [rows for _, rows in told]
        where = 'loss' if any(bad for bad, _ in told) else 'gradient'
        raise UserError(
            f'the {where} is not finite, update after update, last at step {verdict.step + 1} of epoch '
            f'{epoch + 1}: stopped, weights and checkpoints are those from before; {WAY_OUT}; the rows of that batch: '
            f'{", ".join(dict.fromkeys(sum(guilty, [])))}')

    def _tell_bad_images(self, progress: ProgressBar) -> None:
        news = self.bad_images.news() if self.bad_images is not None else None
        if news:
            progress.say(news)

    def _state(self) -> dict[str, Any]:
        """What the run needs to go on, beside the task, the optimizer and the place."""
        plateau = getattr(self.optimizer_step.scheduler, 'lr_scheduler', None)  # the only schedule with a memory
        return {
            'ranks': world()[1],
            'images_per_step': self.images_per_step,
            'accumulate': self.optimizer_step.accumulate,
            'seed': self.seed,
            'loader_processes': self.train_loader.order_depends_on,
            'strikes': self.skipped_updates,
            'bad_images': sorted(self.bad_images.known) if self.bad_images is not None else [],
            'plateau': plateau.state_dict() if plateau is not None else None,
        }

    def _save_within(self, place: TrainingProgress, progress: ProgressBar, stop: bool) -> None:
        """Save the state within an epoch.

        Raises:
            Stopped: It was the last step.
        """
        within, path = place.to_dict(len(self.train_loader)), None
        self._tell_bad_images(progress)
        if self.saver is not None:
            self.saver.progress = {'run': self._state(), 'within': within}
            path = self.saver.save_within(place.epoch, place.step)
        if self.run_folder is not None:
            self.run_folder.saved()
        if stop:
            all_objects(None)  # a process that ends has the launcher end the others, so none does before all is saved
            raise Stopped(f'stopped at step {place.step} of {progress.title}, saved', path)

    def evaluate(self, title: str) -> tuple[dict[str, float], dict[str, Any]]:
        """The evaluation's metrics of the plain weights ('eval...') and of the EMA ('eval_ema...'), and those of tags.

        Raises:
            ToldToStop: A rank was told to stop.
        """
        assert self.eval_loader is not None  # else nobody asks
        row: dict[str, float] = {}
        tags: dict[str, Any] = {}
        for part, ema in (('eval', False), ('eval_ema', True)):
            model = self.task.get_eval_model(ema=ema)
            if model is None:
                continue
            with ProgressBar(f'{title} {part}', len(self.eval_loader), visible=world()[0] == 0) as progress:
                evaluator = self.task.create_evaluator()
                metrics = evaluate(
                    model, until_told(self.eval_loader, self._told), evaluator, self.precision, progress)
            row |= {in_summary(part, name): value for name, value in metrics.items()}
            tags |= {part: evaluator.of_tags} if evaluator.of_tags else {}
        check_finite(row['eval_loss'], f'the evaluation loss is {row["eval_loss"]}')
        return row, tags

    def score(self, row: dict[str, Any]) -> str:
        """The column that this epoch is ranked by: of the plain or of the EMA weights, whichever is better."""
        if self.eval_loader is None:
            return self.metric if self.metric in row else 'simclr_loss'
        columns = [in_summary(part, self.metric) for part in ('eval', 'eval_ema')[:1 + self.task.has_ema()]]
        columns = [column for column in columns if column in row] or columns[:1]
        best = min if less_is_better(self.metric, self.task.heads) else max
        return best(columns, key=lambda column: row.get(column, math.nan))


def epoch_lines(title: str, row: dict[str, Any], task: JointTask, width: int) -> list[str]:
    """What stays of an epoch: a line of `width` columns, or, where it does not fit, each evaluation's heads below it.

    Heads that do not fit on the evaluation's line are counted at its end.
    """
    terms = [f'{term} {row[f"{term}_loss"]:.3f}' for term in task.terms if row[f'{term}_loss']]
    losses = [title, f'loss {row["train_loss"]:.3f}' + (f' ({", ".join(terms)})' if len(terms) > 1 else '')]
    mean, means, heads = default_metric(task.heads.values()), [], []
    for part in ('eval', 'eval_ema'):
        if in_summary(part, mean) in row:
            means.append(f'{part} {_percent(row[in_summary(part, mean)], 2)}')
            heads.append([_head_score(head, row[in_summary(part, of_head(name, head.metric_names[0]))])
                          for name, head in task.heads.items()])
    speed = f'lr {row["lr"]:.2g}  {row["images_per_second"]:.0f} images/s'
    line = '  '.join([*losses, *(f'{score}  ({"  ".join(its)})' for score, its in zip(means, heads)), speed])
    if disp_len(line) <= width:
        return [line]
    return [*wrapped([*losses, *means, speed], width),
            *(fitted([f'  {score.split()[0]}:', *its], width) for score, its in zip(means, heads) if len(its) > 1)]


def _head_score(head: Head, value: float) -> str:
    """A head's main metric."""
    figure = head.metric_names[0]
    return f'{abbreviated(head.labels.name, _NAME)} {_percent(value, 1)}' + ('' if figure == 'top1' else f' {figure}')


def _percent(value: float, digits: int) -> str:
    """A percentage; a dash where the labels do not allow one."""
    return '-' if math.isnan(value) else f'{value:.{digits}f}%'


def make_scaler(precision: Precision) -> NativeScaler | None:
    """A loss scaler where float16 needs one."""
    return NativeScaler(device=precision.device.type) if precision.amp_dtype is torch.float16 else None


