#!/usr/bin/env python3
"""Validate: `python validate.py DIR --checkpoint FILE`."""
import sys

from timm_multilabel.cli.main import run_command

if __name__ == '__main__':
    run_command('validate', 'validate.py', sys.argv[1:])
