"""The paper's benchmarks: questions, and what answers are worth. To score them takes neither torch nor transformers."""

from acformer.benchmarks.benchmark import Benchmark
from acformer.benchmarks.gqa import Gqa
from acformer.benchmarks.mm_vet import MMVet
from acformer.benchmarks.mmbench import MMBench
from acformer.benchmarks.mme import Mme
from acformer.benchmarks.okvqa import OkVqa
from acformer.benchmarks.pope import Pope
from acformer.benchmarks.scienceqa import ScienceQA
from acformer.benchmarks.textvqa import TextVqa
from acformer.benchmarks.vizwiz import VizWiz
from acformer.benchmarks.vqav2 import VqaV2
from acformer.registry import Registry

BENCHMARKS = Registry[Benchmark](
    "benchmark",
    "acformer.benchmarks",
    {
        one.name: one
        for one in (
            Pope(),
            Mme(),
            MMBench(),
            MMVet(),
            TextVqa(),
            Gqa(),
            VqaV2(),
            VizWiz(),
            ScienceQA(),
            OkVqa(),
        )
    },
)
"""By name, in the order of the paper's Table 1, then OKVQA. A package offers its own by an entry point."""
