"""The ``ttcfast`` command: one thin file per subcommand, no logic."""
