"""The servers of the works. Each function returns a command line, and writes the configuration that it names."""

import os

IPERF, HTTP, ECHO, VERIFY, VITE = 5201, 8080, 7007, 7008, 5173

FILE_BYTES = 1024 * 1024

NGINX = """\
daemon off;
master_process off;
worker_processes 1;
worker_rlimit_nofile 8192;
pid {directory}/nginx.pid;
error_log {directory}/nginx.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    sendfile on;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = / {{ return 200 "landfall\\n"; }}
        location /files/ {{ alias {directory}/; }}
    }}
}}
"""


def iperf3(_directory, _options):
    return ["iperf3", "-s", "-B", "127.0.0.1", "-p", IPERF]


def nginx(directory, _options):
    configuration = directory / "nginx.conf"
    configuration.write_text(NGINX.format(directory=directory, port=HTTP))
    file = directory / "1m"
    if not file.exists():
        file.write_bytes(os.urandom(FILE_BYTES))
    return ["nginx", "-c", configuration, "-e", directory / "nginx.log"]


def echo(_directory, options):
    return [options.programs / "echo", ECHO]


def verify(_directory, options):
    return [options.programs / "verify", "--serve", VERIFY]


def vite(_directory, options):
    script = options.vite / "node_modules/vite/bin/vite.js"
    # The native loader writes no file beside the configuration.
    where = ["--host", "127.0.0.1", "--port", VITE, "--strictPort"]
    return ["node", script, options.vite, "--configLoader", "native", *where]
