"""The commands: their settings, and the modules that run and print them, imported only when they are called."""
from timm_multilabel.config import commands
from timm_multilabel.config.settings import Settings
from timm_multilabel.config.train import TrainSettings

COMMANDS: dict[str, type[Settings]] = {
    'probe': commands.ProbeSettings,
    'train': TrainSettings,
    'validate': commands.ValidateSettings,
    'predict': commands.PredictSettings,
    'embed': commands.EmbedSettings,
    'search': commands.SearchSettings,
    'export': commands.ExportSettings,
    'report': commands.ReportSettings,
    'compare': commands.CompareSettings,
    'grid': commands.GridSettings,
    'sample': commands.SampleSettings,
    'split': commands.SplitSettings,
    'convert': commands.ConvertSettings,
    'check': commands.CheckSettings,
}
"""By name, in the order of the help. `timm_multilabel.cli.NAME` has `run(settings)`."""

LINES_BESIDE_DATA = ('predict', 'embed', 'search', 'compare', 'grid')
"""Commands whose standard output is for data; what they tell while they work goes to standard error."""

SHARED = ('probe', 'train', 'validate', 'predict', 'embed', 'check')
"""Commands that several processes, started by torchrun, share the work of."""
