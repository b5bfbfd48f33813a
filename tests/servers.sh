#!/usr/bin/env bash
# Real servers under the real binary: python, node, nginx, Vite, iperf3, and wrk as a client.
#
#   tests/servers.sh              under four minutes
#   LANDFALL_LONG=1 tests/servers.sh   with a gibibyte each way, and a browser
#   LANDFALL=path/to/landfall     the binary; else target/release/landfall, else target/debug/landfall
#   LANDFALL_KEEP=1               keeps the directory with all logs
#
# Each check prints `ok NAME` or `FAILED NAME: reason`. Checks that need root print a line and are skipped without it.
# The script ends every process that it starts, by process id, and uses free ports.
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/.." || exit 1
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C
# Requests to localhost bypass the proxy for the Internet.
export no_proxy=localhost,127.0.0.1,::1 NO_PROXY=localhost,127.0.0.1,::1
unset NODE_USE_ENV_PROXY

passed=0 failed=0
declare -A pid=() code=()
long=${LANDFALL_LONG:-}
mib=256
if [[ -n $long ]]; then mib=1024; fi

# ---------------------------------------------------------------- helpers

die() { echo "servers.sh: $*" >&2; exit 1; }

# fail WHY: sets the reason that `check` prints, and fails.
fail() { why="$*"; return 1; }

# check NAME COMMAND...: one named check. If the command fails without a reason, the reason is its name.
# Callers skip the checks that depend on a failed one.
check() {
    local name=$1 started=$SECONDS
    shift
    why="'$*' failed"
    if "$@"; then
        passed=$((passed + 1))
        echo "ok $name$( ((SECONDS - started > 4)) && echo " ($((SECONDS - started)) s)")"
    else
        failed=$((failed + 1))
        echo "FAILED $name: $why"
        return 1
    fi
}

# until_true SECONDS COMMAND...: waits until the command succeeds, with a time limit.
until_true() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS <= deadline)) || return 1
        sleep 0.02
    done
}

# start TAG WHO DIRECTORY COMMAND...: WHO is `me` or `nobody`. The outputs go to TAG.out and TAG.err. A shell starts
# background processes with SIGINT ignored; `env` restores the default, as on a terminal.
start() {
    local tag=$1 who=$2 directory=$3
    shift 3
    local as=(env --default-signal=INT,QUIT)
    : >"$tmp/log/$tag.out" 2>"$tmp/log/$tag.err"
    if [[ $who == nobody ]]; then
        # The variable comes last, because env accepts no option after one.
        as=(setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all "${as[@]}" HOME="$tmp/nobody")
    fi
    (cd "$directory" && exec "${as[@]}" "$@") \
        </dev/null >"$tmp/log/$tag.out" 2>"$tmp/log/$tag.err" &
    pid[$tag]=$!
}

runs() { kill -0 "${pid[$1]}" 2>/dev/null; }
gone() { ! runs "$1"; }
no_process() { [[ ! -e /proc/$1 ]]; }

# prints TAG STREAM PATTERN: waits for a line of that process, or for its end.
prints() {
    until_true 20 printed_or_gone "$@"
    grep -qE -- "$3" "$tmp/log/$1.$2" \
        || fail "$1 did not print /$3/; end of its output: $(cat "$tmp/log/$1.out" "$tmp/log/$1.err" | tail -n 3 | tr '\n' '|')"
}
printed_or_gone() { grep -qE -- "$3" "$tmp/log/$1.$2" || gone "$1"; }
word() { sed -nE "s/$3/\\1/p" "$tmp/log/$1.$2" | head -n 1; }

# remains TAG: prints its processes, the kernel functions in which they wait, and the end of its output.
remains() {
    local process
    for process in "${pid[$1]}" $(descendants "${pid[$1]}"); do
        echo "$process ($(tr '\0' ' ' <"/proc/$process/cmdline")) in $(cat "/proc/$process/wchan" 2>/dev/null);"
    done
    tail -n 5 "$tmp/log/$1.out" "$tmp/log/$1.err"
}

# end TAG SIGNAL: sends the signal, waits, and stores the exit code in code[TAG].
end() {
    if runs "$1"; then kill -s "$2" "${pid[$1]}"; fi
    # The shell prints a message when it reaps a killed child; discard it.
    { until_true 20 gone "$1"; } 2>/dev/null || { fail "$1 does not end at SIG$2: $(remains "$1")"; return; }
    wait "${pid[$1]}" 2>/dev/null
    code[$1]=$?
}

cleanup() {
    local left
    left=$(jobs -rp)
    # Process ids of our own children, which the shell has not reaped.
    # shellcheck disable=SC2086
    if [[ -n $left ]]; then kill -TERM $left 2>/dev/null; fi
    no_jobs() { [[ -z $(jobs -rp) ]]; }
    # shellcheck disable=SC2046
    until_true 5 no_jobs || kill -KILL $(jobs -rp) 2>/dev/null
    wait
    if [[ -n ${netns:-} ]]; then ip netns del "$netns" 2>/dev/null; fi
    if [[ -n ${LANDFALL_KEEP:-} ]]; then echo "kept: $tmp"; else rm -rf "$tmp"; fi
}

install_packages() {
    local missing=() pair
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    ((${#missing[@]})) || return 0
    ((EUID == 0)) || die "these packages are missing, and only root can install them: ${missing[*]}"
    echo "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$tmp/log/apt.out" 2>&1 \
        || die "cannot install ${missing[*]}: $(tail -n 2 "$tmp/log/apt.out")"
}

fetch() { curl -sS --max-time 120 "$@"; }
sum() { sha256sum "$@" | cut -d ' ' -f 1; }
answers() { fetch -o "$tmp/log/answer" "http://127.0.0.1:$1/" 2>"$tmp/log/answer"; }
refuses() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null && ! (exec 3<>"/dev/tcp/::1/$1") 2>/dev/null; }

helper() { # SCRIPT ARGUMENT...: a node script; the reason of a failure is in its output
    local output
    output=$(node "$tmp/helpers/$1" "${@:2}" 2>&1) || fail "$(grep -m 1 -E '^([A-Za-z]*Error|nothing|no )' <<<"$output" || tail -n 1 <<<"$output")"
}

# sandbox TAG WHO DIRECTORY PORT [OPTION...] -- COMMAND...: starts a server under `landfall run`, and waits for its forward.
sandbox() {
    local tag=$1 who=$2 directory=$3 port=$4
    shift 4
    start "$tag" "$who" "$directory" "$landfall" run --net none --name "$tag" "$@"
    prints "$tag" err "^forward +http://localhost:$port "
}

# ---------------------------------------------------------------- python

python_server() { # TAG WHO PORT [ADDRESS]
    sandbox "$1" "$2" "$tmp/site" "$3" -- "$python" -u -m http.server "$3" ${4:+--bind "$4"}
}

# The server answers on every address of the host's loopback.
gets_page() { # PORT
    local host text
    for host in 127.0.0.1 '[::1]' localhost; do
        text=$(fetch "http://$host:$1/page.html") || { fail "no answer on $host"; return; }
        [[ $text == "<p>a page</p>" ]] || { fail "$host: '$text'"; return; }
    done
}

gets_listing() {
    local text
    text=$(fetch "http://localhost:$1/") || { fail "no answer"; return; }
    grep -q 'href="page.html"' <<<"$text" || fail "page.html is not in the listing"
}

gets_404() {
    local status
    status=$(fetch -o /dev/null -w '%{http_code}' "http://localhost:$1/none")
    [[ $status == 404 ]] || fail "the status is $status"
}

# ---------------------------------------------------------------- node

node_server() { sandbox "$1" "$2" "$tmp/site" "$3" "${@:4}" -- node "$tmp/helpers/node-server.mjs" "$3"; }

node_client() { helper node-client.mjs "$@"; }

# ---------------------------------------------------------------- nginx

nginx_prefix() { # DIRECTORY PORT USER: a configuration that uses only its own directory
    mkdir -p "$1"/{logs,temp,up}
    ln -s "$tmp/big" "$1/big"
    ln -s "$tmp/small" "$1/small"
    cp "$tmp/site/page.html" "$1/page"
    cat >"$1/nginx.conf" <<END
daemon off;
worker_processes 2;
pid $1/logs/nginx.pid;
error_log stderr warn;
$3
events { worker_connections 2048; }
http {
    access_log off;
    sendfile on;
    tcp_nopush on;
    default_type application/octet-stream;
    client_max_body_size 0;
    client_body_temp_path $1/temp/body;
    proxy_temp_path $1/temp/proxy;
    fastcgi_temp_path $1/temp/fastcgi;
    uwsgi_temp_path $1/temp/uwsgi;
    scgi_temp_path $1/temp/scgi;
    server {
        listen 127.0.0.1:$2 backlog=1024;
        root $1;
        location / { add_header x-worker \$pid; }
        location /up/ { dav_methods PUT; }
    }
}
END
}

nginx_server() { # TAG WHO PORT [OPTION...]
    local prefix=$tmp/$1 user="user www-data;"
    if [[ $2 == nobody || $EUID != 0 ]]; then user=""; fi
    nginx_prefix "$prefix" "$3" "$user"
    if [[ $2 == nobody ]]; then chown -R 65534:65534 "$prefix"; elif [[ -n $user ]]; then chown www-data "$prefix/up"; fi
    sandbox "$1" "$2" "$prefix" "$3" "${@:4}" -- nginx -e stderr -p "$prefix" -c nginx.conf
}

hash_down() { # PORT
    local got
    got=$(fetch "http://localhost:$1/big" | sum) || { fail "the download was interrupted"; return; }
    [[ $got == "$big_hash" ]] || fail "SHA-256 is $got, not $big_hash"
}

hash_up() { # PORT TAG
    local status got
    status=$(fetch -T "$tmp/big" -o /dev/null -w '%{http_code}' "http://localhost:$1/up/big") || { fail "the upload was interrupted"; return; }
    [[ $status == 201 || $status == 204 ]] || { fail "the status is $status"; return; }
    got=$(sum "$tmp/$2/up/big")
    rm -f "$tmp/$2/up/big"
    [[ $got == "$big_hash" ]] || fail "SHA-256 is $got, not $big_hash"
}

# A file of 64 MiB less one byte, from the middle of the big one, and the last 1000 bytes.
ranges() {
    local from=1000003 bytes=67108863 got wanted
    got=$(fetch -r "$from-$((from + bytes - 1))" "http://localhost:$1/big" | sum)
    wanted=$(tail -c "+$((from + 1))" "$tmp/big" | head -c "$bytes" | sum)
    [[ $got == "$wanted" ]] || { fail "the middle differs"; return; }
    got=$(fetch -r -1000 "http://localhost:$1/big" | sum)
    [[ $got == "$(tail -c 1000 "$tmp/big" | sum)" ]] || fail "the end differs"
}

many_curls() { # PORT: 200 processes at once, half a mebibyte each
    local wrong
    wrong=$(seq 200 | xargs -P 200 -I{} sh -c \
        'test "$(curl -sS --max-time 60 "http://localhost:$1/small?{}" | sha256sum)" = "$2  -" || echo {}' \
        _ "$1" "$small_hash" 2>&1)
    [[ -z $wrong ]] || fail "$(grep -cE '^[0-9]+$' <<<"$wrong") of 200 are wrong or missing; $(grep -m 1 curl: <<<"$wrong")"
}

wrk_is_clean() { # PORT
    local output
    output=$(wrk -t 2 -c 256 -d 5s "http://127.0.0.1:$1/page") || { fail "wrk did not run"; return; }
    grep -qE 'Requests/sec: +[1-9]' <<<"$output" || { fail "no request was answered"; return; }
    if grep -E 'Socket errors|Non-2xx' <<<"$output" >"$tmp/log/wrk"; then fail "$(cat "$tmp/log/wrk")"; return; fi
    figures "wrk, 256 connections: $(sed -nE 's/^Requests\/sec: +//p' <<<"$output") requests/s"
}

# ---------------------------------------------------------------- iperf3

figures() { echo "   $*"; }

iperf() { # PORT STREAMS [-R]
    local output
    # The server reopens its listener after each test, so the next test may be refused at first.
    iperf_is_served() { output=$(iperf_once "$@"); [[ $output != *refused* && $output != *busy* ]]; }
    until_true 5 iperf_is_served "$@"
    [[ $output == *b/s ]] || { fail "${output:-iperf3 did not run}"; return; }
    figures "iperf3, $2 streams${3:+ reversed}: $output"
}

# iperf3 reports errors in its JSON and exits with 0.
iperf_once() { # PORT STREAMS [-R]
    iperf3 -c 127.0.0.1 -p "$1" -t 2 -P "$2" ${3:-} -J | iperf_rate
}

iperf_rate() {
    "$python" -c 'import json, sys
output = json.load(sys.stdin)
rate = 0 if "error" in output else output["end"]["sum_received"]["bits_per_second"]
print(f"{rate / 1e9:.1f} Gb/s" if rate else output.get("error", "no byte was received"))'
}

# ---------------------------------------------------------------- Vite

vite_project() { # writes a project into $tmp/vite and starts to install Vite there
    local version=8 src=$tmp/vite/src number
    if [[ $(npm --version 2>/dev/null) == 10.* ]]; then version=7; fi
    mkdir -p "$src/m"
    echo '{ "private": true, "type": "module" }' >"$tmp/vite/package.json"
    cat >"$tmp/vite/index.html" <<'END'
<!doctype html><title>landfall</title><body><script type="module" src="/src/main.js"></script></body>
END
    cat >"$src/main.js" <<'END'
import { text } from './hot.js';
const modules = await Promise.all(Object.values(import.meta.glob('./m/*.js')).map((load) => load()));
const show = (what) => { document.body.dataset.shown = `${what}, ${modules.length} modules`; };
show(text);
import.meta.hot.accept('./hot.js', (changed) => show(changed.text));
END
    cat >"$src/hot.js" <<'END'
export const text = 'first';
import.meta.hot.accept();
END
    for ((number = 0; number < 500; number++)); do
        echo "export default 'module-$number-';" >"$src/m/$number.js"
    done
    start vite-install me "$tmp/vite" npm install "vite@$version" --cache "$tmp/npm-cache" --no-audit --no-fund
}

vite_installed() {
    wait "${pid[vite-install]}" || fail "npm cannot install vite (is the registry reachable?): $(grep -m 3 'npm error' "$tmp/log/vite-install.err" | tr '\n' ' ')"
}

vite_server() { # TAG PORT
    start "$1" me "$tmp/vite" env npm_config_cache="$tmp/npm-cache" npm_config_update_notifier=false CI=1 \
        "$landfall" run --net none --name "$1" -- npx vite --port "$2" --strictPort
    # Vite tests the port on all addresses before it listens on the configured one, and landfall may forward such a test
    # and close it again. So wait until Vite prints that it is ready.
    prints "$1" out "ready in" || return
    until_true 10 answers "$2" || fail "Vite is ready, and port $2 does not answer"
}

vite_page() {
    local text
    text=$(fetch "http://localhost:$1/") || { fail "no page"; return; }
    grep -q '/@vite/client' <<<"$text" || { fail "the page is not Vite's: $text"; return; }
    text=$(fetch "http://localhost:$1/src/main.js") || { fail "no main.js"; return; }
    grep -q '/src/hot.js' <<<"$text" || fail "main.js is not served as a module"
}

browser_shows() { # PORT: the page in Chromium after all modules ran
    local page
    page=$(timeout -k 5 60 chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run \
        --disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage \
        --user-data-dir="$tmp/chromium" --no-proxy-server --virtual-time-budget=20000 \
        --dump-dom "http://localhost:$1/" 2>"$tmp/log/chromium.err")
    grep -q 'data-shown="[^"]*, 500 modules"' <<<"$page" \
        || fail "the page did not load its modules: ${page:0:200} $(tail -n 1 "$tmp/log/chromium.err")"
}

# ---------------------------------------------------------------- two worktrees, one port

second_reports_the_holder() { # PORT
    start feature me "$tmp/shop-feature" "$landfall" run --net none -- "$python" -u -m http.server "$1" --bind 127.0.0.1
    prints feature err "^taken +localhost:$1 is held by landfall, pid ${pid[main]} " || return
    prints feature err "^hint: another landfall forwards that port" || return
    [[ $(fetch "http://localhost:$1/branch") == main ]] || fail "the port of the first one is disturbed"
}

second_takes_over() { # PORT
    end main TERM || return
    prints feature err "^forward +http://localhost:$1 .*shop-feature:$1" || return
    [[ $(fetch "http://localhost:$1/branch") == feature ]] || fail "another server than the second answers"
}

# ---------------------------------------------------------------- the end of a run

descendants() { # PID
    local child
    for child in $(cat /proc/"$1"/task/*/children 2>/dev/null); do
        echo "$child"
        descendants "$child"
    done
}

# ends_clean TAG SIGNAL PORT [CODE]: ends it; afterwards no process of it exists, and the port refuses connections.
ends_clean() {
    local all process
    all=$(descendants "${pid[$1]}")
    [[ -n $all ]] || { fail "landfall has no child process"; return; }
    end "$1" "$2" || return
    [[ -z ${4:-} || ${code[$1]} == "$4" ]] || { fail "the exit code is ${code[$1]}, not $4"; return; }
    for process in $all; do
        until_true 10 no_process "$process" \
            || { fail "process $process is left: $(tr '\0' ' ' <"/proc/$process/cmdline")"; return; }
    done
    until_true 5 refuses "$3" || fail "port $3 still answers"
}

passes_on_sigterm() { # PORT
    node_server ending me "$1" || return
    ends_clean ending TERM "$1" 42 || return
    grep -q 'got SIGTERM' "$tmp/log/ending.out" || fail "node did not see SIGTERM"
}

passes_on_sigint() { # PORT
    python_server interrupted me "$1" 127.0.0.1 || return
    # Python ends an interrupted http.server with code 0.
    ends_clean interrupted INT "$1" 0
}

ends_on_kill() { # PORT: the command does not outlive landfall
    node_server killed me "$1" || return
    ends_clean killed KILL "$1" 137
}

# ---------------------------------------------------------------- attach

attach_netns() { # PORT
    netns="landfall-$$"
    ip netns add "$netns" && ip -n "$netns" link set lo up || { fail "cannot make a namespace"; return; }
    start in-netns me "$tmp/site" ip netns exec "$netns" "$python" -u -m http.server "$1" --bind 127.0.0.1
    start attach-netns me "$tmp" "$landfall" attach --netns "/run/netns/$netns"
    prints attach-netns out "^forward +http://localhost:$1 .*$netns:$1" && gets_page "$1" || return
    end attach-netns INT || return
    [[ ${code[attach-netns]} == 0 ]] || { fail "the exit code is ${code[attach-netns]}"; return; }
    until_true 5 refuses "$1" || { fail "port $1 still answers"; return; }
    runs in-netns || fail "the server ended with attach"
    end in-netns TERM
}

attach_pid() { # PORT
    start unshared me "$tmp/site" unshare -n sh -c \
        'ip link set lo up && exec "$1" -u -m http.server "$2" --bind 127.0.0.1' _ "$python" "$1"
    own_namespace() { [[ $(readlink "/proc/${pid[unshared]}/ns/net") != "$(readlink /proc/self/ns/net)" ]]; }
    until_true 10 own_namespace || { fail "unshare made no namespace"; return; }
    start attach-pid me "$tmp" "$landfall" attach --pid "${pid[unshared]}" --name box
    prints attach-pid out "^forward +http://localhost:$1 .*box:$1" && gets_page "$1" || return
    end attach-pid INT || return
    [[ ${code[attach-pid]} == 0 ]] || { fail "the exit code is ${code[attach-pid]}"; return; }
    until_true 5 refuses "$1" || { fail "port $1 still answers"; return; }
    end unshared TERM
}

# ---------------------------------------------------------------- the checks

as_user() { # WHO PYTHON_PORT NODE_PORT: the servers of this user
    with_python "$1" "$2"
    with_node "$1" "$1" "$3"
}

with_python() { # WHO PORT
    local who=$1 port=$2
    check "$who.python" python_server "python-$who" "$who" "$port" || return
    check "$who.python.page" gets_page "$port"
    check "$who.python.listing" gets_listing "$port"
    check "$who.python.404" gets_404 "$port"
    check "$who.python.ends" ends_clean "python-$who" INT "$port" 0
}

with_node() { # LABEL WHO PORT [OPTION...]
    local label=$1 port=$3
    check "$label.node" node_server "node-$label" "$2" "$port" "${@:4}" || return
    check "$label.node.keepalive" node_client "$port" keepalive
    check "$label.node.stream" node_client "$port" stream
    check "$label.node.upgrade" node_client "$port" upgrade
    check "$label.node.events" node_client "$port" events
    check "$label.node.ends" ends_clean "node-$label" TERM "$port" 42
}

with_nginx() { # LABEL WHO PORT [OPTION...]
    local label=$1 tag=nginx-$1 port=$3
    check "$label.nginx" nginx_server "$tag" "$2" "$port" "${@:4}" || return
    check "$label.nginx.down_${mib}MiB" hash_down "$port"
    check "$label.nginx.up_${mib}MiB" hash_up "$port" "$tag"
    check "$label.nginx.ranges" ranges "$port"
    if [[ $label == io_uring ]]; then heavy_traffic "$port"; fi
    check "$label.nginx.ends" ends_clean "$tag" TERM "$port" 0
}

heavy_traffic() { # PORT
    check "nginx.200_curls" many_curls "$1"
    check "nginx.wrk" wrk_is_clean "$1"
}

throughput() { # PORT
    check "iperf3" sandbox iperf3 me "$tmp" "$1" -- iperf3 -s -p "$1" || return
    local streams
    for streams in 1 8; do
        check "iperf3.forward_$streams" iperf "$1" "$streams"
        check "iperf3.reverse_$streams" iperf "$1" "$streams" -R
    done
    check "iperf3.ends" ends_clean iperf3 TERM "$1"
}

vite() { # PORT
    check "vite.install" vite_installed || return
    check "vite" vite_server vite "$1" || return
    check "vite.page" vite_page "$1"
    check "vite.hmr" helper hmr.mjs "$1" "$tmp/vite/src/hot.js" /src/hot.js
    check "vite.500_modules" helper modules.mjs "$1" 500
    if command -v chromium >/dev/null; then
        check "vite.browser" browser_shows "$1"
    else
        echo "skipped vite.browser: chromium is not installed; LANDFALL_LONG=1 installs it"
    fi
    check "vite.ends" ends_clean vite TERM "$1"
}

worktrees() { # PORT
    mkdir -p "$tmp"/shop-{main,feature}
    echo main >"$tmp/shop-main/branch"
    echo feature >"$tmp/shop-feature/branch"
    start main me "$tmp/shop-main" "$landfall" run --net none -- "$python" -u -m http.server "$1" --bind 127.0.0.1
    check "worktrees.first_is_forwarded" prints main err "^forward +http://localhost:$1 .*shop-main:$1" || return
    check "worktrees.second_reports_the_holder" second_reports_the_holder "$1"
    check "worktrees.second_takes_over" second_takes_over "$1"
    check "worktrees.ends" ends_clean feature INT "$1" 0
}

main() {
    local port
    read -ra port <<<"$("$python" "$tmp/helpers/ports.py" 16)"
    vite_project
    as_user me "${port[0]}" "${port[14]}"
    if ((EUID == 0)); then as_user nobody "${port[1]}" "${port[15]}"; else echo "skipped nobody: needs root"; fi
    with_node epoll me "${port[13]}" --ring epoll
    with_nginx io_uring me "${port[2]}"
    with_nginx epoll me "${port[3]}" --ring epoll
    if ((EUID == 0)); then with_nginx nobody nobody "${port[4]}"; fi
    throughput "${port[5]}"
    worktrees "${port[6]}"
    check "end.sigterm_is_passed_on" passes_on_sigterm "${port[7]}"
    check "end.sigint_is_passed_on" passes_on_sigint "${port[8]}"
    check "end.no_process_outlives_a_killed_landfall" ends_on_kill "${port[9]}"
    if ((EUID == 0)); then
        check "attach.netns" attach_netns "${port[10]}"
        check "attach.pid" attach_pid "${port[11]}"
    else
        echo "skipped attach: needs root to make namespaces"
    fi
    vite "${port[12]}"
}

landfall=${LANDFALL:-}
for candidate in target/release/landfall target/debug/landfall; do
    if [[ -z $landfall && -x $candidate ]]; then landfall=$candidate; fi
done
[[ -n $landfall && -x $landfall ]] || die "there is no binary at '${landfall:-target/release/landfall}'; build it first: cargo build --release -p landfall"

tmp=$(mktemp -d "${TMPDIR:-/tmp}/landfall-servers.XXXXXX") || die "cannot make a temporary directory"
trap cleanup EXIT
trap 'exit 130' INT TERM HUP
mkdir -p "$tmp"/{log,site,helpers,nobody}
# Another user, who cannot read the directories of the checkout, also runs the binary and the scripts.
cp "$landfall" "$tmp/landfall" && cp tests/servers/* "$tmp/helpers/" || die "cannot copy the binary and the helpers"
landfall=$tmp/landfall
chmod -R go+rX "$tmp"
if ((EUID == 0)); then chown 65534:65534 "$tmp/nobody"; fi
ulimit -n "$(ulimit -Hn)" 2>/dev/null

install_packages curl:curl node:nodejs npm:npm python3:python3 nginx:nginx-light iperf3:iperf3 wrk:wrk ip:iproute2 \
    setpriv:util-linux ${long:+chromium:chromium}
# A Python that every user can execute; python3 on a developer's PATH may be in a home directory.
python=/usr/bin/python3
[[ -x $python ]] || python=python3

echo '<p>a page</p>' >"$tmp/site/page.html"
head -c "${mib}M" /dev/urandom >"$tmp/big"
head -c 524288 /dev/urandom >"$tmp/small"
big_hash=$(sum "$tmp/big")
small_hash=$(sum "$tmp/small")

main
echo "$passed passed, $failed failed"
((failed == 0))
