"""`python -m timm_multilabel` is `timm-multilabel`."""
from timm_multilabel.cli.main import main

if __name__ == '__main__':
    main()
