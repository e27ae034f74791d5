"""What models cost: `profile` counts, `benchmark` measures."""

from zoo.profiling.language import LanguageProfile
from zoo.profiling.measure import BenchmarkResult, benchmark, benchmark_table
from zoo.profiling.report import ModuleCost, OperatorCost, Profile, profile

__all__ = [
    "BenchmarkResult",
    "LanguageProfile",
    "ModuleCost",
    "OperatorCost",
    "Profile",
    "benchmark",
    "benchmark_table",
    "profile",
]
