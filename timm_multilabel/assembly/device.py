"""The device of this process, the precision on it, and the processes that load for it."""
import os
from pathlib import Path
from typing import Any, TypedDict

import psutil
import torch
from timm.utils.distributed import init_distributed_device_so

from timm_multilabel.distributed import world
from timm_multilabel.errors import SettingError
from timm_multilabel.temporary import hold
from timm_multilabel.training.parent import STORE, watch_launcher
from timm_multilabel.training.trainer import Precision


def start_device(name: str | None) -> torch.device:
    """Join the other processes, if torchrun started some, and pick this one's device.

    From here on the process ends, saved, when its launcher is gone.
    """
    watch_launcher()
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    if name.startswith('cuda') and not torch.cuda.is_available():
        raise SettingError(f'--device {name}: this machine has no CUDA device; pass --device cpu')
    try:
        torch.device(name)
    except RuntimeError as error:
        raise _unusable(name, error) from error
    try:
        device = torch.device(init_distributed_device_so(name, dist_url=_meeting_place())['device'])
    except (RuntimeError, ValueError) as error:
        raise SettingError(
            f'the processes of this run cannot join ({_one_line(error)}); start them with ./distributed_run.sh, or '
            'unset WORLD_SIZE and SLURM_NTASKS for one process') from error
    try:
        # Only now: before, every process of a machine would take memory of its first GPU.
        torch.empty(0, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the last: 'meta', which holds no numbers
        raise _unusable(name, error) from error
    if device.type == 'cuda':
        torch.backends.cudnn.benchmark = True
    return device


def _meeting_place() -> str | None:
    """The URL where the processes meet, if it is none of torchrun's ports.

    Where all of them are on this machine, they then talk over its loopback interface alone, unless the user has
    chosen another: they unpickle what they receive.
    """
    ranks = os.environ.get('WORLD_SIZE')
    if ranks is not None and os.environ.get('LOCAL_WORLD_SIZE') == ranks:
        loopback = [name for name, addresses in psutil.net_if_addrs().items()
                    if any(each.address == '127.0.0.1' for each in addresses)]
        for name in loopback:
            os.environ.setdefault('GLOO_SOCKET_IFNAME', name)
            os.environ.setdefault('NCCL_SOCKET_IFNAME', f'={name}')
    if STORE not in os.environ:
        return None
    hold(Path(os.environ[STORE]).parent)
    # Under Slurm timm adds rank and size itself.
    query = '' if 'SLURM_PROCID' in os.environ else f'?rank={os.environ["RANK"]}&world_size={ranks}'
    return f'file://{os.environ[STORE]}-{os.environ["TORCHELASTIC_RESTART_COUNT"]}{query}'


def _unusable(name: str, error: Exception) -> SettingError:
    return SettingError(f'--device {name}: cannot be used ({_one_line(error)})')


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split())[:200]


def choose_precision(device: torch.device, amp: bool, amp_dtype: str | None, channels_last: bool) -> Precision:
    """The precision that --amp, --amp-dtype and --channels-last ask for."""
    dtype = None
    if amp:
        dtype = getattr(torch, amp_dtype or ('float16' if device.type == 'cuda' else 'bfloat16'))
        if dtype is torch.float16 and device.type != 'cuda':
            raise SettingError(f'--amp-dtype float16 needs CUDA, and the device is {device}; pass --amp-dtype bfloat16')
    return Precision(device, dtype, channels_last)


class LoaderOptions(TypedDict):
    """What all loaders of a process share: normalisation, where batches go, loader processes, the share of the rows."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    workers: int
    rank: int
    ranks: int


def loader_options(data_config: dict[str, Any], device: torch.device, workers: int) -> LoaderOptions:
    """The options of loaders for images as timm's data config has them.

    Args:
        data_config: timm's, with mean and standard deviation.
        device: Where the batches go.
        workers: Loader processes that are asked for.
    """
    rank, ranks = world()
    return {
        'mean': tuple(data_config['mean']),
        'std': tuple(data_config['std']),
        'device': device,
        'workers': loader_workers(workers),
        'rank': rank,
        'ranks': ranks,
    }


def loader_workers(asked: int) -> int:
    """The loader processes to start: those asked for, but no more than the machine has cores, which would be slower."""
    return min(asked, os.cpu_count() or asked)
