"""`python -m syncbn.trainer.report RUN ...`."""

import sys

from syncbn.trainer.report.page import main

sys.exit(main())
