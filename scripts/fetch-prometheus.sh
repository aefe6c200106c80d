#!/usr/bin/env bash
# Makes prometheus, promtool, alertmanager and amtool available to the tests: from Debian's or Ubuntu's packages, unpacked
# into a cache of the user. Nothing is installed and no daemon is started; the machine's own package lists stay as they
# are. Says what it did. Where it cannot, it says why and succeeds: the tests that need the programs then skip.
#
# The cache is ${XDG_CACHE_HOME:-~/.cache}/flip-observability/prometheus; remove that folder to fetch again.
set -u

CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/flip-observability/prometheus"
PACKAGES=(prometheus prometheus-alertmanager)

give_up() {
  printf 'prometheus-tools: %s; the tests with a real Prometheus will skip\n' "$1"
  exit 0
}

all_in() { # folders as in PATH, names that Alertmanager may have
  local PATH="$1" program
  shift
  for program in prometheus promtool amtool; do
    type -P "$program" >/dev/null || return 1
  done
  for program; do
    type -P "$program" >/dev/null && return
  done
  return 1
}

# Debian's Alertmanager reads its templates from a folder whose path is compiled in, and that only an installed package has.
# In the copy that path is the process' ninth open file, which is just as long; the program `alertmanager` opens the unpacked
# folder as that and becomes the copy. It works for every user, in every container.
make_movable() { # folder that the packages were unpacked into
  local compiled_in=/usr/share/prometheus/alertmanager opened=/proc/self/fd/9
  while ((${#opened} < ${#compiled_in})); do opened+=/; done
  LC_ALL=C sed -i "s#$compiled_in#$opened#g" "$1/usr/bin/prometheus-alertmanager"
  cat >"$1/usr/bin/alertmanager" <<'END'
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
exec 9<"$here/../share/prometheus/alertmanager" || exit 1
exec "$here/prometheus-alertmanager" "$@"
END
  chmod +x "$1/usr/bin/alertmanager"
}

# Debian calls it by the longer name, its makers by the shorter.
if all_in "$PATH" alertmanager prometheus-alertmanager; then
  printf 'prometheus-tools: on the PATH (%s)\n' "$(type -P prometheus)"
  exit 0
fi
if all_in "$CACHE/usr/bin" alertmanager; then
  printf 'prometheus-tools: in %s\n' "$CACHE"
  exit 0
fi
for tool in apt-get dpkg-deb; do
  type -P "$tool" >/dev/null || give_up "not found, and this is no Debian or Ubuntu (no $tool) to fetch them with"
done
mkdir -p "$(dirname "$CACHE")" && STAGE="$(mktemp -d "$CACHE.XXXXXX")" || give_up "cannot write to $(dirname "$CACHE")"
trap 'rm -rf "$STAGE"' EXIT

fetch() { # options of apt-get
  (cd "$STAGE/debs" && timeout 300 apt-get -qq -o APT::Sandbox::User=root "$@" download "${PACKAGES[@]}") >"$STAGE/log" 2>&1
}

mkdir -p "$STAGE/debs" "$STAGE/root" "$STAGE/lists/partial" "$STAGE/apt/archives/partial"
if ! fetch; then
  # No package lists on this machine, or old ones: lists of our own, which need no root and change nothing.
  OWN=(-o "Dir::State::Lists=$STAGE/lists" -o "Dir::Cache=$STAGE/apt" -o APT::Sandbox::User=root)
  timeout 300 apt-get -qq "${OWN[@]}" update >"$STAGE/log" 2>&1 && fetch "${OWN[@]}" \
    || give_up "could not be fetched ($(tail -n 1 "$STAGE/log"))"
fi
for package in "$STAGE"/debs/*.deb; do
  dpkg-deb -x "$package" "$STAGE/root" || give_up "$(basename "$package") could not be unpacked"
done
all_in "$STAGE/root/usr/bin" prometheus-alertmanager || give_up "the packages ${PACKAGES[*]} hold other programs than expected"
"$STAGE/root/usr/bin/promtool" --version >/dev/null 2>&1 || give_up "the packages' programs do not run on this machine"
make_movable "$STAGE/root" || give_up "Alertmanager could not be made to run from $CACHE"
rm -rf "$CACHE" && mv -T "$STAGE/root" "$CACHE" || give_up "$CACHE could not be written"
printf 'prometheus-tools: unpacked %s into %s (nothing was installed)\n' \
  "$(cd "$STAGE/debs" && printf '%s ' *.deb | sed 's/ $//')" "$CACHE"
