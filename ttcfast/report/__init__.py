"""Tables and figures of an evaluation, and the runs that make them: the demo and ``run_ttc``."""
