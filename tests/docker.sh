#!/usr/bin/env bash
# Tests with a real Docker engine: probes, restarts, builds, events. Uses a running engine; without one, starts its own in a
# temporary directory and ends it afterwards. If it cannot start one, prints the reason and succeeds.
# As root it also runs the end-to-end cases (tests/docker/), from servers in containers to a browser on the host, each with
# its own engine.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
export PATH=$PATH:/usr/sbin:/sbin

work=$(mktemp -d)
# Cases that run as another user reach the socket in it.
chmod 755 "$work"
engine=""
images=""
finish() {
    if [[ -n $images ]]; then
        kill "$images" 2>/dev/null || true
        wait "$images" 2>/dev/null || true
    fi
    if [[ -n $engine ]]; then
        kill "$engine" 2>/dev/null || true
        wait "$engine" 2>/dev/null || true
        # The engine leaves a mount of the host's network namespace.
        umount "$work/exec/netns/default" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap finish EXIT

for program in docker dockerd busybox; do
    command -v "$program" >/dev/null || { echo "tests/docker.sh: $program is missing (apt-get install docker.io busybox-static)" >&2; exit 1; }
done

# In the background: the dev server in one of the images comes from npm.
if ((EUID == 0)); then
    tests/docker/images.sh "$work/images" >"$work/images.log" 2>&1 &
    images=$!
fi

export DOCKER_HOST=${DOCKER_HOST:-unix:///var/run/docker.sock}
if ! docker version >/dev/null 2>&1; then
    if ((EUID != 0)); then
        echo "   skipped: no Docker engine answers, and starting one needs root"
        exit 0
    fi
    export DOCKER_HOST=unix://$work/docker.sock
    dockerd --data-root "$work/data" --exec-root "$work/exec" -H "$DOCKER_HOST" --pidfile "$work/docker.pid" >"$work/log" 2>&1 &
    engine=$!
    for _ in $(seq 300); do
        docker version >/dev/null 2>&1 && break
        kill -0 "$engine" 2>/dev/null || break
        sleep 0.1
    done
    if ! docker version >/dev/null 2>&1; then
        echo "   skipped: no Docker engine answers, and none could be started here:"
        tail -n 3 "$work/log" | sed 's/^/   /'
        exit 0
    fi
fi

# An image with busybox only; no registry is contacted.
mkdir -p "$work/root/bin" "$work/root/tmp"
cp "$(command -v busybox)" "$work/root/bin/busybox"
for applet in sh sleep touch cat echo find sort hostname test true false; do ln -s busybox "$work/root/bin/$applet"; done
tar -C "$work/root" -c . | docker import - landfall-test-base >/dev/null

# The same with the agent as a static binary, which runs in any image. Only the final link differs; the libraries are those of
# every other build.
cargo rustc --quiet -p landfall --all-features --bin landfall -- -C target-feature=+crt-static
mkdir -p "$work/root/www" "$work/root/run/landfall"
echo "from inside" >"$work/root/www/index.html"
cp "${CARGO_TARGET_DIR:-target}/debug/landfall" "$work/root/landfall"
strip "$work/root/landfall" 2>/dev/null || true
tar -C "$work/root" -c . | docker import - landfall-test-agent >/dev/null
export LANDFALL_TEST_STATIC=$work/root/landfall

# Container names of the suite start with lf-; other containers are not changed.
# With the features of the whole workspace, so that nothing is built twice.
packages=(-p landfall)
if ((EUID == 0)); then
    packages=(--workspace --exclude landfall-fuzz)
    wait "$images" || { images=""; echo "tests/docker.sh: the images could not be made:" >&2; tail -n 20 "$work/images.log" >&2; exit 1; }
    images=""
    export LANDFALL_IMAGES=$work/images
else
    echo "   skipped: end-to-end cases with their own engine need root"
fi
cargo test --quiet "${packages[@]}" --all-features --test docker -- --ignored --test-threads=2
