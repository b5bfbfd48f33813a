#!/usr/bin/env bash
# The images of the cases in this directory, as files for `docker import` and `podman import`; no image registry is contacted.
#
#   tests/docker/images.sh DIRECTORY
#
#   base.tar    busybox alone
#   nginx.tar   busybox, and the host's nginx with a page
#   node.tar    busybox, and the host's node with a Vite project, which npm installs here
set -euo pipefail
out=$(readlink -f "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# with_libraries ROOT PROGRAM...: copies the libraries of these programs to the same paths below ROOT.
with_libraries() {
    local root=$1 library
    shift
    for library in $(ldd "$@" | grep -oE '/[^ ):]+\.so[^ ):]*' | sort -u); do
        [[ -e $root/$library ]] || install -D "$(readlink -f "$library")" "$root/$library"
    done
}

base() { # ROOT
    mkdir -p "$1"/{bin,tmp,etc,root}
    cp "$(command -v busybox)" "$1/bin/busybox"
    local applet
    for applet in sh cat cp echo grep ls mkdir rm sed sha256sum sleep touch; do ln -s busybox "$1/bin/$applet"; done
    echo 'root:x:0:0:root:/root:/bin/sh' >"$1/etc/passwd"
    echo 'root:x:0:' >"$1/etc/group"
}

nginx_image() {
    local root=$work/nginx nginx
    nginx=$(command -v nginx)
    base "$root"
    install -D "$nginx" "$root/bin/nginx"
    with_libraries "$root" "$nginx"
    mkdir -p "$root"/{www,logs,temp}
    echo "from nginx" >"$root/www/index.html"
    cat >"$root/etc/nginx.conf" <<'END'
daemon off; user root; worker_processes 1; pid /temp/pid; error_log /logs/error;
events {}
http {
    access_log off; client_body_temp_path /temp/a; proxy_temp_path /temp/b; fastcgi_temp_path /temp/c;
    uwsgi_temp_path /temp/d; scgi_temp_path /temp/e;
    server { listen 8080; listen [::]:8080; root /www; }
}
END
    tar -C "$root" -c . >"$out/nginx.tar"
}

# The dev server's project: one module that accepts its own updates, and shows its text on the page.
node_image() {
    local root=$work/node app=$work/node/app node version=8
    # The newest Vite needs a newer node; the version of npm shows it.
    if [[ $(npm --version) == [0-9].* || $(npm --version) == 10.* ]]; then version=7; fi
    node=$(command -v node)
    base "$root"
    mkdir -p "$app/src"
    echo '{ "private": true, "type": "module" }' >"$app/package.json"
    cat >"$app/index.html" <<'END'
<!doctype html><title>landfall</title><body><script type="module" src="/src/main.js"></script></body>
END
    cat >"$app/src/main.js" <<'END'
import { text } from './hot.js';
const show = (what) => { document.body.dataset.shown = what; };
show(text);
import.meta.hot.accept('./hot.js', (changed) => show(changed.text));
END
    echo "export const text = 'first';" >"$app/src/hot.js"
    (cd "$app" && npm install "vite@$version" --cache "$work/npm-cache" --no-audit --no-fund --loglevel=error >&2)
    install -D "$(readlink -f "$node")" "$root/bin/node"
    mapfile -t natives < <(find "$app/node_modules" -name '*.node')
    with_libraries "$root" "$node" "${natives[@]}"
    tar -C "$root" -c . >"$out/node.tar"
}

mkdir -p "$out"
base "$work/base"
tar -C "$work/base" -c . >"$out/base.tar"
nginx_image
node_image
