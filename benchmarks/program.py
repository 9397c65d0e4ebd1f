"""What the benchmarks share as programs: types of flags, and how they are run."""
from collections.abc import Sequence
from types import ModuleType

from timm_multilabel.cli.main import guarded
from timm_multilabel.cli.output import printed_streams
from timm_multilabel.cli.parser import Parser, argument_type
from timm_multilabel.config import values

positive, count, above_0 = map(argument_type, (values.positive, values.count, values.above_0))


def run_benchmark(module: ModuleType, argv: Sequence[str]) -> None:
    """Run a module with `add_flags(parser)` and `run(args)`; bad input ends it with one line and exit status 2."""
    prog = f'benchmarks.{(module.__spec__.name if module.__spec__ else module.__name__).rpartition(".")[2]}'
    parser = Parser(prog=prog, description=(module.__doc__ or '').split('\n')[0])
    module.add_flags(parser)
    with printed_streams():
        args = parser.parse_args(list(argv))
        with guarded(prog):
            module.run(args)
