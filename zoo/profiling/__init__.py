"""What models cost: `profile` counts, `benchmark` measures."""

from zoo.profiling.language import LanguageProfile
from zoo.profiling.language_speed import LanguageBenchmarkResult
from zoo.profiling.measure import BenchmarkResult, benchmark, benchmark_table
from zoo.profiling.report import ModuleCost, OperatorCost, Profile, profile

__all__ = [
    "BenchmarkResult",
    "LanguageBenchmarkResult",
    "LanguageProfile",
    "ModuleCost",
    "OperatorCost",
    "Profile",
    "benchmark",
    "benchmark_table",
    "profile",
]
