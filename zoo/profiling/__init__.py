"""What models cost: `profile` and `stitch_costs` count, `benchmark` measures."""

from zoo.profiling.language import LanguageProfile
from zoo.profiling.language_speed import LanguageBenchmarkResult
from zoo.profiling.measure import BenchmarkResult, benchmark, benchmark_table
from zoo.profiling.report import ModuleCost, OperatorCost, Profile, profile
from zoo.profiling.stitches import StitchCost, StitchCosts, stitch_costs

__all__ = [
    "BenchmarkResult",
    "LanguageBenchmarkResult",
    "LanguageProfile",
    "ModuleCost",
    "OperatorCost",
    "Profile",
    "StitchCost",
    "StitchCosts",
    "benchmark",
    "benchmark_table",
    "profile",
    "stitch_costs",
]
