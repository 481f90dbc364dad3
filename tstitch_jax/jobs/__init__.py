"""Long work: many images, sweeps, calibration, export."""
