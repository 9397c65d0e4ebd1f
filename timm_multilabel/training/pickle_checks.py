"""What the pickle of a checkpoint asks for, found out without running it: few bytes may ask for much memory or time."""
import pickletools
import re
from typing import Any

_CALLED = re.compile(r'torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)|torch Size|'
                     r'collections OrderedDict|argparse Namespace|_codecs encode')
_NESTED = 8  # tuples in tuples; hashing one takes time that doubles with each level
_MARK = object()


def check_pickle(data: bytes) -> None:
    """Raise ValueError where a pickle calls something else than what a checkpoint is made of, or nests tuples deeply.

    PyTorch's `weights_only=True` keeps code from running, and still lets `bytearray` or a storage take any amount of
    memory. The pickle is followed on a stack of depths of tuples and names of callables.

    Args:
        data: The pickle as bytes.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def to_mark() -> list[Any]:
        items = []
        while (item := stack.pop()) is not _MARK:
            items.append(item)
        return items

    for code, argument, _ in pickletools.genops(data):
        name = code.name
        if name == 'MARK':
            stack.append(_MARK)
        elif name == 'GLOBAL':
            stack.append(argument)
        elif name.endswith('GET'):
            stack.append(memo[argument])
        elif name.endswith('PUT'):
            memo[argument] = stack[-1]
        elif name == 'MEMOIZE':
            memo[len(memo)] = stack[-1]
        elif name.startswith('TUPLE'):
            items = to_mark() if name == 'TUPLE' else [stack.pop() for _ in range(int(name[-1]))]
            depth = 1 + max((item for item in items if isinstance(item, int)), default=0)
            if depth > _NESTED:
                raise ValueError(f'more than {_NESTED} tuples in each other')
            stack.append(depth)
        elif name in ('REDUCE', 'NEWOBJ'):
            stack.pop()
            called = stack.pop()
            if not isinstance(called, str) or not _CALLED.fullmatch(called):
                raise ValueError(f'it calls {called}')
            stack.append(0)
        else:
            before = [each.name for each in code.stack_before]
            if 'mark' in before:
                to_mark()
                before = before[:before.index('mark')]
            kept = [stack.pop() for _ in before]
            # What a container is does not change by what is put into it.
            stack.extend(kept[::-1] if len(kept) == len(code.stack_after) else [0] * len(code.stack_after))
