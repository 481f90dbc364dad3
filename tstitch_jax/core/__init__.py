"""The sampler itself: schedules, plans, denoisers, solvers and the loop. JAX and NumPy alone."""
