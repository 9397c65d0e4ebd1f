"""A training loop of your own over timm.task: python examples/own_loop.py my-photos --model convnext_tiny"""
import argparse

import torch
from timm.data import create_loader, resolve_data_config
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, get_outdir

import timm_multilabel as tm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('data_dir')
for name, default in {'model': 'efficientnet_b0', 'img_size': 224, 'epochs': 10, 'batch_size': 64, 'workers': 4,
                      'output': 'output/own-loop', 'device': 'cuda' if torch.cuda.is_available() else 'cpu'}.items():
    parser.add_argument(f'--{name.replace("_", "-")}', type=type(default), default=default)
args = parser.parse_args()

train, val = (tm.read_table(f'{args.data_dir}/{split}.csv') for split in ('train', 'val'))
label_space = tm.find_label_space([train], None)
model = tm.MultiLabelModel(tm.create_backbone(args.model, input_size={'img_size': args.img_size}), label_space)
config = resolve_data_config(vars(args), model=model)
task = tm.JointTask(model, metadata={'data_config': config}, device=torch.device(args.device)).to(args.device)
optimizer = tm.create_optimizer(task, 'adamw', lr=5e-4, weight_decay=0.05)
scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=args.epochs, warmup_epochs=min(3, args.epochs - 1))
saver = CheckpointSaver(model, optimizer, args, task=task, checkpoint_dir=get_outdir(args.output))
common = {name: config[name] for name in ('input_size', 'mean', 'std', 'crop_pct', 'interpolation')}
common.update(batch_size=args.batch_size, num_workers=args.workers, device=task.device)
train_rows = tm.MultiLabelDataset(tm.encode_rows(train, label_space), views=task.views)
train_loader = create_loader(train_rows, is_training=True, **common)
val_loader = create_loader(tm.MultiLabelDataset(tm.encode_rows(val, label_space)), **common)
for epoch in range(epochs):
    task.train()
    for images, target in train_loader:  # all first views, then all second ones
        loss = task(images, target)['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    evaluator = task.eval().create_evaluator()
    with torch.no_grad():
        for images, target in val_loader:
            evaluator.update(model(images), target)  # the model gives a dict: the output of each head
    figures = evaluator.compute()
    scheduler.step(epoch + 1)
    saver.save_checkpoint(epoch, figures[evaluator.default_metric])
    print(f'epoch {epoch + 1}/{epochs}, train loss {loss.item():.3f}:', {k: round(v, 2) for k, v in figures.items()})
