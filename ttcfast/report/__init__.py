"""Tables and figures of an evaluation, and the runs that make them: the demo and ``run_ttc``."""

from ttcfast.runtime.drawing import import_matplotlib

import_matplotlib()  # before any module of the package asks for it
