#!/usr/bin/env bash
# Build the collector of manifest.yaml with the OpenTelemetry Collector Builder, once for each manifest, outside the
# repository. The last line of standard output is the path of the binary; everything else goes to standard error.
#
#   collector/build.sh               build it, unless it is there
#   collector/build.sh --path        only say where it is, or would be
#   collector/build.sh --if-possible the same as the first, but what prevents it is only said: exit 0
#
# FLIP_COLLECTOR_CACHE  folder that collectors are built in; ${XDG_CACHE_HOME:-~/.cache}/flip-observability if not set
# GO                    the go command; the one on the PATH, else /usr/local/go/bin/go, if not set
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
manifest=$here/manifest.yaml
version=$(awk '$1 == "version:" { print $2; exit }' "$manifest")
cache=${FLIP_COLLECTOR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/flip-observability}
folder=$cache/collector-$(sha256sum <"$manifest" | cut -c1-16)
binary=$folder/flip-otelcol

say() { echo "collector: $*" >&2; }

build() {
  local go=${GO:-$(command -v go || echo /usr/local/go/bin/go)}
  [[ -x $go ]] || { say "not built: there is no Go here"; return 1; }
  mkdir -p "$cache"
  exec 9>"$folder.lock"
  flock 9 # two builds at once: the second one finds what the first one made
  [[ -x $binary ]] && return
  work=$(mktemp -d "$cache/build-XXXXXX")
  trap 'rm -rf "$work"' EXIT
  # The builder starts `go` by its name. A module may want a newer Go, which Go then fetches as a module.
  export PATH="$(dirname "$go"):$PATH" GOTOOLCHAIN=${GOTOOLCHAIN:-auto} CGO_ENABLED=0
  say "building version $version; the first time this takes some minutes and needs the network"
  GOBIN=$work/bin nice "$go" install "go.opentelemetry.io/collector/cmd/builder@v$version" >&2 || return 1
  (cd "$work" && exec nice bin/builder --config="$manifest" >&2) || return 1
  mkdir -p "$folder" && mv "$work/dist/flip-otelcol" "$binary" || return 1
  say "built $binary"
}

case ${1:-} in
  --path) ;;
  --if-possible) [[ -x $binary ]] || build || { say "the tests that need it will be skipped"; exit 0; } ;;
  *) [[ -x $binary ]] || build || { say "could not be built"; exit 1; } ;;
esac
echo "$binary"
