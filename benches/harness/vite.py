"""A Vite app of 2,000 modules, and the preparation of its server."""

import json
import subprocess
from pathlib import Path

from .namespaces import within
from .processes import run

GROUPS, GROUP_MODULES = 40, 50
# Each group has an index that imports the others of its group; the main module imports the indices and is not counted.
MODULES = GROUPS * GROUP_MODULES

PAGE = '<!doctype html><title>landfall</title><body><script type="module" src="/src/main.js"></script></body>\n'


def install(directory):
    """Writes the app and installs Vite, unless both exist. Returns the reason where that fails."""
    script = directory / "node_modules/vite/package.json"
    write_app(directory)
    if script.exists():
        return None
    # npm 10 does not install the native parts of Vite 8.
    version = 7 if output("npm", "--version").startswith("10.") else 8
    command = ["npm", "install", f"vite@{version}", "--no-audit", "--no-fund", "--no-save", "--loglevel=error"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not script.exists():
        return f"npm cannot install Vite: {(done.stderr.strip().splitlines() or ['no output'])[0]}"
    return None


def version(directory):
    return f"vite {json.loads((directory / 'node_modules/vite/package.json').read_text())['version']}"


def write_app(directory):
    source = directory / "src"
    source.mkdir(parents=True, exist_ok=True)
    (directory / "package.json").write_text('{ "private": true, "type": "module" }\n')
    # The cache is private to the run, and the run may be root's while the directory is not.
    (directory / "vite.config.js").write_text("export default { cacheDir: '/run/netns/.files/vite' };\n")
    (directory / "index.html").write_text(PAGE)
    for group in range(GROUPS):
        write_group(source / f"group{group}", group)
    groups = range(GROUPS)
    imports = [f"import {{ values as group{group} }} from './group{group}/index.js';" for group in groups]
    total = f"const values = [{', '.join(f'...group{group}' for group in groups)}];"
    # Imports are part of the page's load event, so the time of the last module is known here.
    shown = "Object.assign(document.body.dataset, { modules: new Set(values).size, milliseconds: performance.now() });"
    (source / "main.js").write_text("\n".join([*imports, total, shown, ""]))


def write_group(directory, group):
    directory.mkdir(exist_ok=True)
    first = group * GROUP_MODULES
    others = range(first + 1, first + GROUP_MODULES)
    for number in others:
        text = f"// Module {number} of group {group}.\nexport const name = 'module {number}';\nexport const value = {number};\n"
        (directory / f"module{number}.js").write_text(text)
    imports = [f"import {{ value as value{number} }} from './module{number}.js';" for number in others]
    values = f"export const values = [{first}, {', '.join(f'value{number}' for number in others)}];"
    (directory / "index.js").write_text("\n".join([*imports, values, ""]))


def warm_up(namespace, directory, port):
    """Requests every module once from beside the server. Vite transforms a module at its first request and keeps the
    result, which would otherwise be most of the time of the first load."""
    origin = f"http://127.0.0.1:{port}"
    paths = ["/", "/@vite/client", "/src/main.js"]
    for group in range(GROUPS):
        paths.append(f"/src/group{group}/index.js")
        first = group * GROUP_MODULES
        paths += [f"/src/group{group}/module{number}.js" for number in range(first + 1, first + GROUP_MODULES)]
    requests = Path(directory / "warm-up")
    requests.write_text("".join(f'url = "{origin}{path}"\noutput = "/dev/null"\n' for path in paths))
    run(*within(namespace, ["curl", "-sS", "--fail", "--noproxy", "*", "-K", requests]))


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
