"""What is measured, in this order, and how long it may take: 470 s in all."""

from benchmarks.gpu import engine_steps, grid, kernels, limits, tier_steps
from benchmarks.gpu.bench import Part

# Most of the grid's time is compiling, which needs no device: as many processes as that keep busy.
GRID_WORKERS = 8

PARTS = (
    Part("limits", 60.0, limits.steps),
    Part("grid", 120.0, grid.steps, workers=GRID_WORKERS, listed=False),
    Part("kernels", 110.0, kernels.steps),
    Part("engine", 100.0, engine_steps.steps),
    Part("tiers", 80.0, tier_steps.steps),
)
