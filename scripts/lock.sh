#!/usr/bin/env bash
# Write requirements/*.txt: every package that is installed, with the hashes of its files, for Python 3.10 to 3.13. One
# file serves them all: where versions of Python differ, its lines say for which they are.
#
#   scripts/lock.sh                              after pyproject.toml has changed; the rest stays as it is
#   scripts/lock.sh --upgrade                    the newest of everything
#   scripts/lock.sh --upgrade-package urllib3    the newest of one package
#
# UV  the uv command; the one on the PATH if not set
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

lock() { # NAME WHAT ARGUMENT...: the file's name, what it is for, what to resolve
  local name=$1 what=$2 file=requirements/$1.txt
  shift 2
  [[ ! -f $file ]] || cp "$file" "$work"
  # Without a header and annotations: those name the resolver's arguments and where it found things.
  "${UV:-uv}" pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-header --no-annotate \
    --no-emit-index-url --output-file "$work/$name.txt" "$@" >/dev/null
  { echo "# $what. \`make lock\` writes it from pyproject.toml."; grep -v '^#' "$work/$name.txt"; } >"$file"
}

# The largest first: what is tested is what the images hold.
lock dev "What the tests and linters need" pyproject.toml --extra dev "$@"
same=(--constraint requirements/dev.txt "$@")
lock run "What the package needs: the images of the exporter and of the FL server" pyproject.toml "${same[@]}"
lock demo "The same with what the demo needs: its image" pyproject.toml --extra demo "${same[@]}"
lock build "What builds the package" --group build "${same[@]}"
lock fuzz "What \`make fuzz\` needs beside dev.txt" --group fuzz "${same[@]}"
lock release "What \`make lock\`, \`make audit\` and \`make dist\` run" --group release "${same[@]}"
