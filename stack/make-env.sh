#!/usr/bin/env bash
# Write the secrets that docker-compose.yml asks for into a file that only its owner can read: random ones, each time
# others. A file that exists is left as it is.
#
#   stack/make-env.sh [FILE]     default: .env beside docker-compose.yml
set -euo pipefail

file=${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.env}
if [[ -e $file ]]; then
  echo "$file is there already" >&2
  exit 0
fi

secret() { head -c 1024 /dev/urandom | LC_ALL=C tr -dc 'a-zA-Z0-9' | head -c 32; }

umask 077
part=$(mktemp "$file.XXXXXX")
trap 'rm -f "$part"' EXIT
cat >"$part" <<END
# Secrets of the stack. Not for the repository.
STACK_GRAFANA_PASSWORD=$(secret)
STACK_HUB_KEY=$(secret)
STACK_S3_ACCESS_KEY=STACK$(secret | head -c 15 | tr a-z A-Z)
STACK_S3_SECRET_KEY=$(secret)
END
mv "$part" "$file"
echo "$file: made, with random secrets (Grafana: user admin, password STACK_GRAFANA_PASSWORD)" >&2
