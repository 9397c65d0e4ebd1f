#!/usr/bin/env python3
"""Train: `python train.py DIR --model NAME ...`, or `./distributed_train.sh N DIR --model NAME ...` for N GPUs."""
import sys

from timm_multilabel.cli.main import run_command

if __name__ == '__main__':
    run_command('train', 'train.py', sys.argv[1:])
