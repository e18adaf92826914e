"""The names of the commands, each a module of this package."""

COMMANDS = (
    *("demo", "generate", "train_fm", "build_prm_data", "train_prm", "train_prm_on_policy", "fit_directions", "run_ttc", "ceiling"),
    *("collect", "train_wm", "train_policy", "protocol", "report", "bench", "info"),
)
