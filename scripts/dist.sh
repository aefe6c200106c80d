#!/usr/bin/env bash
# Make dist/: the wheel, the source archive, and what the wheel runs with as a CycloneDX bill of materials. Two runs on
# one commit by one version of Python give the same bytes. The programs come from requirements/release.txt, on the PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

rm -rf dist
python -m build --no-isolation --outdir dist . >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }

# What is listed is what an installation from the lock has: its licences and who needs whom stand in the packages.
python -m venv --without-pip "$work/venv"
python -m pip --python "$work/venv/bin/python" install --quiet --disable-pip-version-check --require-hashes \
  --requirement requirements/run.txt
for wheel in dist/*.whl; do
  name=${wheel%-py3-none-any.whl}
  # It is checked against CycloneDX's own schema before it is written.
  cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible --validate \
    --output-format JSON --output-file "$name.cdx.json" "$work/venv/bin/python"
done
(cd dist && sha256sum -- *)
