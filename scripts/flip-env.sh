#!/usr/bin/env bash
# Makes the environment in which FLIP's own code runs for the tests: flip-utils with its recipes, PyTorch, NVFLARE and what
# this package depends on, as pyproject.toml names them (the extra "flip"). This package itself is not in it: the tests
# install the one they judge. Says what it did; where it cannot, it says why in one sentence and fails.
#
# The cache is ${XDG_CACHE_HOME:-~/.cache}/flip-observability/flip-<hash of the requirements>: about 4.3 GB, because PyPI's
# PyTorch for Linux links to CUDA's libraries even where it computes on the CPU. Remove the folder to make it again.
#
#   scripts/flip-env.sh           make it, unless it is there
#   scripts/flip-env.sh --python  print the path of its Python, and fail when it is not there
set -u

ROOT="$(cd "$(dirname "$0")/.." && pwd)"
HOME_OF_CACHES="${XDG_CACHE_HOME:-$HOME/.cache}/flip-observability"

fail() {
  printf 'flip-env: %s\n' "$1" >&2
  exit 1
}

usable() { # an interpreter that runs, is new enough for flip-utils and not too new for this package
  "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() { # pyenv's shims answer only for a chosen version, so its folders are looked at, too
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23]*/bin/python3; do
    usable "$candidate" && printf '%s' "$candidate" && return
  done
  return 1
}

BASE="$(find_python)" || fail "flip-utils needs Python 3.12 or 3.13 with venv, and none was found: set PYTHON=/path/to/python3.12"
REQUIREMENTS="$("$BASE" - "$ROOT/pyproject.toml" <<'PYTHON'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    content = tomllib.load(file)
project = content["project"]
# The build's own requirements: the tests install this package from its source without asking an index.
print("\n".join(project["dependencies"] + project["optional-dependencies"]["flip"] + content["build-system"]["requires"]))
PYTHON
)" || fail "$ROOT/pyproject.toml has no extra \"flip\" that could be read"
KEY="$(printf '%s\n%s' "$("$BASE" -V)" "$REQUIREMENTS" | sha256sum | cut -c 1-12)"
CACHE="$HOME_OF_CACHES/flip-$KEY"
READY="$CACHE/.ready"

if [ "${1:-}" = --python ]; then
  [ -f "$READY" ] || fail "not there yet: make it with scripts/flip-env.sh (about 4.3 GB)"
  printf '%s\n' "$CACHE/bin/python"
  exit 0
fi

mkdir -p "$HOME_OF_CACHES" && exec 9>"$HOME_OF_CACHES/flip-env.lock" || fail "cannot write to $HOME_OF_CACHES"
flock 9 || fail "cannot lock $HOME_OF_CACHES/flip-env.lock"
if [ -f "$READY" ]; then
  printf 'flip-env: in %s\n' "$CACHE"
  exit 0
fi
rm -rf "$CACHE" # what an interrupted one left
LOG="$HOME_OF_CACHES/flip-env.log"
pip() {
  "$CACHE/bin/python" -m pip --quiet --disable-pip-version-check --no-cache-dir "$@" >>"$LOG" 2>&1 \
    || fail "pip could not install flip-utils and what it needs ($(tail -n 1 "$LOG"); all of it in $LOG)"
}
"$BASE" -m venv "$CACHE" >"$LOG" 2>&1 || fail "no environment could be made with $BASE ($(tail -n 1 "$LOG"))"
pip install --requirement <(printf '%s\n' "$REQUIREMENTS")
pip uninstall --yes triton # 0.7 GB that only a GPU's compiler needs
"$CACHE/bin/python" -c 'import torch; import flip.nvflare.recipes' >>"$LOG" 2>&1 \
  || fail "flip-utils and PyTorch were installed but cannot be imported ($(tail -n 1 "$LOG"))"
date >"$READY"
printf 'flip-env: made %s (%s)\n' "$CACHE" "$(du -sh "$CACHE" | cut -f 1)"
for other in "$HOME_OF_CACHES"/flip-*/; do
  [ "$other" = "$CACHE/" ] || printf 'flip-env: of an older state, no longer needed here: %s\n' "$other"
done
