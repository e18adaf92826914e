"""Every method on problems with known truth: baselines, oracles, gains with intervals, sweeps, frontiers, calibration."""
